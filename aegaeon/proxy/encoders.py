"""Text to token ids: in this process, or in one of the tokenizer's own.

`Encoders` starts and ends those processes, one for each content of a tokenizer.json.
"""

import contextlib
import hashlib
import logging
import queue
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from aegaeon.config import child_environment
from aegaeon.errors import CheckpointError, Overloaded
from aegaeon.proxy.detokenize import ByteLevelVocabulary
from aegaeon.proxy.frames import receive_frame, send_frame
from aegaeon.proxy.tokenizer_worker import MAX_FRAME_BYTES, Encode, Read, Unreadable, ids_of
from aegaeon.proxy.vocabulary import Vocabulary, decoder_part, read_tokenizer, tokens_of

log = logging.getLogger(__name__)

READ_S = 120.0  # for a tokenizer to be read: a hundred times what a large one takes
ANSWER_S = 60.0  # for a text
CONNECTIONS = 4  # texts at a time of one tokenizer; the others wait
# One that is read in some ten milliseconds is read here: a process takes longer to start.
SMALL_BYTES = 128 << 10
ENDED_S = 5.0  # for a killed process to be gone

Digest = bytes


class Decoding:
    """What makes text of token ids, with what it has worked out so far."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.byte_level = ByteLevelVocabulary(vocabulary) if vocabulary.is_byte_level else None


class Encoder(ABC):
    """What makes token ids of text, and knows the way back. Any thread may call it."""

    decoding: Decoding

    @abstractmethod
    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the ids of `text`. Raises CheckpointError, Overloaded."""


class LocalEncoder(Encoder):
    """A tokenizer in this process."""

    def __init__(self, file: Path) -> None:
        """Takes a second. Raises CheckpointError."""
        self._tokenizer = read_tokenizer(file)
        self.decoding = Decoding(Vocabulary(tokens_of(self._tokenizer, decoder_part(file))))

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(ids_of(self._tokenizer, Encode(text, add_special_tokens)))


class _Process:
    """A tokenizer's process."""

    def __init__(self, file: Path) -> None:
        """Start it, and read what it knows. Raises CheckpointError, Overloaded."""
        pairs = [socket.socketpair() for _ in range(CONNECTIONS)]
        self._peers = [ours for ours, _ in pairs]
        self._idle: queue.LifoQueue[socket.socket] = queue.LifoQueue()
        for peer in self._peers:
            self._idle.put(peer)
        self._has_ended = False
        theirs = [peer for _, peer in pairs]
        descriptors = [peer.fileno() for peer in theirs]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __package__ + ".tokenizer_worker", str(file)]
                + [str(descriptor) for descriptor in descriptors],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=child_environment({"RUST_BACKTRACE": "0"}),
            )
        except OSError as error:
            self._close_idle()
            raise Overloaded(f"no process could be started ({error.strerror})") from None
        finally:
            for peer in theirs:
                peer.close()
        try:
            told = self._told()
        except BaseException:
            self.end()
            raise
        self.tokens, self.resident_bytes = told.tokens, told.resident_bytes
        for peer in self._peers:
            peer.settimeout(ANSWER_S)

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return not self._has_ended and self._process.poll() is None

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """See Encoder. Raises Overloaded, also where the process ended; then it lives no more."""
        asked = msgspec.msgpack.encode(Encode(text, add_special_tokens))
        try:
            peer = self._idle.get(timeout=ANSWER_S)
        except queue.Empty:
            raise Overloaded("too many prompts are being tokenised; ask again later") from None
        try:
            send_frame(peer, asked)
            answer = receive_frame(peer, MAX_FRAME_BYTES)
        except OSError as error:
            log.warning("tokenizer lost pid=%d error=%s", self._process.pid, error)
            answer = None
        finally:
            self._give_back(peer)
        if answer is None:
            self.end()
            raise Overloaded("the tokenizer's process ended; ask again")
        return tuple(array("I", answer))

    def end(self) -> None:
        """End and reap it. Idempotent."""
        self._has_ended = True
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer wakes
        self._close_idle()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDED_S)

    def _give_back(self, peer: socket.socket) -> None:
        self._idle.put(peer)
        if self._has_ended:  # perhaps just now: who has used the last one closes it
            self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _told(self) -> Read:
        first = self._peers[0]
        first.settimeout(READ_S)
        decoder: msgspec.msgpack.Decoder[Read | Unreadable] = msgspec.msgpack.Decoder(
            Read | Unreadable
        )
        try:
            frame = receive_frame(first, MAX_FRAME_BYTES)
        except OSError as error:
            raise Overloaded(f"the tokenizer was not read ({error}); ask again") from None
        if frame is None:
            raise Overloaded("the process that reads the tokenizer ended; ask again")
        told = decoder.decode(frame)
        if isinstance(told, Unreadable):
            raise CheckpointError(told.message)
        return told


class Encoders:
    """The tokenizers in use, each in a process while it is, within `most_bytes` of memory: the
    least recently used ends for another. Any thread may call any verb."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._processes: OrderedDict[Digest, _Process] = OrderedDict()
        self._reading: dict[Digest, threading.Lock] = {}
        # As long as a model or an answer has them.
        self._small: WeakValueDictionary[Digest, LocalEncoder] = WeakValueDictionary()
        self._decodings: WeakValueDictionary[Digest, Decoding] = WeakValueDictionary()
        self._is_closed = False

    @property
    def held_bytes(self) -> int:
        """What the processes had in memory when their tokenizers were read."""
        with self._lock:
            return sum(process.resident_bytes for process in self._processes.values())

    def has(self, digest: Digest) -> bool:
        """Whether it is at hand."""
        with self._lock:
            if digest in self._small:
                return True
            process = self._processes.get(digest)
            return process is not None and process.lives

    def has_room(self) -> bool:
        """Whether one more of the largest would end no other."""
        with self._lock:
            sizes = [process.resident_bytes for process in self._processes.values()]
        return sum(sizes) + max(sizes, default=0) <= self._most_bytes

    def open(self, file: Path, digest: Digest) -> Encoder:
        """Return the tokenizer in `file`, whose content is `digest`'s; takes a second unless a
        process has it. Raises CheckpointError, Overloaded."""
        if file.stat().st_size <= SMALL_BYTES:
            return self._local(file, digest)
        process = self._take(file, digest)
        with self._lock:
            decoding = self._decodings.get(digest)
            if decoding is None:
                decoding = self._decodings[digest] = Decoding(Vocabulary(process.tokens))
        return ProcessEncoder(self, file, digest, decoding)

    def encode(self, file: Path, digest: Digest, encode: Encode) -> tuple[int, ...]:
        """Return the ids of a text. Raises as `open`."""
        process = self._take(file, digest)
        try:
            return process.encode(encode.text, encode.add_special_tokens)
        except Overloaded:
            if process.lives:
                raise
        # Another one may do: it ended for the room of others, or by somebody's hand.
        return self._take(file, digest).encode(encode.text, encode.add_special_tokens)

    def keep(self, digests: set[Digest]) -> None:
        """End all but these."""
        with self._lock:
            gone = [self._processes.pop(one) for one in self._processes.keys() - digests]
        for process in gone:
            process.end()

    def close(self) -> None:
        """End all. Idempotent."""
        with self._lock:
            self._is_closed = True
        self.keep(set())

    def _local(self, file: Path, digest: Digest) -> Encoder:
        with self._lock:
            encoder = self._small.get(digest)
        if encoder is None:
            encoder = LocalEncoder(file)
            with self._lock:
                self._small[digest] = encoder
        return encoder

    def _take(self, file: Path, digest: Digest) -> _Process:
        process = self._known(digest)
        if process is not None:
            return process
        with self._lock:
            reading = self._reading.setdefault(digest, threading.Lock())
        with reading:  # one of those who want it reads
            process = self._known(digest)
            if process is None:
                process = self._enter(digest, _Process(file))
        with self._lock:
            self._reading.pop(digest, None)
        return process

    def _known(self, digest: Digest) -> _Process | None:
        with self._lock:
            if self._is_closed:
                raise Overloaded("the server is stopping; ask again later")
            process = self._processes.get(digest)
            if process is None:
                return None
            if process.lives:
                self._processes.move_to_end(digest)
                return process
            del self._processes[digest]
        process.end()
        return None

    def _enter(self, digest: Digest, process: _Process) -> _Process:
        gone = []
        with self._lock:
            if self._is_closed:
                gone = [process]
            else:
                self._processes[digest] = process
                held = sum(one.resident_bytes for one in self._processes.values())
                while held > self._most_bytes and len(self._processes) > 1:
                    _, oldest = self._processes.popitem(last=False)
                    held -= oldest.resident_bytes
                    gone.append(oldest)
        for one in gone:
            one.end()
        if process in gone:
            raise Overloaded("the server is stopping; ask again later")
        log.info("tokenizer read bytes=%d ended=%d", process.resident_bytes, len(gone))
        return process


class ProcessEncoder(Encoder):
    """A tokenizer of `encoders`, which is read again where it had to go meanwhile."""

    def __init__(self, encoders: Encoders, file: Path, digest: Digest, decoding: Decoding) -> None:
        self.decoding = decoding
        self._encoders = encoders
        self._file = file
        self._digest = digest

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return self._encoders.encode(self._file, self._digest, Encode(text, add_special_tokens))


def digest_of(file: Path) -> Digest:
    """Return what is the same for files of the same content. Raises CheckpointError."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "blake2b").digest()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; fetch or import the model again"
        ) from None
