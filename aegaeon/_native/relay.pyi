"""Tokens of many streams from an instance's record to sockets: csrc/relay."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

class _Owner(Protocol):
    def absorb(
        self, token_ids: Sequence[int], received_s: float, is_sent: bool, waited: bytes
    ) -> None: ...
    def fail(self, error: Exception) -> None: ...

class TokenVocabulary:
    """The bytes of a model's tokens; `bytes_of` is asked for each that has text once."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None: ...

class StreamLine:
    """One stream of server-sent events in HTTP chunks.

    `wire` is its connection's transport and that one's socket: bytes go to the socket while the
    transport is open and holds none back, and what the socket does not take goes to the transport.
    `names` are the request's and the instance's. `form` is what stands around the text of a frame,
    a JSON string, and how many tokens the prompt has. Of four parts there are two numbers between
    the last three: the tokens made, and those with the prompt's. `owner` hears of what was taken,
    also, encoded, of what was waited for; unless it `hears_waits`, tokens with such are handed
    back. Raises ValueError for another number of parts.
    """

    def __init__(
        self,
        vocabulary: TokenVocabulary,
        owner: _Owner,
        wire: tuple[asyncio.Transport, int],
        names: tuple[str, str],
        form: tuple[list[bytes], int],
        hears_waits: bool,
    ) -> None: ...
    def close(self) -> None:
        """Let go of the owner and the transport; it must not be lent, now or again."""

class StreamRelay:
    """Takes tokens of the lines that are lent to it. One thread's, that of the transports."""

    def lend(self, line: StreamLine, attempt: int, position: int, made: int, torn: bytes) -> None:
        """Take what comes from token `position` of `attempt` on; `made` are counted in frames, and
        `torn` is the beginning of a character."""

    def recall(self, line: StreamLine) -> bytes:
        """Return the beginning of a character that the line holds back, and take nothing more."""

    def take(self, records: list[tuple[bytes, float]]) -> list[tuple[bytes, float]]:
        """Take records, each with when it came, and return what is not the next tokens, and only
        that, of a line that is lent and whose transport is free: it is lent no more then. All
        tokens of a line go out as one frame; owners hear of them when all frames are sent."""
