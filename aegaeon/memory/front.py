"""What the processes in front of the instances take: supervisor, proxies and their tokenizers."""

from collections.abc import Iterable
from pathlib import Path

from aegaeon.types import ModelSpec

# Of a tokenizer's process: interpreter and libraries, and what its file becomes (measured: 3.5 MB
# of tokenizer.json are 62 MB, 11.4 MB are 149 MB).
TOKENIZER_PROCESS_BYTES = 35_000_000
TOKENIZER_GROWTH = 10
# All of a proxy's tokenizers together; those that nobody uses end for others. A larger one than
# that is alone.
TOKENIZERS_BYTES = 1_000_000_000
# What a proxy itself keeps of them, to make text of tokens (measured: a fifth of the file, and as
# much again of tokens that have come).
VOCABULARIES_BYTES = 100_000_000


def tokenizer_bytes(specs: Iterable[ModelSpec]) -> int:
    """Return what the tokenizers of `specs` take at a proxy, an estimate from their files; what
    cannot be read is told by who reads it."""
    files: dict[tuple[int, int], int] = {}
    for spec in specs:
        try:
            found = (Path(spec.path) / "tokenizer.json").stat()
        except OSError:
            if spec.tokenizer_bytes:  # it is still to come
                files[0, len(files)] = spec.tokenizer_bytes
            continue
        files[found.st_dev, found.st_ino] = found.st_size
    sizes = [TOKENIZER_PROCESS_BYTES + TOKENIZER_GROWTH * size for size in files.values()]
    held = max(min(sum(sizes), TOKENIZERS_BYTES), max(sizes, default=0))
    return held + min(sum(files.values()), VOCABULARIES_BYTES)
