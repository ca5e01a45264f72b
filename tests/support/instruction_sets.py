"""The instruction sets that operators are held against: those of this processor."""

from aegaeon import _native


def available(isa: str) -> bool:
    """Whether the operators can be told to use it here."""
    try:
        _native.force_isa(isa)
    except ValueError:
        return False
    finally:
        _native.force_isa("best")
    return True


LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
ISAS = [isa for isa in LEVELS if available(isa)]
# Those that fuse products and sums give the same bits.
FUSED = [isa for isa in ISAS if isa != "baseline"]
