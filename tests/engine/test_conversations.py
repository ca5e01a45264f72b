"""Chats of many turns with two models on two instances: whatever is evicted, cancelled or handed
over, each turn has the tokens of a run where nothing is kept, and in the end nothing is held."""

import random
from collections import Counter

import pytest

from aegaeon.types import SamplingParams
from tests.support.decoder import DEVICES, SHAPES, VOCAB, all_kv_bytes, make_engine, make_request
from tests.support.runner import Runner
from tests.support.whims import Whims

MODELS = tuple(SHAPES)
SEEDS = range(2)
CHATS, TURNS = 12, 5
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
# Of each engine; of the pool that both leave things in, four times as many.
KV_BYTES = 18 * SHAPES["b"].block_bytes


class Chat:
    """What has been said in a chat; some begin alike."""

    def __init__(self, number, seed):
        self.model = MODELS[number % 2]
        self.name = f"{self.model} {number}"
        self._choose = random.Random(f"{seed} {number}")
        system = random.Random(f"{seed} {number % 3}").choices(range(VOCAB), k=36)
        self.said = [*system, *self._words()]
        self._sampling = SAMPLED if number % 3 else SamplingParams(temperature=0.0)

    def ask(self, turn):
        return make_request(
            f"{self.name} {turn}",
            self.said,
            model=self.model,
            sampling=self._sampling,
            max_tokens=self._choose.randint(2, 12),
        )

    def hear(self, answer):
        self.said += [*answer, *self._words()]

    def _words(self):
        return self._choose.choices(range(VOCAB), k=self._choose.randint(1, 20))


def alone(engine, request):
    """The tokens of a request that nobody disturbs, where nothing is kept."""
    runner = Runner(engine)
    runner.submit(request)
    return runner.finish()[request.id]


def check_turn(whims, requests, doomed, reference):
    """Have all of a turn answered, or cancelled on the way; return the answers as they should be,
    which those that have come are, or begin."""
    whims.submit(*requests)
    for request in requests:
        known = max(engine.known_tokens(request.id) for engine in whims.engines)
        assert 0 <= known < len(request.prompt_token_ids)
    whims.finish(doomed)
    expected = {request.id: alone(reference, request) for request in requests}
    for name, tokens in expected.items():
        got = whims.tokens[name]
        assert got == tokens[: len(got)]
        assert len(got) == len(tokens) or name in doomed
    return expected


def talk(engines, seed):
    """Return what was done, and how many tokens the chats came to."""
    reference = make_engine(is_sharing=False)
    choose = random.Random(f"{seed} whims")
    whims = Whims(engines, MODELS, choose)
    chats = [Chat(number, seed) for number in range(CHATS)]
    for turn in range(TURNS):
        requests = [chat.ask(turn) for chat in chats]
        doomed = choose.sample([request.id for request in requests], k=choose.randint(0, 2))
        expected = check_turn(whims, requests, doomed, reference)
        for chat, request in zip(chats, requests, strict=True):
            chat.hear(expected[request.id])
    reference.close()
    return whims.did


def assert_nothing_is_held(engine):
    assert all_kv_bytes(engine) == 0
    for index in filter(None, [engine._kv.prefixes, getattr(engine._kv, "_kept", None)]):
        assert not any(entry.uses for entry in index._entries.values())


@pytest.mark.parametrize("kinds", [("cpu", "cpu"), ("staged", "staged"), DEVICES], ids=" ".join)
@pytest.mark.parametrize("is_sharing", [(True, True), (True, False), (False, False)], ids=str)
def test_every_turn_has_the_tokens_of_a_run_without_others(tmp_path, kinds, is_sharing):
    did = Counter()
    for seed in SEEDS:
        path = str(tmp_path / f"pool {seed}")
        engines = [
            make_engine(KV_BYTES, load=False, kv_path=path, device=kind, is_sharing=is_on)
            for kind, is_on in zip(kinds, is_sharing, strict=True)
        ]
        did += talk(engines, seed)
        for engine in engines:
            did["found"] += engine.usage().found_tokens
            did["room made"] += engine.usage().evicted_blocks
            assert_nothing_is_held(engine)
        for engine in engines:
            engine.close()
    wanted = {"handed over", "cancelled", "resumed"}
    wanted |= {"found"} if any(is_sharing) else set()
    wanted |= {"room made"} if all(is_sharing) else set()
    assert wanted <= {name for name, times in did.items() if times}, did
    assert any(is_sharing) or not did["found"]
