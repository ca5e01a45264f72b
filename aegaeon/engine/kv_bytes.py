"""Keys and values as bytes: read from sequences here, and brought to blocks of the node's pool for
sequences to come."""

import threading
from collections.abc import Mapping

from aegaeon.engine.exchange import Exposed, KvExchange, Room
from aegaeon.engine.kv_place import KvPlace, layout_of
from aegaeon.engine.sequences import SequenceTable
from aegaeon.errors import KvGone
from aegaeon.memory.kv import KvShape, blocks_for
from aegaeon.types import KvHandle, ModelId, RequestId


class KvBytes(KvExchange):
    """Of one engine, whose `lock` is over all that it touches."""

    def __init__(
        self,
        sequences: SequenceTable,
        place: KvPlace,
        shapes: Mapping[ModelId, KvShape],
        lock: threading.Lock,
    ) -> None:
        """Nothing is taken over."""
        self._sequences = sequences
        self._place = place
        self._shapes = shapes
        self._lock = lock

    def expose(self, request: RequestId) -> Exposed | None:
        """See KvExchange."""
        with self._lock:
            sequence = self._sequences.find(request)
            blocks = [] if sequence is None else self._place.expose(sequence)
            if sequence is None or not blocks:
                return None
            shape = sequence.shape
            kv = KvHandle(
                owner=0,
                blocks=(),
                cached_tokens=sequence.cached,
                kv_bytes=len(blocks) * shape.block_bytes,
                shape=layout_of(shape),
                identity=sequence.sound_identity,
            )
            return Exposed(kv, self._place.shared.bytes_of(shape, blocks))

    def make_room(self, model: ModelId, kv: KvHandle) -> Room:
        """See KvExchange."""
        shape, pool = self._shapes.get(model), self._place.shared
        if shape is None or kv.shape != layout_of(shape):
            raise KvGone("the KV is of another layout than here; prefill again")
        count = blocks_for(kv.cached_tokens)
        most = pool.capacity_blocks(shape)
        if not 0 < count <= most or kv.kv_bytes != count * shape.block_bytes:
            raise KvGone(
                f"{kv.kv_bytes} bytes do not hold the KV of {kv.cached_tokens} tokens, or {most} "
                "blocks cannot; prefill again"
            )
        blocks = pool.allocate(shape, count)
        return Room(shape, kv, blocks, pool.bytes_of(shape, blocks))

    def free(self, room: Room) -> None:
        """See KvExchange."""
        assert isinstance(room.shape, KvShape)
        blocks, room.blocks = room.blocks, []
        self._place.shared.free(room.shape, blocks, is_poisoned=True)
