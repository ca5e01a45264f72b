"""The device seam: the operators a model's forward pass is made of.

Row i of every result depends on row i of the operands (and its own sequence's KV) alone, to the
bit: batch mates, padding and where a prompt was cut never show.

On CUDA products are the vendor's, which promises the same bits only for the same call: so each is
made over tiles of a fixed number of rows, the last one padded, and whatever the batch it is the
same call (device/products.py says what is left to trust).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aegaeon._native import Adjustment
from aegaeon.device.packed import Matrix
from aegaeon.memory.kv import KvView
from aegaeon.sampling import SamplingParams

# How a row's token is drawn, and which token of its request it is.
Draw = tuple[SamplingParams, int]
# A row's log-probabilities: the chosen token's, and ids and values of the likeliest. None: the row
# is not finite.
RowLogProbs = tuple[float, list[tuple[int, float]]] | None


class Change(NamedTuple):
    """What is done to a row's logits before its draw: csrc/ops/adjustment.h."""

    adjustment: Adjustment | None = None
    allowed: Tensor | None = None  # [vocab / 32, rounded up] int32, a bit for each token


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one forward pass of one model: each sequence's new tokens, one after another."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, 0-based within the sequence
    logit_rows: Tensor  # [outputs] int64, rows whose logits are wanted
    kv: KvView  # where these rows' keys and values go, and what each may look at


class Projection:
    """Weights [out, in] that read the same input, one below the other; immutable.

    `biases` has a float32 vector [out] for each part, or is empty. A bias is added last. `x_dtype`
    is bfloat16 where parts that are kept in bfloat16 have their input rounded to it.
    """

    __slots__ = ("biases", "in_features", "operands", "out_features", "parts")

    def __init__(
        self,
        parts: tuple[Matrix, ...],
        biases: tuple[Tensor, ...] = (),
        x_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parts = parts
        self.biases = biases
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        added = [bias.data_ptr() for bias in biases] or [0] * len(parts)
        # As native operators take them, made once: address, outputs, type code, bias (or 0).
        self.operands = tuple(
            (*part.factor(x_dtype), bias) for part, bias in zip(parts, added, strict=True)
        )


class Operators(ABC):
    """What a step is made of: float32 activations; `x` is [rows, features], row-major, unless said.

    Between them a step only looks: slices, `view`, `chunk`.
    """

    @abstractmethod
    def linear(self, x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
        """Return [rows, outputs of all parts]: x @ weight.T + bias for each part, + residual."""

    @abstractmethod
    def gated(self, x: Tensor, projection: Projection) -> Tensor:
        """Return silu(gate) * up, [rows, outputs of a part], where gate and up are what `linear`
        makes of the projection's two parts of as many outputs."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (any leading ones).

        With `rows`, the batch's `logit_rows`, only of those rows of x [rows, features].
        """

    @abstractmethod
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate half-split pairs of x [rows, heads, head_dim] by cos, sin [rows, head_dim]."""

    @abstractmethod
    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        """Store the new rows' keys and values [rows, kv_heads, head_dim] in the batch's blocks."""

    @abstractmethod
    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        """Causal attention of queries [rows, heads, head_dim] over each row's own sequence up to
        and with its position; returns [rows, heads * head_dim]."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step begins with."""

    x: Tensor  # [rows, hidden], the tokens' embeddings
    cos: Tensor  # [rows, head_dim], of the rows' positions
    sin: Tensor  # likewise
    batch: StepBatch


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a step's first x is made of: rows of `table` [vocab, hidden]; `is_in_host` where that
    does not lie where the device's weights do."""

    token_ids: Tensor  # [rows] int64
    table: Matrix
    is_in_host: bool = False


# The cosines and sines of the rows' positions, [rows, head_dim] each.
Angles = tuple[Tensor, Tensor]

# Called with a stage of the weights before what needs it; stages come in order.
AwaitStage = Callable[[int], None]
# Returns logits [len(logit_rows), vocab]. The same operators in the same order whatever the inputs,
# but for those on `logit_rows`, which end the step where there are any.
Step = Callable[[Operators, StepInputs, AwaitStage], Tensor]


class StepRunner(ABC):
    """Runs the one step of one model on a device."""

    def prepare(self, step: Step, hidden: int, head_dim: int) -> None:  # noqa: B027  may be nothing
        """Do what can be done before the first run, knowing the widths of its inputs."""

    @abstractmethod
    def run(self, step: Step, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        """Return what `step`, always the same, returns, until the next run on the device; raises
        what `await_stage` raises."""

    @abstractmethod
    def run_tokens(
        self,
        step: Step,
        embedding: Embedding,
        angles: Angles,
        batch: StepBatch,
        await_stage: AwaitStage,
    ) -> Tensor:
        """Run from the tokens on: `run` with the x that they are embedded as."""


class Device(ABC):
    """What computes: it runs whole steps, and draws tokens of what they make."""

    name: str
    # What activations are when they meet weights of bfloat16; between products they are float32.
    activation_dtype: torch.dtype = torch.float32

    @abstractmethod
    def sample(
        self, logits: Tensor, draws: Sequence[Draw], changes: Sequence[Change | None] = ()
    ) -> list[int | None]:
        """Return the next token of each row of logits [rows, vocab], drawn as its own of `draws`
        says, after its own of `changes`, which has as many or none; None where the row's logits are
        not finite, or nothing may be drawn. `logits` stay. The formula: csrc/ops/sampling.h."""

    @abstractmethod
    def log_probabilities(
        self, logits: Tensor, chosen: Sequence[int], best: int
    ) -> list[RowLogProbs]:
        """Return for each row of logits [rows, vocab] the natural log-probability of its `chosen`
        token, and the `best` likeliest tokens. The formula: csrc/ops/sampling.h."""

    def select(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return these rows of logits [rows, vocab], behind what computes them."""
        return logits[torch.tensor(rows, dtype=torch.int64)]

    def check(self) -> None:  # noqa: B027  most cannot be lost
        """Raise DeviceLost where nothing will be computed here any more. Waits for nothing."""

    @abstractmethod
    def new_runner(self) -> StepRunner:
        """Return what runs a model's step here."""


class DirectDevice(Device, Operators):
    """A device whose operators compute when they are called."""

    @abstractmethod
    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        """Return rows of `table` [vocab, features], float32."""

    def new_runner(self) -> StepRunner:
        """Return one that calls one operator after another, unless the device knows better."""
        return OneByOne(self)


class DirectRunner(StepRunner):
    """Of a device that embeds when it is told to."""

    def __init__(self, device: DirectDevice) -> None:
        self.device = device

    def run_tokens(
        self,
        step: Step,
        embedding: Embedding,
        angles: Angles,
        batch: StepBatch,
        await_stage: AwaitStage,
    ) -> Tensor:
        x = self.device.embed(embedding.token_ids, embedding.table)
        return self.run(step, StepInputs(x, *angles, batch), await_stage)


class OneByOne(DirectRunner):
    """Records nothing."""

    def run(self, step: Step, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        return step(self.device, inputs, await_stage)
