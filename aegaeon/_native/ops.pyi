"""What a forward pass is made of (csrc/ops)."""

from collections.abc import Sequence
from typing import final

@final
class ThreadPool:
    """Threads that the operators below share out their work to; each call returns when it is done.

    Calls from several threads take turns. Idle threads sleep; they end with the object.
    """

    def __init__(self, threads: int, neighbours: str = "", seat: int = 0) -> None:
        """Start `threads` - 1 threads: the caller of an operator is one more.

        Pools of several processes that join at the path `neighbours`, each at a `seat` of its own,
        share their threads out among those in which a step runs: each has its part of `threads`.
        Raises RuntimeError when the system does not give as many, RegionError, RegionMismatch.
        """

    @property
    def threads(self) -> int:
        """Threads that compute, the caller among them."""

# Operators take addresses of float32 rows, one after another, and write to `out`, which must not
# overlap. A row's bits depend on that row alone. Weights are (address, out_features, type): tiles
# as in aegaeon.device.packed, 64-byte aligned; type 0 is float32, 1 bfloat16, 2 float16, 3 int8.

def linear(
    pool: ThreadPool,
    x: int,
    shape: tuple[int, int],
    parts: tuple[tuple[int, int, int, int], ...],
    out: int,
    residual: int = 0,
) -> None:
    """Multiply x of `shape` (rows, in_features) with `parts`: weights and an address of biases
    (or 0) each. `out` is [rows, sum of out_features], and so is `residual` (or 0), which is added
    last. Raises ValueError for malformed parts and no in_features."""

def gated(
    pool: ThreadPool,
    x: int,
    shape: tuple[int, int],
    parts: tuple[tuple[int, int, int, int], ...],
    out: int,
) -> None:
    """Multiply as `linear` does with two parts of as many outputs, and write
    silu(first) * second to `out`, [rows, outputs of one]. Raises ValueError for other parts."""

def embed(
    pool: ThreadPool,
    token_ids: int,
    shape: tuple[int, int],
    table: tuple[int, int, int],
    out: int,
) -> None:
    """Write the rows of `table` of int64 `token_ids` to `out` of `shape` (rows, in_features).

    Raises IndexError for an id outside the table.
    """

def rms_norm(
    pool: ThreadPool,
    x: tuple[int, int],
    shape: tuple[int, int, int],
    weight: int,
    eps: float,
    out: int,
) -> None:
    """Norm x, (address, row stride), of `shape` (rows, heads, features), each head by itself:
    x / sqrt(mean(x^2) + eps) * weight."""

def rotate(
    pool: ThreadPool,
    x: tuple[int, int],
    shape: tuple[int, int, int],
    angles: tuple[int, int],
    out: int,
) -> None:
    """Rotate half-split pairs of x, (address, row stride), of `shape` (rows, heads, head_dim).

    `angles` are the addresses of cos and sin [rows, head_dim]. Raises ValueError for odd head_dim.
    """

@final
class PagedRows:
    """Where the rows of a pass put and find their keys and values. Does not keep the pages."""

    def __init__(
        self,
        pages: tuple[int, int, int],
        shape: tuple[int, int, int],
        sequences: Sequence[tuple[int, int, int, tuple[int, ...]]],
    ) -> None:
        """Take the arena's address, count of pages and their type (0: float32, 1: bfloat16, 2:
        float16, which only CUDA computes with), the (layers, kv_heads, head_dim) of a token, and
        per sequence its first row, rows, first position and block ids.

        Raises ValueError for blocks outside the arena, or too few of them, an empty shape and
        another type.
        """

def append_kv(
    pool: ThreadPool,
    rows: PagedRows,
    layer: int,
    count: int,
    keys: tuple[int, int],
    values: tuple[int, int],
) -> None:
    """Store keys and values, (address, row stride) each, of `count` rows [kv_heads, head_dim].

    Raises IndexError for a layer that the pages do not have, and ValueError for fewer rows than the
    sequences have and for a type that is CUDA's only, as `attend` does.
    """

def attend(
    pool: ThreadPool,
    rows: PagedRows,
    layer: int,
    queries: tuple[int, int, int],
    scale: float,
    out: int,
) -> None:
    """Causal attention of queries, (address, rows, heads), to `out`: [rows, heads, head_dim] both.

    Raises ValueError where the heads are no multiple of the KV heads.
    """

@final
class Workspace:
    """Memory for the activations of one step at a time, as large as any of them needed it."""

    def __init__(self) -> None: ...
    @property
    def bytes(self) -> int:
        """What it has come to."""

@final
class StepPlan:
    """A model's step, recorded operator by operator, then run for any rows without Python.

    Operands are (slot, first column, columns); a verb returns the slot that its operator makes, of
    the rows of what it reads. Weights are as of the operators above and must outlive the plan.
    Verbs raise ValueError for operands that do not fit.
    """

    def __init__(self) -> None: ...
    def input(self, width: int) -> int:
        """Return a slot that each run is given; before all operators."""

    def linear(
        self,
        x: tuple[int, int, int],
        parts: tuple[tuple[int, int, int, int], ...],
        residual: tuple[int, int, int] | None = None,
    ) -> int: ...
    def rms_norm(self, x: tuple[int, int, int], heads: int, weight: int, eps: float) -> int: ...
    def rms_norm_outputs(self, x: tuple[int, int, int], weight: int, eps: float) -> int:
        """Norm the rows whose result is wanted; all that follows works on these alone."""

    def rotate(
        self,
        x: tuple[int, int, int],
        heads: int,
        cos: tuple[int, int, int],
        sin: tuple[int, int, int],
    ) -> int: ...
    def gated(
        self, x: tuple[int, int, int], parts: tuple[tuple[int, int, int, int], ...]
    ) -> int: ...
    def append_kv(
        self, layer: int, kv_heads: int, keys: tuple[int, int, int], values: tuple[int, int, int]
    ) -> None: ...
    def attend(
        self, layer: int, heads: int, queries: tuple[int, int, int], scale: float
    ) -> int: ...
    def need_stages(self, stages: int) -> None:
        """Say that what follows needs the first `stages` stages of the weights."""

    def finish(self, result: int) -> None:
        """End the recording; `result` is the last slot, of the rows whose result is wanted."""

    @property
    def operators(self) -> int:
        """How many there are."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the workspace for each row of a run."""

    def stages_of(self, operator: int) -> int:
        """Return how many stages an operator needs."""

    def run(
        self,
        pool: ThreadPool,
        workspace: Workspace,
        kv: PagedRows,
        given: tuple[int, tuple[int, ...], tuple[int, int], int],
        progress: tuple[int, int],
    ) -> int:
        """Run on from an operator with so many stages in, `progress`; return the first operator
        that needs more stages, or `operators`.

        `given` are the rows, the address of each input [rows, width], (wanted rows, address of
        their int64 numbers) and the address of the result [wanted rows, width of the result].
        Between two calls for one run nobody else may use the workspace. Raises IndexError for a
        wanted row that is none, ValueError for keys and values of another form.
        """

def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that `sample` draws by: numpy's Philox of this key."""

DrawOperand = tuple[float, int, float, float, int, int]
"""Temperature, top_k, top_p, min_p, seed, position; the last two modulo 2^64."""

@final
class Adjustment:
    """What a sequence does to its logits before a draw; the formula: csrc/ops/adjustment.h.

    Depends on the tokens alone, in no order, so that it can be made again from them.
    """

    def __init__(
        self,
        penalties: tuple[float, float, float],
        bias: Sequence[tuple[int, float]],
        prompt: Sequence[int],
    ) -> None:
        """Penalties are those for repetition (over 0, 1 is off), presence and frequency (0 is off);
        `bias` is added to the logits of its tokens. Raises ValueError."""

    def count(self, token: int) -> None:
        """Take one more token of the answer."""

ChangeOperand = tuple[Adjustment | None, int]
"""What is done to a row before its draw: an adjustment, and the address of its mask, 32-bit words
in which bit i % 32 of word i / 32 says whether token i may be drawn (0: all may)."""

def sample(
    pool: ThreadPool,
    logits: int,
    shape: tuple[int, int],
    draws: Sequence[DrawOperand],
    changes: Sequence[ChangeOperand] = (),
) -> list[int | None]:
    """Draw a token for each row of logits of `shape` (rows, vocab), as csrc/ops/sampling.h says.

    `changes` are those of all rows, or of none. None stands for a row whose logits are not finite,
    or none of whose tokens may be drawn. Raises ValueError for no vocabulary and as many draws, or
    changes, as there are not rows.
    """

def log_probabilities(
    pool: ThreadPool,
    logits: int,
    shape: tuple[int, int],
    chosen: Sequence[int],
    best: int,
) -> list[tuple[float, list[tuple[int, float]]] | None]:
    """Return per row of logits of `shape` (rows, vocab) the natural log-probability of its `chosen`
    id, and ids and log-probabilities of the `best` likeliest, of ties the lower id first.

    None stands for a row whose logits are not finite. Raises IndexError for an id outside the
    vocabulary, and ValueError as `sample` does.
    """

def force_isa(name: str) -> None:
    """Use "baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16" or "best" from now on.

    Raises ValueError.
    """

def current_isa() -> str:
    """Return which of them is in use."""
