"""The text sides of the served models, each read when it is first asked for, or before while there
is time and room.

Tokenizers are read in processes of their own, those that somebody waits for first. What a model
has beside is read in milliseconds.
"""

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aegaeon.errors import AegaeonError, ModelLoading
from aegaeon.memory.front import TOKENIZERS_BYTES, VOCABULARIES_BYTES
from aegaeon.models.here import Here
from aegaeon.models.token_ids import check_own_ids
from aegaeon.proxy.chat import Template
from aegaeon.proxy.encoders import Digest, Encoders, digest_of
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.specs import ModelSpec

log = logging.getLogger(__name__)

PROCESSORS_PER_READING = 4  # the others are for those who compute
MOST_READINGS = 4

_Stamp = tuple[int, int, int, int]


class Texts:
    """One event loop owns it, until `close`."""

    def __init__(
        self,
        make_template: Callable[[str, dict[str, str]], Template],
        most_bytes: int = TOKENIZERS_BYTES,
        here: Here | None = None,
    ) -> None:
        """Tokenizers in use may take `most_bytes`. Of a cluster, `here` knows where this node has
        them."""
        self._here = here
        self._make_template = make_template
        self._encoders = Encoders(most_bytes)
        # By path, the least recently used first.
        self._models: OrderedDict[str, tuple[Digest, TextModel]] = OrderedDict()
        self._reading: dict[str, asyncio.Task[TextModel]] = {}
        self._digests: dict[_Stamp, Digest] = {}
        lanes = max(1, min(MOST_READINGS, (os.cpu_count() or 1) // PROCESSORS_PER_READING))
        self._asked = asyncio.Semaphore(lanes)
        self._waiting = 0  # who wants a tokenizer now
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._threads = ThreadPoolExecutor(lanes + 1, "aegaeon-texts")
        self._warming: asyncio.Task[None] | None = None

    def has(self, spec: ModelSpec) -> bool:
        """Whether `get` would answer at once."""
        local = self._local(spec)
        known = None if local is None else self._models.get(local.path)
        return known is not None and self._encoders.has(known[0])

    async def get(self, spec: ModelSpec) -> TextModel:
        """Return the text side of `spec`, whose tokenizer is at hand. Whoever waits for the same
        one waits for one reading. Raises CheckpointError, Overloaded, ModelLoading."""
        local = self._local(spec)
        if local is None:
            raise ModelLoading(
                f"the tokenizer of {spec.id!r} is still on its way to this node of the cluster; "
                "try again later, `aegaeon status` tells how it goes"
            )
        spec = local
        if self.has(spec):
            self._models.move_to_end(spec.path)
            return self._models[spec.path][1]
        self._waiting += 1
        self._quiet.clear()
        try:
            # Shielded: the reading is shared by all who wait, and one of them may go away.
            return await asyncio.shield(self._task(spec, is_asked=True))
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._quiet.set()

    def follow(self, specs: Iterable[ModelSpec]) -> None:
        """Go by these models from here on, and read them while nobody waits for another, as far
        as there is room."""
        specs = tuple(local for spec in specs if (local := self._local(spec)) is not None)
        paths = {spec.path for spec in specs}
        for gone in self._models.keys() - paths:
            del self._models[gone]
        self._encoders.keep({digest for digest, _ in self._models.values()} | self._coming())
        if self._warming is not None:
            self._warming.cancel()
        self._warming = asyncio.create_task(self._warm(specs), name="aegaeon-texts")

    async def close(self) -> None:
        """End what reads and what tokenises."""
        tasks = [*self._reading.values(), *([self._warming] if self._warming else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._encoders.close)
        await asyncio.to_thread(self._threads.shutdown)

    def _local(self, spec: ModelSpec) -> ModelSpec | None:
        """Return `spec` with the place of its tokenizer here; None while it has not come."""
        return spec if self._here is None else self._here.for_text(spec)

    async def _warm(self, specs: tuple[ModelSpec, ...]) -> None:
        for spec in specs:
            if spec.path in self._models:
                continue
            await self._quiet.wait()
            if not self._encoders.has_room():
                return
            with contextlib.suppress(AegaeonError):  # who asks for it is told
                await asyncio.shield(self._task(spec, is_asked=False))

    def _coming(self) -> set[Digest]:
        """What is being read is kept, whatever it turns out to be."""
        return set(self._digests.values()) if self._reading else set()

    def _task(self, spec: ModelSpec, is_asked: bool) -> "asyncio.Task[TextModel]":
        task = self._reading.get(spec.path)
        if task is None:
            task = asyncio.create_task(self._read(spec, is_asked))
            self._reading[spec.path] = task
            task.add_done_callback(lambda done: self._ended(spec.path, done))
        return task

    def _ended(self, path: str, task: "asyncio.Task[TextModel]") -> None:
        self._reading.pop(path, None)
        if not task.cancelled() and task.exception() is not None:
            log.warning("text side not read path=%s error=%s", path, task.exception())

    async def _read(self, spec: ModelSpec, is_asked: bool) -> TextModel:
        file = Path(spec.path) / "tokenizer.json"
        digest = await self._digest(file)
        run = asyncio.get_running_loop().run_in_executor
        is_slow = not self._encoders.has(digest)
        async with self._asked if is_asked and is_slow else contextlib.nullcontext():
            encoder = await run(self._threads, self._encoders.open, file, digest)
        check_own_ids(encoder.decoding.vocabulary.own_end, spec.vocab_tokens, spec.path)
        known = self._models.pop(spec.path, None)
        if known is not None and known[0] == digest:
            model = known[1]
        else:
            model = await asyncio.to_thread(TextModel, spec.path, self._make_template, encoder)
        self._models[spec.path] = digest, model
        self._make_room()
        return model

    async def _digest(self, file: Path) -> Digest:
        """Return what the file's content is known by; read once for each version of it."""
        try:
            found = await asyncio.to_thread(file.stat)
        except OSError:
            return await asyncio.to_thread(digest_of, file)  # which says what is wrong
        stamp = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        digest = self._digests.get(stamp)
        if digest is None:
            digest = self._digests[stamp] = await asyncio.to_thread(digest_of, file)
        return digest

    def _make_room(self) -> None:
        """Let go of vocabularies that nobody has used in a while, where they are too many."""
        sizes = {digest: model.vocabulary.held_bytes for digest, model in self._models.values()}
        while sum(sizes.values()) > VOCABULARIES_BYTES and len(sizes) > 1:
            _, (digest, _) = self._models.popitem(last=False)
            if all(known != digest for known, _ in self._models.values()):
                del sizes[digest]
