"""A stream's way past the interpreter: while its tokens are text and nothing else and its client
keeps up, native code takes them from the instance's record to the socket, all streams at once."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from aegaeon import _native
from aegaeon.proxy.answers import Answer, Usage
from aegaeon.proxy.choices import Text
from aegaeon.proxy.generation import OpenRequest, nothing
from aegaeon.proxy.http_limits import Wire
from aegaeon.store.codec import decode_waited

log = logging.getLogger(__name__)

# Where the numbers of a usage stand that grow with each token.
_GROWING = re.compile(rb'(?<="completion_tokens":)\d+|(?<="total_tokens":)\d+')


class Counts(Protocol):
    """What an answer has used so far, as a lane sees it."""

    def add_tokens(self, tokens: int) -> None:
        """So many more were made."""

    @property
    def made(self) -> int:
        """Tokens of all choices."""

    @property
    def usage(self) -> Usage:
        """All so far."""


class Lane:
    """Of one answer with one choice. Its stream is lent to the relay behind each piece that was
    sent in Python, and comes back with whatever else is said of its request; what is here, and in
    the request, is true whenever the relay is not at work, but for counts: they wait for that."""

    def __init__(
        self,
        relay: _native.StreamRelay,
        wire: Wire,
        text: Text,
        answer: Answer,
        counts: Counts,
        has_usage: bool,
    ) -> None:
        """`has_usage`: each frame says how much has been used."""
        self._relay = relay
        self._wire = wire
        self._text = text
        self._answer = answer
        self._counts = counts
        self._has_usage = has_usage
        self._line: _native.StreamLine | None = None
        self._key: tuple[str, Usage | None] = "", None  # what its frames were made of
        self._is_lent = False
        self._uncounted = 0  # tokens since it was lent
        self.sent_s = float("-inf")  # when the last token that was sent had come (monotonic clock)
        self.on_failed: Callable[[Exception], None] = _not_failed

    def lend(self) -> None:
        """Have the relay take what comes next, if that can be."""
        self.recall()
        opened, transcript = self._text.opened, self._text.transcript
        torn, vocabulary = transcript.torn, transcript.vocabulary
        if torn is None or vocabulary is None or opened is None or not opened.is_even:
            return
        line = self._line_for(opened, vocabulary)
        self._relay.lend(line, opened.attempt, opened.made, self._counts.made, torn)
        self._is_lent = True
        opened.on_other = self.recall

    def recall(self) -> None:
        """Have all that comes go through Python. Idempotent."""
        if self._is_lent:
            assert self._line is not None
            self._is_lent = False
            self._text.transcript.resume(self._relay.recall(self._line))
            self._counts.add_tokens(self._uncounted)
            self._uncounted = 0

    def close(self) -> None:
        """Come back, and let go of the connection. Idempotent."""
        self.recall()
        self._forget_line()
        # What leads back here would keep what the answer held until the collector looks at it.
        self.on_failed = _not_failed
        if self._text.opened is not None:
            self._text.opened.on_other = nothing

    def absorb(
        self, token_ids: Sequence[int], received_s: float, is_sent: bool, waited: bytes
    ) -> None:
        """The relay's: it has taken these in, and sent what text they had, if they had any."""
        opened = self._text.opened
        assert opened is not None
        if waited:
            opened.waited = decode_waited(waited)
        opened.absorb(token_ids, received_s)
        self._uncounted += len(token_ids)
        if is_sent:
            self.sent_s = received_s

    def fail(self, error: Exception) -> None:
        """The relay's: the stream cannot go on."""
        self.on_failed(error)

    def _line_for(
        self, opened: OpenRequest, vocabulary: _native.TokenVocabulary
    ) -> _native.StreamLine:
        instance = opened.instance
        usage = self._counts.usage if self._has_usage else None
        if usage is not None:
            usage = msgspec.structs.replace(usage, completion_tokens=0, total_tokens=0)
        if self._line is None or (instance, usage) != self._key:
            self._forget_line()
            self._key = instance, usage
            names = opened.id, instance
            form = self._form(instance, usage)
            self._line = _native.StreamLine(
                vocabulary, self, self._wire, names, form, hears_waits=not opened.is_traced
            )
        return self._line

    def _form(self, instance: str, usage: Usage | None) -> tuple[list[bytes], int]:
        parts = self._answer.around(self._text.index, instance, usage)
        if usage is None:
            return parts, 0
        first, between, last = _GROWING.split(msgspec.json.encode(usage))
        return [parts[0], parts[1] + first, between, last + parts[2]], usage.prompt_tokens

    def _forget_line(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _not_failed(error: Exception) -> None:
    """Nobody is there whom it concerns."""
    log.error("a stream failed behind its end error=%s", error)
