"""Whose fault it was that an instance died: the request's that was computed, and of no other."""

import asyncio

import pytest

from aegaeon.deaths import (
    MAX_DEATHS,
    PROGRESS_TOKENS,
    WORDS_S,
    Death,
    Work,
    decode_deaths,
    encode_deaths,
    name_of,
)
from aegaeon.errors import GivenUp, StoreUnavailable
from aegaeon.proxy import living
from aegaeon.proxy.losses import (
    MAX_IN_COMPANY,
    MAX_LOSSES,
    MAX_OF_MODEL,
    MAX_UNKNOWN,
    MOST_LOSSES,
    OCCASIONS_OF_MODEL,
    SUSPECT_LOSSES,
    Losses,
    Lost,
    Suspicion,
)
from aegaeon.proxy.outbox import Target
from aegaeon.store.local import LocalBoard
from tests.proxy.test_gateway import TOKENS, Setup, collect, generation, run, until

ALONE = Work("m", ("r",))
IN_COMPANY = Work("m", ("q", "r", "s"))
WAITING = Work("m", ("q", "s"), loading="n")


def deaths_until_given_up(works):
    """How many deaths a request without tokens sees until it is given up, if it is."""
    suspicion = Suspicion()
    for number, work in enumerate(works, 1):
        suspicion.note("r", work, 0)
        if suspicion.is_certain:
            return number
    return None


def test_a_request_that_waits_is_given_up_by_no_number_of_deaths():
    assert deaths_until_given_up([WAITING, Work(), Work(taking="q")] * 1000) is None


def test_one_that_is_computed_alone_at_each_death_is_given_up_after_few():
    assert deaths_until_given_up([ALONE] * 9) == MAX_LOSSES <= 5
    assert deaths_until_given_up([Work(taking="r")] * 9) == MAX_LOSSES


def test_those_in_its_company_are_not_once_each_is_computed_alone():
    works = [IN_COMPANY] * SUSPECT_LOSSES
    assert deaths_until_given_up([*works, ALONE, ALONE]) == SUSPECT_LOSSES + 2
    assert deaths_until_given_up([*works, *[Work("m", ("q",))] * 99]) is None
    # Whoever computes them together all the same gives up, too.
    assert deaths_until_given_up([IN_COMPANY] * 99) == MAX_IN_COMPANY


def test_deaths_of_which_nobody_knows_count_for_little():
    assert deaths_until_given_up([None] * 99) == MAX_UNKNOWN
    assert deaths_until_given_up([None, WAITING] * 99) == 2 * MAX_UNKNOWN - 1


def test_progress_clears_a_request_but_not_for_ever():
    suspicion = Suspicion()
    for number in range(MOST_LOSSES):
        assert not suspicion.is_certain and suspicion.is_suspect == (number % 3 == 2)
        suspicion.note("r", ALONE, number // 3 * PROGRESS_TOKENS)
        if number % 3 == 2:
            suspicion = Suspicion(losses=suspicion.losses)
    assert suspicion.is_certain


def test_a_board_keeps_the_last_deaths_of_an_instance():
    deaths = tuple(Death(life, Work("m", (f"r{life}",))) for life in range(99))
    assert decode_deaths(encode_deaths(deaths)) == deaths[-MAX_DEATHS:]


def test_a_loss_is_judged_when_it_is_known_or_a_moment_later(monkeypatch):
    now, board = [100.0], LocalBoard()
    monkeypatch.setattr("aegaeon.proxy.losses.time.monotonic", lambda: now[0])
    judge = Losses(board, lambda _: None)
    known, unknown = Target("a", 7), Target("b", 1)
    board.publish(name_of("a"), encode_deaths((Death(3, None), Death(7, ALONE), Death(9, None))))
    board.publish(name_of("b"), b"\xc1")
    assert judge.judge({known, unknown}, {}) == [Lost(known, ALONE, {})]
    now[0] += WORDS_S / 2
    assert judge.judge({unknown}, {}) == []
    now[0] += WORDS_S
    assert judge.judge({unknown}, {}) == [Lost(unknown, None, {})]
    # Asked anew, it is waited for anew.
    assert judge.judge(set(), {}) == judge.judge({Target("c", 1)}, {}) == []


def test_who_is_held_to_be_lost_cannot_come_back_by_then():
    board, fenced, heard = LocalBoard(), [], []

    def fence(target):
        if not heard:
            raise StoreUnavailable("no answer")
        fenced.append(target)

    judge, target = Losses(board, fence), Target("a", 7)
    assert judge.judge({target}, {}) == [] == fenced  # it may yet come back
    board.publish(name_of("a"), encode_deaths((Death(7, Work("m")),)))
    for _ in range(MAX_OF_MODEL):
        with pytest.raises(StoreUnavailable):
            judge.judge({target}, {"m": 0})
    heard.append(True)
    # It counts once, however often it was tried.
    assert judge.judge({target}, {"m": 0}) == [Lost(target, Work("m"), {})]
    assert fenced == [target]


def bad_after(works, made):
    """What is said of models at each death; `made` are the tokens of "m" by then."""
    board, told = LocalBoard(), []
    judge = Losses(board, lambda _: None)
    for life, (work, tokens) in enumerate(zip(works, made, strict=True)):
        board.publish(name_of("a"), encode_deaths((Death(life, work),)))
        (lost,) = judge.judge({Target("a", life)}, {"m": tokens, "n": 5})
        told.append(set(lost.bad))
    return told


MANY = tuple(f"r{number}" for number in range(OCCASIONS_OF_MODEL))


@pytest.mark.parametrize(
    "work", [Work("m"), Work("n", ("r",), "m"), Work("m", ("r",), "m"), Work("m", MANY)]
)
def test_a_model_is_bad_that_instances_die_of_before_anybody_has_a_token_of_it(work):
    told = bad_after([work] * (MAX_OF_MODEL + 2), [7] * (MAX_OF_MODEL + 2))
    assert not any(told[: MAX_OF_MODEL - 1])
    assert all("m" in one for one in told[MAX_OF_MODEL - 1 :])


def test_a_model_is_not_that_makes_tokens_or_only_waits():
    assert not any(bad_after([Work("m")] * 99, range(99)))
    works = [Work("m"), Work(), None, Work("n")] * (MAX_OF_MODEL - 1)
    assert not any(bad_after(works, [7] * len(works)))


def test_a_model_is_not_bad_because_one_request_is_sent_again_and_again():
    # Each try is a request of its own, and is given up.
    tries = [Work("m", (f"poison-{n // MAX_LOSSES}",)) for n in range(9 * MAX_LOSSES)]
    first = bad_after(tries, [7] * len(tries)).index({"m"}) + 1
    assert first > MAX_OF_MODEL and first > (OCCASIONS_OF_MODEL - 1) * MAX_LOSSES
    same = [Work("m", ("poison",))] * 99
    assert not any(bad_after(same, [7] * 99))


def test_requests_of_a_bad_model_are_told_so_and_no_others():
    async def test():
        async with Setup() as setup:
            waiting = asyncio.create_task(collect(setup.gateway, generation(id="waits")))
            for life in range(1, MAX_OF_MODEL + 1):
                instance = setup.instance(id="a", incarnation=life)
                instance.hold_after = 0
                await until(lambda life=instance: life.submitted)
                await asyncio.to_thread(instance.die, Work(loading="m"))
            with pytest.raises(GivenUp, match="weights may be damaged"):
                await waiting
            setup.instance(id="b")
            assert (await collect(setup.gateway, generation()))[0] == TOKENS

    run(test())


def test_a_request_that_waits_outlives_any_number_of_instances():
    async def test():
        async with Setup() as setup:
            waiting = asyncio.create_task(collect(setup.gateway, generation(id="waits")))
            for life in range(1, 3 * MAX_LOSSES):
                instance = setup.instance(id="a", incarnation=life)
                instance.hold_after = 0
                await until(lambda life=instance: life.submitted)
                assert not instance.submitted[0].is_suspect
                await asyncio.to_thread(instance.die, Work("n", ("another",)))
            setup.instance(id="b")
            assert (await waiting)[0] == TOKENS

    run(test())


def test_who_is_suspected_is_said_to_be_and_is_given_up_with_a_reason():
    async def test():
        async with Setup() as setup:
            task = asyncio.create_task(collect(setup.gateway, generation(id="poison")))
            said = []
            for life in range(1, MAX_LOSSES + 1):
                instance = setup.instance(id="a", incarnation=life)
                instance.hold_after = 0
                await until(lambda life=instance: life.submitted)
                said.append(instance.submitted[0].is_suspect)
                await asyncio.to_thread(instance.die)
            with pytest.raises(GivenUp, match="not tried again; the server's log"):
                await task
            assert said == [False, False, True, True]

    run(test())


class Deaf(LocalBoard):
    """A board that does not answer while `is_away`."""

    is_away = True

    def read(self):
        if self.is_away:
            raise StoreUnavailable("no answer")
        return super().read()


def test_a_store_that_does_not_tell_puts_a_loss_off_and_ends_nothing():
    async def test():
        async with Setup() as setup:
            board = setup.gateway._losses._board = Deaf()
            first = setup.instance(id="a")
            first.hold_after = 3
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: first.submitted)
            await asyncio.to_thread(first.die)
            second = setup.instance(id="b")
            await asyncio.sleep(0.3)
            assert not second.submitted
            board.is_away = False
            assert (await task)[0] == TOKENS

    run(test())


def test_a_request_that_its_instance_has_given_up_is_placed_again(monkeypatch):
    monkeypatch.setattr(living, "SILENCE_S", 0.3)
    monkeypatch.setattr(living, "LOOK_S", 0.05)

    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 5
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: instance.submitted)
            instance.forget()
            await until(lambda: len(instance.submitted) == 2)
            instance.release()
            assert (await task)[0] == TOKENS
            again = instance.submitted[1]
            assert (again.attempt, again.generated_token_ids) == (1, TOKENS[:5])
            assert not again.is_suspect

    run(test())


def test_a_silent_request_that_is_still_there_is_left_alone(monkeypatch):
    monkeypatch.setattr(living, "SILENCE_S", 0.1)
    monkeypatch.setattr(living, "LOOK_S", 0.05)

    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 5
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: instance.confirmed >= 3)
            instance.release()
            assert (await task)[0] == TOKENS
            assert len(instance.submitted) == 1

    run(test())


def test_what_a_lost_life_says_late_changes_nothing(monkeypatch):
    """As one does that was cut off, and has not yet learnt that its requests are elsewhere."""
    monkeypatch.setattr("aegaeon.proxy.losses.WORDS_S", 0.05)

    async def test():
        async with Setup() as setup:
            first = setup.instance(lambda _: (*TOKENS[:5], *([999] * 35)), id="a")
            first.hold_after = 5
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: first.submitted)
            second = setup.instance(id="b")
            second.hold_after = 10
            setup.domain.metadata().remove_instance("a", 1)  # its lease has ended
            await until(lambda: second.submitted)
            first.release()
            await asyncio.sleep(0.3)
            second.release()
            tokens, last = await task
            assert (tokens, last.instance) == (TOKENS, "b")
            assert [request.attempt for request in second.submitted] == [1]
            assert len(first.submitted) == 1

    run(test())
