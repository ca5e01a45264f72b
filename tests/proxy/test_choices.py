"""Choices over the real gateway and a scripted instance, and over one request alone."""

import asyncio

import pytest

from aegaeon.errors import InstanceLost, InvalidRequest
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.generation import OpenRequest
from aegaeon.proxy.transcript import Transcript
from aegaeon.sampling import PromptScores, SamplingParams, TokenLogProbs
from aegaeon.types import TokenEvent
from tests.proxy.test_gateway import TOKENS, Setup, generation, run, until
from tests.proxy.test_waits import Plain, Source

ASKED = generation(id="cmpl.0")


def transcript(*stops):
    return Transcript((Plain(), Plain()), stops)


async def read(choices):
    pieces = []
    while not choices.is_done:
        piece = await choices.next(9.0)
        assert piece is not None
        pieces.append(piece)
    return "".join(piece.text for piece in pieces), pieces


def test_a_stop_string_in_the_middle_is_no_cancel():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 5  # the last tokens never come
            stop = chr(TOKENS[3])
            async with Choices(setup.gateway, [ASKED], [transcript(stop)]) as choices:
                text, pieces = await read(choices)
                assert text == "".join(map(chr, TOKENS[:3]))
                assert pieces[-1].finish_reason == "stop"
                await until(lambda: instance.cancelled)
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.finished, figures.cancelled) == ({"stop": 1}, 0)
            assert setup.gateway.open_requests == 0

    run(test())


def test_choices_that_are_left_are_cancelled():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 1
            two = [ASKED, generation(id="cmpl.1")]
            async with Choices(setup.gateway, two, [transcript(), transcript()]) as choices:
                assert {(await choices.next(9.0)).index for _ in two} == {0, 1}
            await until(lambda: len(instance.cancelled) == 2)
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.finished, figures.cancelled) == ({}, 2)

    run(test())


def test_an_error_while_no_instance_is_ready_is_raised_and_counted():
    async def test():
        async with Setup(patience_s=0.1) as setup:
            async with Choices(setup.gateway, [ASKED], [transcript()]) as choices:
                with pytest.raises(InstanceLost, match="no instance is ready"):
                    await choices.next(9.0)
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.failed, figures.cancelled) == ({"instance_lost": 1}, 0)

    run(test())


def test_scores_of_a_prompt_are_told_of_before_its_first_token():
    scores = (TokenLogProbs(-1.5), TokenLogProbs(-2.5))

    async def test():
        source = Source()
        async with Choices(source, [ASKED], [transcript()]) as choices:
            assert await choices.next(0.01) is None
            opened: OpenRequest = source.opened
            # It goes on at its instance, and nobody but the reader is woken.
            assert opened.take_in(PromptScores("r", 0, 1, scores), 0.0) is False
            piece = await choices.next(9.0)
            assert (piece.text, piece.tokens, piece.finish_reason) == ("", 0, None)
            assert not opened._changed.is_set()
            source.send()
            assert (await choices.next(9.0)).text == "A"

    asyncio.run(asyncio.wait_for(test(), 20))


def test_choices_that_find_no_room_together_are_all_refused_and_none_is_begun():
    async def test():
        async with Setup(max_waiting=8) as setup:
            instance = setup.instance()
            many = [generation(id=f"cmpl.{n}") for n in range(16)]
            for _ in range(3):
                with pytest.raises(InvalidRequest, match="at most 8"):
                    async with Choices(setup.gateway, many, [transcript() for _ in many]) as all_:
                        await all_.next(9.0)
            async with Choices(setup.gateway, many[:8], [transcript() for _ in range(8)]) as eight:
                assert len((await read(eight))[1]) >= 8
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.finished, figures.cancelled) == ({"length": 8}, 0)
            assert sorted(one.id for one in instance.submitted) == [f"cmpl.{n}" for n in range(8)]

    run(test())


def test_choices_left_before_they_began_hold_nothing():
    async def test():
        async with Setup() as setup:
            setup.instance()
            async with Choices(setup.gateway, [ASKED], [transcript()]):
                assert setup.gateway.open_requests == 1  # and its task has not run
            assert setup.gateway.open_requests == 0

    run(test())


class Held(OpenRequest):
    held = 0

    def hold(self, more):
        self.held += more


class Three:
    def __init__(self):
        self.ends = {}

    def open_all(self, generations):
        found = [Held(f"r{n}", one, 0.0, 1e9) for n, one in enumerate(generations)]
        for one in found:
            one.on_held = one.hold
            self.ends[one.id] = asyncio.Event()
        self.opened = found
        return found

    async def keep(self, opened):
        await self.ends[opened.id].wait()
        tokens = tuple(range(10))
        opened.take_in(TokenEvent(opened.id, 0, 0, tokens, "i", "length"), 0.0)

    def leave(self, _):
        pass


def test_log_probabilities_of_choices_that_have_ended_count_while_others_run():
    async def test():
        gateway, scored = Three(), SamplingParams(logprobs=1)
        asked = [generation(id=f"r{n}", sampling=scored) for n in range(3)]
        of_one = 10 * asked[0].score_bytes
        assert of_one
        async with Choices(gateway, asked, [transcript() for _ in asked]) as choices:
            first, second, third = gateway.opened
            for one, wanted in ((second, (of_one, 0)), (first, (of_one, 2 * of_one))):
                gateway.ends[one.id].set()
                for _ in range(5):
                    await asyncio.sleep(0)
                choices.ready()  # takes its last piece, which ends its task
                for _ in range(5):
                    await asyncio.sleep(0)
                assert (first.held, third.held) == wanted

    run(test())
