"""Keys and values on their way from one process of a device to another one, without the host.

The sender's stay where they are, lent under a pledge: a block of the node's pool. The receiver
copies them and then takes the pledge, which it can only while the sender has not let go of it; and
the sender does before anything else may be written to what it lent. So a copy that is kept is
whole, whoever dies or comes late: what the dead leave in the pool comes back by itself.
"""

import logging
import threading
from collections.abc import Callable

import msgspec

from aegaeon._native import CopyEngine
from aegaeon.engine.kv_copies import Blocks, Segments
from aegaeon.engine.kv_peers import Peers
from aegaeon.engine.kv_place import check_layout, offer_blocks, recall_blocks, take_offered
from aegaeon.engine.sequence import Sequence
from aegaeon.errors import CopyQueueFull, DeviceError, KvGone, OutOfBlocks
from aegaeon.memory.kv import KvPool, KvShape, blocks_for
from aegaeon.memory.traffic import Traffic
from aegaeon.types import KvHandle

log = logging.getLogger(__name__)

# Before weights: somebody waits.
URGENT = 0
# A copy within the device, behind the step that runs there.
COPY_S = 2.0
# Of the device's KV that may wait for others to copy it.
MOST_LENT = 0.5


class Lending:
    """What of the device's `pool` is lent, and how what others lend comes in. The owner of both
    holds its lock around every verb but `close`."""

    def __init__(
        self, pool: KvPool, host: KvPool, copier: CopyEngine, traffic: Traffic, peers: Peers
    ) -> None:
        """Take over `peers`; the rest is the caller's."""
        self._pool = pool
        self._host = host
        self._copier = copier
        self._traffic = traffic
        self._peers = peers
        self._is_on = True
        self._lent: dict[int, tuple[list[int], int]] = {}  # pledge and bytes, by order

    def lend(self, sequence: Sequence) -> KvHandle | None:
        """Offer it where it is on the device; None where it has to go by the host."""
        shape, used = sequence.shape, sequence.blocks[: blocks_for(sequence.cached)]
        kv_bytes = len(used) * shape.block_bytes
        lent_bytes = kv_bytes + sum(lent for _, lent in self._lent.values())
        if not self._is_on or not used or lent_bytes > MOST_LENT * self._pool.budget_bytes:
            return None
        try:
            device = self._peers.named(self._pool, shape, used)
            pledge = self._host.allocate(shape, 1)
        except DeviceError as error:
            self.stop(str(error))
            return None
        except OutOfBlocks:
            return None
        self._lent[sequence.order] = pledge, kv_bytes
        handle = offer_blocks(self._host, sequence, pledge)
        return msgspec.structs.replace(handle, kv_bytes=kv_bytes, device=device)

    def take_back(self, sequence: Sequence) -> None:
        """Have nobody keep a copy who has not taken the pledge; what was lent may be freed."""
        pledge, _ = self._lent.pop(sequence.order, ([], 0))
        if pledge:
            self._host.free(sequence.shape, pledge, offer=sequence.offer)
            sequence.offer = 0

    def has_lent(self, sequence: Sequence) -> bool:
        """Whether somebody may take its pledge."""
        return sequence.order in self._lent

    def recall(self, sequence: Sequence) -> bool:
        """As `take_back`; False where somebody has taken the pledge, and so the KV."""
        pledge, _ = self._lent[sequence.order]
        if not recall_blocks(self._host, sequence, pledge):
            return False
        del self._lent[sequence.order]
        self._host.free(sequence.shape, pledge)
        return True

    def stop(self, reason: str) -> None:
        """Lend no more: it makes no sense here."""
        if self._is_on:
            log.warning("KV goes to other instances by the host's memory: %s", reason)
        self._is_on = False

    def take(
        self,
        sequence: Sequence,
        kv: KvHandle,
        lock: threading.Lock,
        make_room: Callable[[int], object],
    ) -> Blocks:
        """Copy what others lend; return where it is: on the device or, where that is full once
        `make_room` has been called for so many blocks, on the host.

        Waits for the copy without `lock`: nobody knows of the sequence yet. Raises KvGone,
        KvUnreachable, OutOfBlocks.
        """
        shape = sequence.shape
        check_layout(self._host, shape, kv)
        pool, blocks = self._pool, list[int]()
        try:
            with self._peers.reading(shape, kv) as starts:
                make_room(len(starts))
                pool, blocks = self._room_for(shape, len(starts))
                pages = pool.pages(shape).data_ptr()
                ways = zip(blocks, starts, strict=True)
                size = shape.block_bytes
                segments = [(pages + to * shape.page_bytes, start, size) for to, start in ways]
                self._await_copy(segments, lock, pool is self._host)
            take_offered(self._host, shape, kv)
        except BaseException:
            # What came may be anything.
            pool.free(shape, blocks, is_poisoned=True)
            raise
        self._host.free(shape, kv.blocks)
        return pool, blocks

    def close(self) -> None:
        """Let go of others' memory, behind all copies. Idempotent."""
        self._peers.close()

    def _await_copy(self, segments: Segments, lock: threading.Lock, is_outward: bool) -> None:
        try:
            ticket = self._copier.submit(segments, URGENT, is_outward=is_outward)
        except CopyQueueFull as error:
            raise OutOfBlocks(f"{error}; offer the KV again") from None
        self._traffic.watch("kv_out" if is_outward else "kv_in", ticket)
        lock.release()
        try:
            ticket.wait(timeout_s=COPY_S)
            ticket.cancel()
        finally:
            lock.acquire()
        if not ticket.is_done:
            raise KvGone(f"the KV was not copied ({ticket.failure or 'in time'}); prefill again")

    def _room_for(self, shape: KvShape, count: int) -> Blocks:
        try:
            return self._pool, self._pool.allocate(shape, count)
        except OutOfBlocks:
            return self._host, self._host.allocate(shape, count)
