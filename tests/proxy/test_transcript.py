"""A choice's text from its tokens: stops, echoes, and which tokens' scores go with which text."""

import pytest

from aegaeon.proxy.generation import Delta
from aegaeon.proxy.transcript import Echo, Transcript
from aegaeon.sampling import TokenLogProbs


class Letters:
    """Ids are code points; `holding` is one whose text comes with the next token's."""

    def __init__(self, holding: str = "") -> None:
        self._holding, self._held = holding, ""

    def push(self, token_id):
        text = self._held + chr(token_id)
        self._held = text if text.endswith(self._holding or "\0") else ""
        return "" if self._held else text

    def finish(self):
        return self._held


def score(letter):
    return TokenLogProbs(-ord(letter) / 100)


def delta(text, finish=None, scores=""):
    log_probs = tuple(map(score, text))
    return Delta(tuple(map(ord, text)), finish, "i", 0.0, log_probs, tuple(map(score, scores)))


def transcript(stops=(), echo=None, is_scored=True, holding=""):
    return Transcript((Letters(), Letters(holding)), stops, echo, is_scored)


def scored(piece):
    return [(chr(one.token_id), one.offset) for one in piece.scores]


def test_tokens_are_scored_where_they_begin():
    made = transcript()
    assert scored(made.take(delta("ab"))) == [("a", 0), ("b", 1)]
    last = made.take(delta("c\n", "stop"))
    assert (last.text, last.finish_reason, last.tokens) == ("c", "stop", 2)
    assert scored(last) == [("c", 2)]
    assert last.scores[0].log_probs == score("c")


def test_scores_wait_for_the_text_that_they_are_of():
    made = transcript(holding="b")
    assert scored(made.take(delta("a"))) == [("a", 0)]
    held = made.take(delta("b"))
    assert (held.text, held.scores, held.tokens) == ("", (), 1)
    assert scored(made.take(delta("c"))) == [("b", 1), ("c", 1)]


def test_nothing_is_scored_unasked():
    made = transcript(is_scored=False, echo=Echo("xy", (120, 121)))
    piece = made.take(Delta((97,), "length", "i", 0.0))
    assert (piece.text, piece.scores, piece.tokens) == ("xya", (), 1)


def test_a_stop_string_ends_text_and_scores():
    piece = transcript(stops=("bc",)).take(delta("abcd"))
    assert (piece.text, piece.finish_reason, piece.tokens) == ("a", "stop", 3)
    assert scored(piece) == [("a", 0), ("b", 1), ("c", 2)]


def test_an_echo_stands_before_the_text_with_its_scores():
    made = transcript(echo=Echo("xyz", tuple(map(ord, "xyz"))))
    first = made.take(delta("", scores="y"))
    assert (first.text, first.scores) == ("", ())
    piece = made.take(delta("ab", scores="z"))
    assert piece.text == "xyzab" and piece.tokens == 2
    assert scored(piece) == [("x", 0), ("y", 1), ("z", 2), ("a", 3), ("b", 4)]
    assert [one.log_probs for one in piece.scores[:3]] == [None, score("y"), score("z")]
    assert made.take(delta("c", "length")).text == "c"


def test_an_echo_may_be_all_there_is():
    made = transcript(echo=Echo("xy", (120, 121), is_all=True), stops=("x",))
    piece = made.take(delta("a", "length", scores="y"))
    assert (piece.text, piece.finish_reason, piece.tokens) == ("xy", "length", 0)
    assert scored(piece) == [("x", 0), ("y", 1)]


@pytest.mark.parametrize("stops", [("yz",), ("za",)])
def test_no_stop_string_is_looked_for_in_an_echo(stops):
    made = transcript(stops=stops, echo=Echo("xyz", tuple(map(ord, "xyz"))), is_scored=False)
    assert made.take(delta("ab", "length")).text == "xyzab"
