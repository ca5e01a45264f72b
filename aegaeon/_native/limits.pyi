"""What processor and memory do at most, for benchmarks (csrc/ops/limits.h)."""

from aegaeon._native.ops import ThreadPool

def read_words(pool: ThreadPool, address: int, size_bytes: int) -> int:
    """Read memory once, each thread a range of its own; return the sum of its 8-byte words."""

def multiply_add(pool: ThreadPool, rounds: int) -> int:
    """Multiply and add in registers on each thread; return the floating-point operations done."""

def multiply_add_pairs(pool: ThreadPool, rounds: int) -> int:
    """The same with products of pairs of bfloat16, where the instructions in use have them."""

def fork_join(pool: ThreadPool, rounds: int) -> None:
    """Have all of the pool's threads meet, `rounds` times."""
