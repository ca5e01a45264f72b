"""Which instances of a node compute at this moment (csrc/ops/cpu/neighbours.h): the supervisor's
part, for those that died."""

from pathlib import Path

from aegaeon import _native


def clear_seat(path: str, seat: int) -> None:
    """Count whoever died at `seat` of the region `path` no more among those that compute: the
    others have its processors until its successor begins. Nothing where there is no region. Raises
    RegionError, RegionMismatch."""
    if path and Path(path).exists():
        _native.ThreadPool(1, path, seat)  # who takes a seat clears it, and who leaves it, too
