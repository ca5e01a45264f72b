"""The process of one tokenizer: `-m aegaeon.proxy.tokenizer_worker FILE FD FD...`.

Reading a tokenizer holds an interpreter's lock for a second, in which a proxy would serve nobody.
Each descriptor is a connection with a thread of its own. The first answer on the first one says
what the vocabulary is.
"""

import os
import resource
import signal
import socket
import sys
import threading
from array import array
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from aegaeon.errors import CheckpointError
from aegaeon.memory.machine import resident_bytes
from aegaeon.proxy.frames import receive_frame, send_frame
from aegaeon.proxy.vocabulary import Tokens, decoder_part, read_tokenizer, tokens_of

MAX_FRAME_BYTES = 1 << 30


class Read(msgspec.Struct, frozen=True, tag=True):
    """The tokenizer was read; the process has `resident_bytes` in memory."""

    tokens: Tokens
    resident_bytes: int


class Unreadable(msgspec.Struct, frozen=True, tag=True):
    """It cannot be read, and why."""

    message: str


class Encode(msgspec.Struct, frozen=True):
    """Tokenise `text`, with the special tokens that the tokenizer adds by itself or without."""

    text: str
    add_special_tokens: bool


def read(file: Path) -> tuple[Tokenizer | None, Read | Unreadable]:
    """Read a tokenizer, and what is told of it."""
    try:
        tokenizer = read_tokenizer(file)
        tokens = tokens_of(tokenizer, decoder_part(file))
    except (CheckpointError, OSError, msgspec.MsgspecError) as error:
        return None, Unreadable(str(error))
    return tokenizer, Read(tokens, resident_bytes())


def ids_of(tokenizer: Tokenizer, asked: Encode) -> "array[int]":
    """Return the ids of a text."""
    # Without offsets, which nobody needs, it is three times as fast.
    (encoded,) = tokenizer.encode_batch_fast(
        [asked.text], add_special_tokens=asked.add_special_tokens
    )
    return array("I", encoded.ids)


def _serve(peer: socket.socket, tokenizer: Tokenizer) -> None:
    decoder = msgspec.msgpack.Decoder(Encode)
    while (frame := receive_frame(peer, MAX_FRAME_BYTES)) is not None:
        send_frame(peer, ids_of(tokenizer, decoder.decode(frame)).tobytes())


def main() -> int:
    """Read, then tokenise until the other side closes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ctrl-C at a terminal is for the server, which closes our sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    peers = [socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[2:]]
    tokenizer, told = read(Path(sys.argv[1]))
    try:
        send_frame(peers[0], msgspec.msgpack.encode(told))
        if tokenizer is None:
            return 1
        threads = [threading.Thread(target=_serve, args=(peer, tokenizer)) for peer in peers[1:]]
        for thread in threads:
            thread.daemon = True  # the first connection is the last to be closed
            thread.start()
        _serve(peers[0], tokenizer)
    except OSError:
        return 0  # nobody waits for it any more
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads may be at work for nobody
