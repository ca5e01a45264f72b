"""A fake KV pool that several engines share, and engines over it: each step checks that their
blocks are theirs and hold what they wrote."""

from aegaeon.engine.base import NullEngine
from aegaeon.engine.exchange import Exposed, KvExchange, Room
from aegaeon.errors import KvGone, KvUnreachable, OutOfBlocks
from aegaeon.types import DeviceKv, KvHandle, Stepped, Switch


class Pool:
    """Blocks with owners and contents; a freed block is given out again at once."""

    def __init__(self) -> None:
        self.owner: dict[int, int] = {}
        self.content: dict[int, str] = {}
        self.free: list[int] = []
        self.identities = 0

    def allocate(self, owner: int, content: str) -> int:
        block = self.free.pop() if self.free else len(self.content)
        self.owner[block], self.content[block] = owner, content
        return block

    def release(self, block: int, owner: int) -> None:
        if self.owner.get(block) == owner:
            del self.owner[block]
            self.free.append(block)

    def reclaim(self, owner: int) -> None:
        for block in [b for b, held_by in self.owner.items() if held_by == owner]:
            self.release(block, owner)


class BlockBytes(KvExchange):
    """A block's content as bytes."""

    SIZE = 64

    def __init__(self, engine: "PooledEngine") -> None:
        self.engine = engine

    @classmethod
    def of(cls, content: str) -> bytes:
        return content.encode().ljust(cls.SIZE)

    def expose(self, request):
        block = self.engine.blocks.get(request)
        if block is None:
            return None
        kv = KvHandle(owner=0, blocks=(), cached_tokens=1, kv_bytes=self.SIZE)
        return Exposed(kv, [memoryview(self.of(self.engine.pool.content[block]))])

    def make_room(self, model, kv):
        if self.engine.held >= self.engine.quota:
            raise OutOfBlocks("full")
        data = bytearray(kv.kv_bytes)
        block = self.engine.pool.allocate(self.engine.identity, "room")
        return Room(data, kv, [block], [memoryview(data)])

    def free(self, room):
        for block in room.blocks:
            self.engine.pool.release(block, self.engine.identity)
        room.blocks = []


class PooledEngine(NullEngine):
    """Each sequence has one block of the pool from its first step on, at most `quota` in all.

    A step checks that the block still holds what the sequence wrote there.
    """

    def __init__(self, specs, pool: Pool, quota: int) -> None:
        super().__init__(specs, pause=lambda _: None)
        self.pool, self.quota = pool, quota
        pool.identities += 1
        self.identity = pool.identities
        self.blocks: dict[str, int] = {}
        self.is_lending = False  # KV where it is on a device
        self.is_apart = False  # from the devices of all others
        self.lent: list[str] = []
        self.bytes = BlockBytes(self)

    @property
    def held(self) -> int:
        return sum(owner == self.identity for owner in self.pool.owner.values())

    def release(self, request):
        super().release(request)
        if request in self.blocks:
            self.pool.release(self.blocks.pop(request), self.identity)

    def hand_over(self, request, by_host=False):
        device = None
        self.is_lending &= not by_host
        if self.is_lending:
            self.lent.append(request)
            device = DeviceKv("cuda:0", self.identity, b"", 0, 0, ())
        block = self.blocks[request]
        return KvHandle(owner=self.identity, blocks=(block,), cached_tokens=1, device=device)

    def resume(self, request):
        block = self.blocks.get(request)
        return block is None or self.pool.owner.get(block) == self.identity

    def adopt(self, request, kv, room=None):
        if kv.device is not None and self.is_apart:
            raise KvUnreachable("it is on another device")
        if room is not None:
            (block,) = room.blocks
            assert bytes(room.shape) == BlockBytes.of(request.id), "took another sequence's KV"
            self.submit(request)
            self.pool.content[block] = request.id
            self.blocks[request.id] = block
            return
        if self.held >= self.quota:
            raise OutOfBlocks("full")
        if not kv.blocks:
            raise KvGone("nothing came")
        (block,) = kv.blocks
        if self.pool.owner.get(block) != kv.owner:
            raise KvGone("not the sender's")
        assert self.pool.content[block] == request.id, "took another sequence's KV"
        self.submit(request)
        self.pool.owner[block] = self.identity
        self.blocks[request.id] = block

    @property
    def exchange(self):
        return self.bytes

    def execute(self, action):
        if isinstance(action, Switch):
            return super().execute(action)
        lacking = []
        for request in action.requests:
            if request not in self.blocks:
                if self.held >= self.quota:
                    lacking.append(request)
                    continue
                self.blocks[request] = self.pool.allocate(self.identity, request)
            assert self.pool.owner[self.blocks[request]] == self.identity, "lost its KV"
            assert self.pool.content[self.blocks[request]] == request, "KV was overwritten"
        able = tuple(request for request in action.requests if request not in lacking)
        outcome = super().execute(type(action)(action.model, able))
        return Stepped(action.model, outcome.tokens, 0.0, preempted=tuple(lacking))
