#!/usr/bin/env python3
"""Copies to and from a CUDA device: from page-locked memory and through the stage, against torch's
own copy of page-locked memory."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from aegaeon import _native
from aegaeon.errors import AegaeonError
from aegaeon.memory.arena import Arena
from aegaeon.memory.budget import CUDA_CHUNK_BYTES
from benchmark.report_rows import Aim, Row, measured, progress, publish

PEER = "torch, page-locked"
PATIENCE_S = 60.0


class Link:
    """A device's memory, as much in the host, and an engine between them."""

    def __init__(self, number: int, size_bytes: int) -> None:
        """Raises DeviceError, CopyError, BudgetTooSmall."""
        self.host = Arena(size_bytes)
        self.size_bytes = self.host.capacity_bytes
        self.device = _native.CudaDevice(number)
        self.memory = self.device.allocate(self.size_bytes)
        self.engine = self.device.copy_engine(CUDA_CHUNK_BYTES)

    def seconds(self, is_outward: bool) -> float:
        """Copy everything once; return what it took."""
        ends = self.memory.address, self.host.address
        to, start = reversed(ends) if is_outward else ends
        began = time.perf_counter()
        ticket = self.engine.submit([(to, start, self.size_bytes)], is_outward=is_outward)
        if not ticket.wait(timeout_s=PATIENCE_S):
            raise SystemExit(f"a copy failed: {ticket.failure or 'it took too long'}")
        return time.perf_counter() - began


def torch_seconds(number: int, size_bytes: int) -> dict[bool, Callable[[], float]]:
    """Return ways to time torch's copies, by whether they go out; none where it has no CUDA."""
    if not torch.cuda.is_available():
        return {}
    host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(size_bytes, dtype=torch.uint8, device=f"cuda:{number}")

    def timed(to: torch.Tensor, start: torch.Tensor) -> float:
        torch.cuda.synchronize(number)
        began = time.perf_counter()
        to.copy_(start, non_blocking=True)
        torch.cuda.synchronize(number)
        return time.perf_counter() - began

    return {False: lambda: timed(device, host), True: lambda: timed(host, device)}


def measure(link: Link, repeats: int) -> list[Row]:
    """GB/s of long copies, ours and torch's in turn; first through the stage, then page-locked."""
    peers = torch_seconds(link.device.number, link.size_bytes)
    rows = []
    for how in ("through the stage", "page-locked"):
        progress(how)
        if how == "page-locked":
            refusal = link.device.pin(link.host.address, link.size_bytes)
            if refusal:
                raise SystemExit(f"the system locks no memory: {refusal}")
        for way, is_outward in (("in", False), ("out", True)):
            taken, others = [], []
            for _ in range(repeats):
                taken.append(link.seconds(is_outward))
                others += [peers[is_outward]()] if peers else []
            ours = link.size_bytes / median(taken) / 1e9
            peer = link.size_bytes / median(others) / 1e9 if others else None
            row = Row(
                case=f"{way}, {how}",
                unit="GB/s",
                ours=ours,
                peer=PEER if peer else None,
                peer_value=peer,
            )
            aim = Aim("ratio_to_peer", 0.95, "within 5 %") if how == "page-locked" else None
            rows.append(measured(row, aim if peer else None))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, a second")
    parser.add_argument("--repeats", type=int, default=11, help="runs of each")
    parser.add_argument("--number", type=int, default=0, metavar="N", help="of cuda:N (default: 0)")
    options = parser.parse_args(arguments)
    repeats, size_bytes = (2, 16 << 20) if options.quick else (options.repeats, 1 << 30)
    try:
        link = Link(options.number, size_bytes)
    except AegaeonError as error:
        raise SystemExit(str(error)) from None
    rows = measure(link, repeats)
    link.engine.close()
    link.device.unpin(link.host.address)
    publish(f"copies to and from cuda:{options.number}", rows, options.json)


if __name__ == "__main__":
    main()
