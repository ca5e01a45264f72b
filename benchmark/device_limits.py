"""A CUDA device for benchmarks: whether it is there, and what torch gets out of it at most."""

import argparse
from collections.abc import Callable
from statistics import median

import torch

from aegaeon import _native
from aegaeon.config import DEVICE
from aegaeon.device.products import check_torch
from aegaeon.errors import AegaeonError
from aegaeon.memory.budget import GB
from benchmark.cuda_copies import torch_seconds
from benchmark.limits import Limits, Pace, alternate
from benchmark.report_rows import Row

COPIED_BYTES = 1 << 30
WIDTH = 8192  # of the products
LINK_BYTES, LINK_RUNS = 1 << 30, 5


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add --device, as the server has it."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0 and so on (default: cpu)")


def check_device(name: str) -> None:
    """Return if `name` can be computed on. Raises SystemExit with the line that `aegaeon serve`
    says where it is none, or is not there."""
    if name == "cpu":
        return
    found = DEVICE.fullmatch(name)
    if found is None or found["number"] is None:
        raise SystemExit(f"--device is cpu or cuda:N, not {name}")
    try:
        _native.cuda_total_bytes(int(found["number"]))
        check_torch()
    except AegaeonError as error:
        raise SystemExit(f"aegaeon: error: {' '.join(str(error).split())}") from None


class DeviceProbe:
    """Measures a device's limits by torch, as LimitProbe does the processor's: memory by a copy
    within the device, which reads and writes, multiply-adds by the product of two large squares.
    The best look counts."""

    def __init__(self, device: torch.device, pace: Pace, size: int = COPIED_BYTES) -> None:
        """Look a first time, with so many bytes to copy. Raises torch's errors."""
        self._device, self._pace = device, pace
        self._from = torch.zeros(size, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        width = min(WIDTH, int(size**0.5) // 4)
        self._squares = {
            dtype: torch.rand((width, width), device=device).to(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        self._flops = 2.0 * width**3
        self._best = Limits(0.0, 0.0, 0.0)
        self.look()

    @property
    def size_bytes(self) -> int:
        """What a `read` moves: each byte is read and written."""
        return 2 * self._from.nbytes

    def read(self) -> None:
        """Copy once."""
        self._to.copy_(self._from)
        self._await()

    def look(self) -> None:
        """Measure once more."""
        ways: dict[str, Callable[[], object]] = {
            "copy": self.read,
            "float32": lambda: self._multiply(torch.float32),
            "bfloat16": lambda: self._multiply(torch.bfloat16),
        }
        seconds = alternate(ways, self._pace)
        self._best = Limits(
            max(self._best.read_gb_per_s, self.size_bytes / seconds["copy"] / GB),
            max(self._best.gflop_per_s, self._flops / seconds["float32"] / 1e9),
            max(self._best.pair_gflop_per_s, self._flops / seconds["bfloat16"] / 1e9),
        )

    def limits(self) -> Limits:
        """Look a last time and return the best."""
        self.look()
        return self._best

    def rows(self) -> list[Row]:
        """Return the limits as rows."""
        width = len(self._squares[torch.float32])
        by = f"by torch {torch.__version__} on {self._device}"
        product = f"of {width} x {width}, {by}"
        best = self._best
        return [
            Row(
                case=f"limit: a copy, read and written, {by}", unit="GB/s", ours=best.read_gb_per_s
            ),
            Row(case=f"limit: float32 product {product}", unit="GFLOP/s", ours=best.gflop_per_s),
            Row(case=f"limit: bf16 product {product}", unit="GFLOP/s", ours=best.pair_gflop_per_s),
        ]

    def _multiply(self, dtype: torch.dtype) -> None:
        torch.mm(self._squares[dtype], self._squares[dtype])
        self._await()

    def _await(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def link_gb_per_s(number: int, size_bytes: int = LINK_BYTES) -> float:
    """Return what torch's copies of page-locked memory to cuda:`number` make of its link."""
    copy_in = torch_seconds(number, size_bytes)[False]
    copy_in()
    return size_bytes / GB / median(copy_in() for _ in range(LINK_RUNS))
