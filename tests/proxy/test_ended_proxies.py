"""What proxies have counted that have ended: it stays in the sums, and their records do not."""

import asyncio

from aegaeon.config import check_settings
from aegaeon.deaths import Death, encode_deaths, name_of
from aegaeon.figures import ProxyFigures, decode_figures, encode_figures, folded_up
from aegaeon.proxy.metrics import GONE, SILENT_S, Meter
from aegaeon.store.local import LocalDomain
from tests.proxy.test_gateway import SPECS


def ended(prompt_tokens, **changes):
    """The record of a proxy that was."""
    figures = ProxyFigures(starts=1, beats=7, is_passing=True, **changes)
    figures.of("m").prompt_tokens = prompt_tokens
    figures.of("m").open = 3
    return encode_figures(figures)


class Boards:
    """Meters of a domain whose clock is set by hand."""

    def __init__(self, monkeypatch):
        self.domain, self.now = LocalDomain(), 100.0
        monkeypatch.setattr("aegaeon.proxy.metrics.time.monotonic", lambda: self.now)

    def meter(self, address):
        meter = Meter(check_settings({}), lambda _: {})
        meter.serve(SPECS)
        meter.join(self.domain, address)
        meter._exchange(meter._record())
        return meter

    def pass_s(self, seconds, *meters):
        self.now += seconds
        for meter in meters:
            meter._exchange(meter._record())


def test_proxies_that_have_ended_are_folded_and_their_sums_stay(monkeypatch):
    boards = Boards(monkeypatch)
    board = boards.domain.board()
    for number in range(1, 4):
        board.publish(f"proxy-{number}-ab", ended(number, responses={"/metrics": {"200": 1}}))
        board.end(f"proxy-{number}-ab")
    board.publish("proxy-9-ab", ended(100))  # is silent, but lives
    one, other = boards.meter("proxy-50-ab"), boards.meter("proxy-51-ab")
    boards.pass_s(1, one, other)
    for _ in range(3):
        boards.pass_s(SILENT_S + 1, one, other, one)
        for meter in (one, other):
            sums = meter.sums()
            assert sums.models["m"].prompt_tokens == 106 and sums.models["m"].open == 0
            assert sums.responses == {"/metrics": {"200": 3}} and sums.proxy_restarts == 0
    assert sorted(board.read()) == [GONE, "proxy-50-ab", "proxy-51-ab", "proxy-9-ab"]
    assert boards.meter("proxy-52-ab").sums().models["m"].prompt_tokens == 106


def test_what_is_told_of_dead_instances_is_no_proxy_that_has_ended(monkeypatch):
    boards = Boards(monkeypatch)
    board = boards.domain.board()
    board.publish(name_of("i"), encode_deaths((Death(1, None),)))
    board.end(name_of("i"))
    meter = boards.meter("proxy-50-ab")
    boards.pass_s(SILENT_S + 1, meter)
    boards.pass_s(SILENT_S + 1, meter)
    assert sorted(board.read()) == ["i.deaths", "proxy-50-ab"]
    assert not meter.sums().instances


def test_a_supervised_proxy_that_has_ended_keeps_its_name_for_the_next(monkeypatch):
    boards = Boards(monkeypatch)
    board = boards.domain.board()
    first = boards.meter("proxy-0.1")
    board.end("proxy-0")
    reader = boards.meter("proxy-50-ab")
    boards.pass_s(SILENT_S + 1, reader)
    assert first.sums() is not None and "proxy-0" in board.read()
    assert boards.meter("proxy-0.2").sums().proxy_restarts == 1


def test_a_proxy_that_was_taken_for_dead_counts_from_0_by_another_name(monkeypatch):
    boards = Boards(monkeypatch)
    board = boards.domain.board()
    stalled, reader = boards.meter("proxy-50-ab"), boards.meter("proxy-51-ab")
    timing = stalled.begin("m", 5, 0.0)
    timing.note(1, 1.0)
    boards.pass_s(1, stalled, reader)
    board.end("proxy-50-ab")
    boards.pass_s(SILENT_S + 1, reader)
    assert GONE in board.read() and "proxy-50-ab" not in board.read()
    assert reader.sums().models["m"].prompt_tokens == 5

    async def inline(call):
        return call()

    for _ in range(2):  # it sees that, and goes on
        boards.now += 1
        asyncio.run(stalled.tend(inline))
    timing = stalled.begin("m", 2, 0.0)
    timing.note(1, 1.0)
    boards.now += 1
    asyncio.run(stalled.tend(inline))
    boards.pass_s(1, reader)
    for meter in (stalled, reader):
        assert meter.sums().models["m"].prompt_tokens == 7


def test_a_folded_record_that_is_still_there_counts_once_and_goes(monkeypatch):
    boards = Boards(monkeypatch)
    board = boards.domain.board()
    board.publish("proxy-1-ab", ended(4))
    gone = folded_up(None, "proxy-1-ab", decode_figures(ended(4)))
    board.publish(GONE, encode_figures(gone))
    board.end("proxy-1-ab")
    meter = boards.meter("proxy-50-ab")
    assert meter.sums().models["m"].prompt_tokens == 4
    boards.pass_s(SILENT_S + 1, meter)
    boards.pass_s(1, meter)
    assert meter.sums().models["m"].prompt_tokens == 4
    assert sorted(board.read()) == [GONE, "proxy-50-ab"]
