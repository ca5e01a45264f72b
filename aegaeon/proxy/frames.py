"""Byte strings over a stream socket, each behind its length."""

import socket

_LENGTH_BYTES = 4


def send_frame(peer: socket.socket, frame: bytes) -> None:
    """Send one, all of it. Raises OSError, TimeoutError as the socket does."""
    peer.sendall(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)


def receive_frame(peer: socket.socket, max_bytes: int) -> bytes | None:
    """Return the next one, or None when the other side has closed. Raises OSError, also for one
    that is longer than `max_bytes` or ends early."""
    head = _receive(peer, _LENGTH_BYTES)
    if not head:
        return None
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES or length > max_bytes:
        raise OSError(f"a frame of {length} bytes, {max_bytes} are allowed")
    frame = _receive(peer, length)
    if len(frame) < length:
        raise OSError(f"a frame ended after {len(frame)} of {length} bytes")
    return frame


def _receive(peer: socket.socket, count: int) -> bytes:
    """Return `count` bytes, fewer where the other side closes before."""
    parts = []
    while count > 0:
        part = peer.recv(min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
