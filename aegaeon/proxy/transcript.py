"""The text of one choice as its tokens come: stop strings cut off, the prompt before it where that
is to be echoed, and how likely each token was."""

from typing import Literal

import msgspec

from aegaeon import _native
from aegaeon.measures import NOT_WAITED, Waited
from aegaeon.proxy.detokenize import Detokenizer, StopMatcher
from aegaeon.proxy.generation import Delta
from aegaeon.proxy.tools import Call, CallReader
from aegaeon.sampling import TokenLogProbs
from aegaeon.types import FinishReason, InstanceId

AnswerFinish = FinishReason | Literal["tool_calls"]


class TokenScore(msgspec.Struct, frozen=True):
    """A token, where in the choice's text it begins, in characters, and how likely it was (None:
    nothing came before it)."""

    token_id: int
    offset: int
    log_probs: TokenLogProbs | None


class Piece(msgspec.Struct, frozen=True, gc=False):
    """New text of choice `index`, made of `tokens` more tokens; the last has a finish reason.

    `scores` are those of the tokens whose text it is, where they were asked for; `calls` are in the
    text's place.
    """

    index: int
    text: str
    tokens: int
    finish_reason: AnswerFinish | None
    instance: InstanceId
    scores: tuple[TokenScore, ...] = ()
    calls: tuple[Call, ...] = ()
    waited: Waited = NOT_WAITED  # so far
    cached_tokens: int = 0


class Echo(msgspec.Struct, frozen=True):
    """A prompt that is to stand before the choice's text; `is_all` where that is all of it."""

    text: str
    token_ids: tuple[int, ...]
    is_all: bool = False


class Transcript:
    """Takes the tokens of one generation in, hands its text out. A stop string or token ends it and
    is not in it."""

    def __init__(
        self, detokenizers: tuple[Detokenizer, Detokenizer], stops: tuple[str, ...],
        echo: Echo | None = None, is_scored: bool = False, calls: CallReader | None = None,
    ) -> None:  # fmt: skip
        """Of `detokenizers`, both fresh, one is for the prompt; `calls` reads calls of the text."""
        self.index = 0  # of the choice, where there are several
        self._of_prompt, self._detokenizer = detokenizers
        self._stops = StopMatcher(stops)
        # Whether tokens become text and nothing else, once what is to be echoed is.
        self._is_plain = not (stops or is_scored or calls is not None)
        self._echo = echo
        self._is_scored = is_scored
        self._calls = calls
        self._offset = 0
        self._prompt_scores: list[TokenLogProbs] = []
        self._held: list[TokenScore] = []  # of tokens without text so far
        self._held_text = ""
        self._held_tokens = 0

    @property
    def vocabulary(self) -> _native.TokenVocabulary | None:
        """The bytes of its tokens, where `torn` is known."""
        return self._detokenizer.vocabulary

    @property
    def torn(self) -> bytes | None:
        """The beginning of a character that is held back, where from here on bytes of tokens are
        the text and nothing is to be done but that; else None."""
        if not self._is_plain or self._echo is not None or self._held_text:
            return None
        return None if self.vocabulary is None else self._detokenizer.torn

    def resume(self, torn: bytes) -> None:
        """Go on behind tokens that somebody else has made text of, but for `torn`."""
        self._detokenizer.resume(torn)

    def take(self, delta: Delta) -> Piece:
        """Return what `delta` adds; nothing more comes behind a piece with a finish reason."""
        if self._is_plain and delta.finish_reason is None and self._echo is None:
            return self._plain(delta)
        self._prompt_scores += delta.scores
        if self._echo is not None and (delta.token_ids or delta.finish_reason):
            self._begin_with(self._echo)
            if self._echo.is_all:
                return self._piece(delta, "", "length")
            self._echo = None
        ended_by_token = delta.finish_reason == "stop"
        text = ""
        for at, token_id in enumerate(delta.token_ids):
            self._held_tokens += 1
            if ended_by_token and at == len(delta.token_ids) - 1:
                break
            new, is_stopped = self._stops.push(self._push(token_id, delta, at))
            text += new
            if is_stopped:
                return self._piece(delta, text, "stop")
        finish = delta.finish_reason
        if finish is not None:
            rest, is_stopped = self._stops.push(self._detokenizer.finish())
            text += rest if is_stopped else rest + self._stops.finish()
            finish = "stop" if is_stopped else finish
        return self._piece(delta, text, finish)

    def _plain(self, delta: Delta) -> Piece:
        """As `take`, for nearly all there is: more text in the middle of a choice."""
        text = self._held_text
        for token_id in delta.token_ids:
            text += self._detokenizer.push(token_id)
        self._held_text = ""
        made = len(delta.token_ids)
        waits = delta.waited, delta.cached_tokens
        return Piece(self.index, text, made, None, delta.instance, (), (), *waits)

    def _push(self, token_id: int, delta: Delta, at: int) -> str:
        if self._is_scored:
            self._held.append(TokenScore(token_id, self._offset, delta.log_probs[at]))
        text = self._detokenizer.push(token_id)
        self._offset += len(text)
        return text

    def _begin_with(self, echo: Echo) -> None:
        self._held_text = echo.text
        self._offset = len(echo.text)
        if not self._is_scored:
            return
        offset = 0
        for token_id, log_probs in zip(echo.token_ids, (None, *self._prompt_scores), strict=True):
            self._held.append(TokenScore(token_id, min(offset, self._offset), log_probs))
            offset += len(self._of_prompt.push(token_id))
        self._prompt_scores.clear()

    def _piece(self, delta: Delta, text: str, ended: FinishReason | None) -> Piece:
        text, self._held_text = self._held_text + text, ""
        text, calls, finish = self._read_calls(text, ended)
        tokens, self._held_tokens = self._held_tokens, 0
        scores: tuple[TokenScore, ...] = ()
        if text or calls or finish is not None:
            scores, self._held = tuple(self._held), []
        return Piece(
            index=self.index,
            text=text,
            tokens=tokens,
            finish_reason=finish,
            instance=delta.instance,
            scores=scores,
            calls=calls,
            waited=delta.waited,
            cached_tokens=delta.cached_tokens,
        )

    def _read_calls(
        self, text: str, finish: FinishReason | None
    ) -> tuple[str, tuple[Call, ...], AnswerFinish | None]:
        """Return the words of `text`, the calls, and how the choice ends with them, if it does."""
        reader = self._calls
        if reader is None:
            return text, (), finish
        words, calls = reader.push(text)
        if finish is not None and not reader.is_full:
            rest, more = reader.finish(is_cut=finish == "length")
            words, calls = words + rest, calls + more
        if reader.is_cut:
            return words, tuple(calls), finish
        if reader.is_full or (finish == "stop" and reader.has_calls):
            return words, tuple(calls), "tool_calls"
        return words, tuple(calls), finish
