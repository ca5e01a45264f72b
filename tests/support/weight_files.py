"""Files with tensors in them, and the jobs that load them; what ends up where, said by numpy."""

from pathlib import Path

import numpy as np

from aegaeon import _native
from tests.support.int8_tiles import int8_tiles

ROWS, TILES, QUANTIZED_TILES = 0, 1, 2
NO_CONVERSION, FROM_BF16, FROM_F16 = 0, 1, 2
TILE_ROWS = 32
KEY = b"k" * 32


def key(number: int) -> bytes:
    """Return the key of the model `number`."""
    return number.to_bytes(32, "little")


def tiles(matrix: np.ndarray) -> np.ndarray:
    """Return [ceil(rows / 32)][columns][32] of a [rows][columns] matrix, padded with zeros."""
    rows, columns = matrix.shape
    count = -(-rows // TILE_ROWS)
    padded = np.zeros((count * TILE_ROWS, columns), matrix.dtype)
    padded[:rows] = matrix
    return padded.reshape(count, TILE_ROWS, columns).transpose(0, 2, 1)


def planned(path: Path) -> tuple[str, int, int, int]:
    """Name the file as it is now, or none."""
    if not path.exists():
        return str(path), 0, 0, 0
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, status.st_ino


class Plan:
    """Tensors laid into one file and one model, each a stage of its own unless told otherwise."""

    def __init__(self, path: Path, before: int = 0) -> None:
        self.path = path
        self._jobs: list[tuple[int, ...]] = []
        self.wanted: list[tuple[int, np.ndarray]] = []
        self.size_bytes = 0
        self.stages = 0
        self._content = [b"h" * before]

    def add(self, matrix, layout=ROWS, convert=NO_CONVERSION, stage=None) -> None:
        """Append a 2-D array; with a conversion, it holds the 16-bit patterns as uint16."""
        stage = self.stages if stage is None else stage
        rows, columns = matrix.shape
        wanted = converted(matrix, convert)
        if layout == TILES:
            wanted = tiles(wanted)
        elif layout == QUANTIZED_TILES:
            wanted = int8_tiles(wanted)
        offset = sum(map(len, self._content))
        self._jobs.append(
            (
                offset, matrix.nbytes, rows, columns * matrix.itemsize,
                matrix.itemsize, layout, self.size_bytes, stage, convert,
            )
        )  # fmt: skip
        self.wanted.append((self.size_bytes, wanted))
        self._content.append(matrix.tobytes())
        self.size_bytes += -(-wanted.nbytes // 64) * 64
        self.stages = stage + 1

    @property
    def jobs(self) -> "list[_native.LoadJob]":
        """The loads of all tensors from the file as it is now."""
        return [(planned(self.path), *job) for job in self._jobs]

    def write(self) -> "Plan":
        """Make the file."""
        self.path.write_bytes(b"".join(self._content))
        return self

    def acquire(self, cache, number=0, timeout_s=5.0) -> _native.CachedModel:
        """Acquire the model under the key `number`."""
        return cache.acquire(
            key(number), f"model {number}", self.size_bytes, self.stages, timeout_s
        )

    def check(self, model) -> None:
        """Hold what the model has in memory against what numpy says."""
        memory = np.frombuffer(model, np.uint8)
        for offset, wanted in self.wanted:
            got = memory[offset : offset + wanted.nbytes].view(wanted.dtype).reshape(wanted.shape)
            assert np.array_equal(got.view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))


def converted(matrix: np.ndarray, convert: int) -> np.ndarray:
    match convert:
        case 1:
            return (matrix.astype(np.uint32) << 16).view(np.float32)
        case 2:
            return matrix.view(np.float16).astype(np.float32)
    return matrix


def plain(path: Path, stages: int = 4, stage_bytes: int = 1 << 16, seed: int = 0) -> Plan:
    """Return a written plan of random bytes in equal stages."""
    plan = Plan(path)
    rng = np.random.default_rng(seed)
    for _ in range(stages):
        plan.add(rng.integers(0, 256, (1, stage_bytes), np.uint8))
    return plan.write()
