"""The operators that benchmark/kernels.py measures, each with torch's counterpart, on the shapes of
Qwen3-0.6B."""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from aegaeon import _native
from aegaeon.device.attention import AttentionPlan
from aegaeon.device.packed import Matrix, pack
from aegaeon.memory.arena import Arena
from aegaeon.memory.kv import KvPool, KvRows, KvShape, KvView, blocks_for
from benchmark.limits import Run
from benchmark.random_model import QWEN3_06B

# What is read call after call: more than any cache has.
COLD_BYTES = 208 << 20
HEAD = "head"
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
HEAD_ROWS = 64  # at most: only rows that a token is drawn of have logits
FEW_ROWS = (1, 32, 512, 4096)
DECODE_CONTEXTS = (512, 4096, 32_768)
PREFILL_CONTEXTS = (512, 2048)
# Of keys and values: float32 where nothing is said.
KV_NAMES = {torch.float32: "", torch.bfloat16: " bf16"}
TYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}


class Sizes(NamedTuple):
    """How large the measured model is."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) of a layer's products and of the head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (queries + 2 * keys, self.hidden),
            "output": (self.hidden, queries),
            "gate and up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            HEAD: (self.vocab, self.hidden),
        }


def sizes_of(model: dict[str, int]) -> Sizes:
    """Return the sizes of a model of benchmark/random_model.py."""
    return Sizes(
        model["hidden_size"],
        model["intermediate_size"],
        model["num_attention_heads"],
        model["num_key_value_heads"],
        model["head_dim"],
        model["vocab_size"],
    )


QWEN3 = sizes_of(QWEN3_06B)


class Case(NamedTuple):
    """One operator at one size: what a call reads at least, what it computes, and how it is called.

    `part` names what summing rows add up; `calls_unit` "us" asks for microseconds of a call, of
    which there are `items`.
    """

    name: str
    read_bytes: float
    flops: float
    ours: Run
    torchs: Run | None
    part: str = ""
    items: int = 0


class Scale(NamedTuple):
    """How much is measured of what."""

    sizes: Sizes
    cold_bytes: int
    linear_rows: Sequence[int]
    few_rows: Sequence[int]
    decode_contexts: Sequence[int]
    prefill_contexts: Sequence[int]


# Products


class Copies:
    """A matrix and torch's counterpart, each as often as makes `cold_bytes`, on huge pages."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cold_bytes: int) -> None:
        """Draw it."""
        outputs, inputs = shape
        weight = torch.randn(outputs, inputs) * inputs**-0.5
        packed = pack(weight, dtype)
        owner = packed.owner
        assert isinstance(owner, Tensor)
        self.matrix_bytes = owner.numel() * owner.element_size()
        self._arena, places = _repeated(owner, cold_bytes)
        self.matrices = [Matrix(self._arena, place, outputs, inputs, dtype) for place in places]
        plain = weight.to(dtype) if dtype.is_floating_point else (weight * 100).to(dtype)
        self._plain_arena, places = _repeated(plain, cold_bytes)
        self.plain = [_tensor_at(place, plain) for place in places]


def _repeated(tensor: Tensor, cold_bytes: int) -> tuple[Arena, list[int]]:
    """Return copies of a tensor's bytes, and their addresses."""
    size_bytes = tensor.numel() * tensor.element_size()
    stride = -(-size_bytes // 4096) * 4096
    count = -(-cold_bytes // stride)
    arena = Arena(count * stride)
    places = [arena.address + at * stride for at in range(count)]
    for place in places:
        ctypes.memmove(place, tensor.data_ptr(), size_bytes)
    return arena, places


def _tensor_at(address: int, like: Tensor) -> Tensor:
    size_bytes = like.numel() * like.element_size()
    memory = (ctypes.c_char * size_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def linear_cases(pool: _native.ThreadPool, scale: Scale) -> Iterator[Case]:
    """Yield products of each matrix, type and count of rows."""
    for dtype in TYPE_NAMES:
        x_dtypes = [torch.float32, *([dtype] if dtype == torch.bfloat16 else [])]
        for name, shape in scale.sizes.matrices().items():
            copies = Copies(shape, dtype, scale.cold_bytes)
            for x_dtype, rows in itertools.product(x_dtypes, scale.linear_rows):
                if name != HEAD or rows <= HEAD_ROWS:
                    yield _linear_case(pool, name, copies, x_dtype, rows)
        shape = scale.sizes.inner, scale.sizes.hidden
        both = [Copies(shape, dtype, scale.cold_bytes // 2) for _ in range(2)]
        for x_dtype, rows in itertools.product(x_dtypes, scale.linear_rows):
            yield _gated_case(pool, both, x_dtype, rows)


def _types(matrix: Matrix, x_dtype: torch.dtype) -> str:
    return TYPE_NAMES[matrix.dtype] + (" x bf16" if x_dtype == torch.bfloat16 else "")


def _linear_case(
    pool: _native.ThreadPool, name: str, copies: Copies, x_dtype: torch.dtype, rows: int
) -> Case:
    matrix = copies.matrices[0]
    outputs, inputs = matrix.out_features, matrix.in_features
    x, out = torch.randn(rows, inputs), torch.empty(rows, outputs)
    ours = itertools.cycle((*each.factor(x_dtype), 0) for each in copies.matrices)
    plain = itertools.cycle(copies.plain)
    theirs = x.to(copies.plain[0].dtype)
    multiply = functional.linear if theirs.is_floating_point() else _integer_product
    dtype = _types(matrix, x_dtype)
    return Case(
        name=f"linear {dtype}, {name} {outputs}x{inputs}, {_count(rows, 'row')}",
        read_bytes=copies.matrix_bytes + 4 * rows * (inputs + outputs),
        flops=2.0 * rows * inputs * outputs,
        ours=lambda: _native.linear(
            pool, x.data_ptr(), (rows, inputs), (next(ours),), out.data_ptr()
        ),
        torchs=lambda: multiply(theirs, next(plain)),
        part="" if name == HEAD else f"linear {dtype}, a layer, {_count(rows, 'row')}",
    )


def _gated_case(
    pool: _native.ThreadPool, both: Sequence[Copies], x_dtype: torch.dtype, rows: int
) -> Case:
    matrix = both[0].matrices[0]
    outputs, inputs = matrix.out_features, matrix.in_features
    x, out = torch.randn(rows, inputs), torch.empty(rows, outputs)
    operands = ([(*each.factor(x_dtype), 0) for each in copies.matrices] for copies in both)
    ours = itertools.cycle(list(zip(*operands, strict=True)))
    plain = itertools.cycle(list(zip(*(copies.plain for copies in both), strict=True)))
    theirs = x.to(both[0].plain[0].dtype)
    multiply = functional.linear if theirs.is_floating_point() else _integer_product

    def torchs() -> Tensor:
        gate, up = (multiply(theirs, weight) for weight in next(plain))
        return functional.silu(gate if gate.is_floating_point() else gate.float()) * up

    return Case(
        name=f"gated {_types(matrix, x_dtype)}, 2x{outputs}x{inputs}, {_count(rows, 'row')}",
        read_bytes=2 * both[0].matrix_bytes + 4 * rows * (inputs + outputs),
        flops=4.0 * rows * inputs * outputs,
        ours=lambda: _native.gated(pool, x.data_ptr(), (rows, inputs), next(ours), out.data_ptr()),
        torchs=torchs,
    )


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.T)  # int8 by int8, without scales


# The rest of a layer


def row_cases(pool: _native.ThreadPool, scale: Scale) -> Iterator[Case]:
    """Yield what works row by row, and the embedding."""
    for rows in scale.few_rows:
        yield _norm_case(pool, scale.sizes, rows)
        yield _rotate_case(pool, scale.sizes, rows)
    table = torch.randn(scale.sizes.vocab, scale.sizes.hidden)
    for rows in scale.few_rows:
        yield _embed_case(pool, table, rows)


def _norm_case(pool: _native.ThreadPool, sizes: Sizes, rows: int) -> Case:
    shape = (rows, sizes.hidden)
    x, weight, out = torch.randn(shape), torch.randn(sizes.hidden), torch.empty(shape)
    operand = x.data_ptr(), sizes.hidden
    return Case(
        name=f"rms_norm {sizes.hidden}, {_count(rows, 'row')}",
        read_bytes=8.0 * x.numel(),
        flops=3.0 * x.numel(),
        ours=lambda: _native.rms_norm(
            pool, operand, (rows, 1, sizes.hidden), weight.data_ptr(), 1e-6, out.data_ptr()
        ),
        torchs=lambda: functional.rms_norm(x, (sizes.hidden,), weight, 1e-6),
    )


def _rotate_case(pool: _native.ThreadPool, sizes: Sizes, rows: int) -> Case:
    shape = (rows, sizes.heads, sizes.head_dim)
    x, out = torch.randn(shape), torch.empty(shape)
    cos, sin = torch.randn(rows, sizes.head_dim), torch.randn(rows, sizes.head_dim)
    operand = x.data_ptr(), sizes.heads * sizes.head_dim

    def torchs() -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return Case(
        name=f"rotate {sizes.heads}x{sizes.head_dim}, {_count(rows, 'row')}",
        read_bytes=8.0 * x.numel() + 8 * cos.numel(),
        flops=3.0 * x.numel(),
        ours=lambda: _native.rotate(
            pool, operand, shape, (cos.data_ptr(), sin.data_ptr()), out.data_ptr()
        ),
        torchs=torchs,
    )


def _embed_case(pool: _native.ThreadPool, table: Tensor, rows: int) -> Case:
    packed, plain = pack(table, torch.bfloat16), table.bfloat16()
    drawn = itertools.cycle([torch.randint(len(table), (rows,)) for _ in range(64)])
    out = torch.empty(rows, table.shape[1])
    return Case(
        name=f"embed bf16 {table.shape[1]}, {_count(rows, 'row')}",
        read_bytes=(2.0 + 4.0) * out.numel(),
        flops=0.0,
        ours=lambda: _native.embed(
            pool, next(drawn).data_ptr(), (rows, table.shape[1]), packed.operand, out.data_ptr()
        ),
        torchs=lambda: functional.embedding(next(drawn), plain).float(),
    )


# Attention


class OneSequence:
    """One sequence in as many layers as make `cold_bytes`, paged, and in torch's dense tensors."""

    def __init__(self, scale: Scale, dtype: torch.dtype, tokens: int, rows: int) -> None:
        """Draw keys and values of `dtype`, and queries of the last `rows` tokens."""
        sizes = scale.sizes
        layer_bytes = 2 * dtype.itemsize * sizes.kv_heads * sizes.head_dim * tokens
        self.layers = max(1, -(-scale.cold_bytes // layer_bytes)) if rows == 1 else 1
        self.shape = KvShape(self.layers, sizes.kv_heads, sizes.head_dim, dtype)
        self.rows, self.tokens = rows, tokens
        count = blocks_for(tokens)
        self._pool = KvPool(4 * self.shape.block_bytes * (count + 1), (self.shape,))
        blocks = tuple(self._pool.allocate(self.shape, count))
        pages = self._pool.pages(self.shape)
        for block in blocks:
            pages[block : block + self.shape.block_pages].uniform_(-1, 1)
        view = KvView(self.shape, pages, [KvRows(0, rows, tokens - rows, blocks)])
        self.plan = AttentionPlan(view)
        self.queries = torch.randn(rows, sizes.heads, sizes.head_dim)
        self.new = torch.randn(2, rows, sizes.kv_heads, sizes.head_dim)
        self.out = torch.empty(rows, sizes.heads * sizes.head_dim)
        self.turns = itertools.cycle(range(self.layers))
        self.dense = [
            torch.rand(2, 1, sizes.kv_heads, tokens, sizes.head_dim).to(dtype)
            for _ in range(self.layers)
        ]
        self._dense_queries = self.queries.transpose(0, 1)[None].to(dtype)
        self.dense_turns = itertools.cycle(self.dense)

    def append(self, pool: _native.ThreadPool) -> None:
        """Store keys and values of the rows."""
        stride = self.new.stride(1)
        keys, values = ((half.data_ptr(), stride) for half in self.new)
        _native.append_kv(pool, self.plan.rows, next(self.turns), self.rows, keys, values)

    def append_dense(self) -> None:
        """Store them as caches of torch do."""
        next(self.dense_turns)[:, 0, :, self.tokens - self.rows :] = self.new.transpose(1, 2)

    def attend(self, pool: _native.ThreadPool) -> None:
        """Attend with all rows."""
        operand = self.queries.data_ptr(), self.rows, self.queries.shape[1]
        _native.attend(pool, self.plan.rows, next(self.turns), operand, 0.1, self.out.data_ptr())

    def attend_dense(self) -> Tensor:
        """Attend as torch does."""
        keys, values = next(self.dense_turns)
        return functional.scaled_dot_product_attention(
            self._dense_queries, keys, values,
            is_causal=self.rows > 1, scale=0.1, enable_gqa=True,
        )  # fmt: skip


def attention_cases(pool: _native.ThreadPool, scale: Scale) -> Iterator[Case]:
    """Yield decode and prefill attention, and what stores keys and values, of either type."""
    for dtype in KV_NAMES:
        for tokens in scale.decode_contexts:
            yield _decode_case(pool, scale, dtype, tokens)
        for tokens in scale.prefill_contexts:
            yield from _prefill_cases(pool, scale, dtype, tokens)


def _prefill_cases(
    pool: _native.ThreadPool, scale: Scale, dtype: torch.dtype, tokens: int
) -> Iterator[Case]:
    sizes = scale.sizes
    one = OneSequence(scale, dtype, tokens, tokens)
    pairs = tokens * (tokens + 1) / 2
    yield Case(
        name=f"attention{KV_NAMES[dtype]}, prefill of {tokens}",
        read_bytes=8.0 * one.queries.numel() + dtype.itemsize * one.new.numel(),
        flops=4.0 * sizes.heads * sizes.head_dim * pairs,
        ours=lambda: one.attend(pool),
        torchs=one.attend_dense,
    )
    yield Case(
        name=f"append{KV_NAMES[dtype]}, {tokens} rows",
        read_bytes=(4.0 + dtype.itemsize) * one.new.numel(),
        flops=0.0,
        ours=lambda: one.append(pool),
        torchs=one.append_dense,
    )


def _decode_case(pool: _native.ThreadPool, scale: Scale, dtype: torch.dtype, tokens: int) -> Case:
    sizes = scale.sizes
    one = OneSequence(scale, dtype, tokens, 1)
    return Case(
        name=f"attention{KV_NAMES[dtype]}, decode at {tokens}",
        read_bytes=2.0 * dtype.itemsize * tokens * sizes.kv_heads * sizes.head_dim,
        flops=4.0 * sizes.heads * sizes.head_dim * tokens,
        ours=lambda: one.attend(pool),
        torchs=one.attend_dense,
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
