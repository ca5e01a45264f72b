"""An instance without a model, for measuring what stands between it and a client: the real loop,
scheduler and mailboxes around an engine that only keeps a pace. Notes when each token left it.

Told by a Launch as JSON on its first argument's file; ends with its stdin.
"""

import itertools
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from aegaeon.engine.base import NullEngine
from aegaeon.instance.launch import Launch, mailbox_address
from aegaeon.instance.worker import build_runtime
from aegaeon.store.base import LOOK_S, Board, Domain, Mailbox, MetadataStore
from aegaeon.store.catalog import CatalogStore
from aegaeon.store.codec import decode_replies
from aegaeon.store.domains import claim_domain, open_domain
from aegaeon.types import (
    ComputeAction,
    Decode,
    ModelSpec,
    NewToken,
    Outcome,
    Stepped,
    TokenEvent,
)


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the instance is told: whom to be, how long a step takes, the tokens that it makes over
    and over, where to put its stamps."""

    launch: Launch
    step_s: float
    token_ids: tuple[int, ...]
    stamps: str


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """A request's tokens from `position` on left at `at_s` (monotonic clock)."""

    request: str
    position: int
    tokens: int
    at_s: float


class PacedEngine(NullEngine):
    """Ends decode steps at multiples of `pace_s`, as a device that takes so long does; 0: at once.
    Its tokens are `token_ids` in turn, since those of a hash are half characters."""

    def __init__(
        self, specs: tuple[ModelSpec, ...], pace_s: float, token_ids: tuple[int, ...]
    ) -> None:
        super().__init__(specs, pause=time.sleep)
        self._pace_s = pace_s
        self._due_s = time.monotonic()
        self._token_ids = itertools.cycle(token_ids)

    def execute(self, action: ComputeAction) -> Outcome:
        """Wait for the end of the step, then make its tokens."""
        if isinstance(action, Decode) and self._pace_s > 0:
            now = time.monotonic()
            self._due_s = max(self._due_s + self._pace_s, now)
            time.sleep(self._due_s - now)
        outcome = super().execute(action)
        if not isinstance(outcome, Stepped):
            return outcome
        tokens = tuple(
            NewToken(token.request_id, next(self._token_ids), token.finish_reason)
            for token in outcome.tokens
        )
        return msgspec.structs.replace(outcome, tokens=tokens)


class _StampingMailbox(Mailbox):
    def __init__(self, inner: Mailbox, sent: list[tuple[float, bytes]]) -> None:
        self._inner, self._sent = inner, sent

    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        # Before it is seen, or the client might have it earlier.
        now = time.monotonic()
        self._inner.send(record, timeout_s)
        self._sent.append((now, record))

    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        return self._inner.receive(timeout_s, max_records)

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()

    def unlink(self) -> None:
        self._inner.unlink()


class StampingDomain(Domain):
    """A domain whose sent records are kept, with their times, in `sent`."""

    def __init__(self, inner: Domain) -> None:
        self._inner = inner
        self.sent: list[tuple[float, bytes]] = []

    def metadata(self) -> MetadataStore:
        """As the inner one."""
        return self._inner.metadata()

    def catalog(self) -> CatalogStore:
        """As the inner one."""
        return self._inner.catalog()

    def board(self) -> Board:
        """As the inner one."""
        return self._inner.board()

    def create_mailbox(
        self, address: str, capacity_bytes: int = 4 << 20, look_s: float = LOOK_S
    ) -> Mailbox:
        """As the inner one."""
        return self._inner.create_mailbox(address, capacity_bytes, look_s)

    def open_mailbox(self, address: str) -> Mailbox:
        """Note what is sent there."""
        return _StampingMailbox(self._inner.open_mailbox(address), self.sent)

    def close(self) -> None:
        """As the inner one."""
        self._inner.close()

    def unlink(self) -> None:
        """As the inner one."""
        self._inner.unlink()

    def stamps(self) -> list[Stamp]:
        """Return when tokens were sent."""
        replies = ((at_s, reply) for at_s, record in self.sent for reply in decode_replies(record))
        return [
            Stamp(reply.request_id, reply.position, len(reply.token_ids), at_s)
            for at_s, reply in replies
            if isinstance(reply, TokenEvent)
        ]


def main() -> int:
    """Serve until stdin ends, then write the stamps."""
    orders = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Orders)
    launch = orders.launch
    with claim_domain(launch.settings), ExitStack() as owned:
        domain = StampingDomain(open_domain(launch.settings))
        owned.callback(domain.close)
        engine = PacedEngine(launch.specs, orders.step_s, orders.token_ids)
        inbox = domain.create_mailbox(mailbox_address(launch.instance, launch.incarnation))
        owned.callback(inbox.close)
        runtime = build_runtime(launch, domain, engine, inbox, owned)

        def drain_at_end() -> None:
            sys.stdin.buffer.read()
            runtime.drain()
            inbox.wake()

        threading.Thread(target=drain_at_end, daemon=True).start()
        print("up", flush=True)
        runtime.run()
        Path(orders.stamps).write_bytes(msgspec.msgpack.encode(domain.stamps()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
