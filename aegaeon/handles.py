"""How one instance names KV to another one. Records of types.py, which has no room for them."""

import msgspec


class DeviceKv(msgspec.Struct, frozen=True):
    """Where KV is on `device`: in the memory of process `pid`, which another one opens by `handle`.

    That has `size_bytes`; its pages begin at `start_bytes`, and `blocks` count from there.
    """

    device: str
    pid: int
    handle: bytes
    size_bytes: int
    start_bytes: int
    blocks: tuple[int, ...]


class KvStream(msgspec.Struct, frozen=True):
    """Where the bytes of KV are to be had over TCP: at `address` (HOST:PORT), under `name`, by who
    knows `token`; both are of this offer alone."""

    address: str
    name: int
    token: bytes


class KvHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Names the KV of a sequence in the node's pool, so that another instance may adopt it.

    `blocks` of the pool `pool` (empty: nobody else's) may be taken as `owner`'s: an identity that
    the pool gave for this offer. They hold the first `cached_tokens` of the sequence and count
    `kv_bytes` in an adopter's budget. `shape` says how a block is laid out.

    `identity` names what computed all of it; empty, where nobody else may begin with it.

    With `device`, the KV is there, and `blocks` hold nothing: an adopter copies the KV and then
    takes them, which it cannot where the sender has let go of the KV meanwhile.

    With `stream`, the KV is on another node, and an adopter brings its bytes from there.
    """

    owner: int
    blocks: tuple[int, ...]
    cached_tokens: int
    kv_bytes: int = 0
    pool: str = ""
    shape: tuple[int, ...] = ()
    identity: bytes = b""
    device: DeviceKv | None = None
    stream: KvStream | None = None


class Preload(msgspec.Struct, frozen=True, tag=True):
    """To an instance: bring `model` in when there is nothing else to bring, if it fits."""

    model: str
