"""A tiny random decoder on the device operators, and an engine over several of them.

For tests of what runs models; the real families have their own tests.
"""

import threading
from itertools import chain

import torch
from torch import Tensor

from aegaeon._native import CopyEngine
from aegaeon.device.base import Device, Projection, StepBatch
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import Matrix, pack
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_place import InPlaceKv, KvPlace
from aegaeon.engine.kv_swap import SwappedKv
from aegaeon.engine.memory import EngineMemory
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.traffic import Traffic
from aegaeon.types import Load, Loaded, ModelSpec, Request, SamplingParams
from tests.support.own_weights import OwnWeights

VOCAB = 96
HIDDEN = 48
HEADS = 6
HEAD_DIM = 16
CONTEXT = 600


class TinyDecoder:
    """Attention and a gated layer per `layers`; weights drawn from `seed`."""

    def __init__(self, device: Device, seed: int, layers: int, kv_heads: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def matrix(out: int, into: int) -> Matrix:
            weight = torch.randn(out, into, generator=draw) * 2.0 / into**0.5
            return pack(weight, torch.float32)

        self.device = device
        self.kv_heads = kv_heads
        self.identity = bytes([seed, layers, kv_heads])
        self.embedding = matrix(VOCAB, HIDDEN)
        self.norm = torch.ones(HIDDEN)
        qkv = (HEADS + 2 * kv_heads) * HEAD_DIM
        self.layers = [
            (
                Projection((matrix(qkv, HIDDEN),)),
                Projection((matrix(HIDDEN, HEADS * HEAD_DIM),)),
                Projection((matrix(64, HIDDEN), matrix(64, HIDDEN))),
                Projection((matrix(HIDDEN, 64),)),
            )
            for _ in range(layers)
        ]
        self.poison_token: int | None = None

    @property
    def weight_bytes(self) -> int:
        parts = chain.from_iterable(linear.parts for layer in self.layers for linear in layer)
        return 4 * sum(w.out_features * w.in_features for w in (self.embedding, *parts))

    def forward(self, batch: StepBatch) -> Tensor:
        device = self.device
        x = device.embed(batch.token_ids, self.embedding)
        if self.poison_token is not None:
            x[batch.token_ids == self.poison_token] = torch.nan
        angles = batch.positions[:, None] * 0.3 ** torch.arange(HEAD_DIM // 2)
        angles = torch.cat((angles, angles), dim=1)
        cos, sin = angles.cos(), angles.sin()
        for i, (qkv, out, gate_up, down) in enumerate(self.layers):
            mixed = device.linear(device.rms_norm(x, self.norm, 1e-6), qkv)
            mixed = mixed.view(len(x), HEADS + 2 * self.kv_heads, HEAD_DIM)
            q, k, v = mixed.split((HEADS, self.kv_heads, self.kv_heads), dim=1)
            device.append_kv(i, device.rotate(k, cos, sin), v, batch)
            seen = device.attend(i, device.rotate(q, cos, sin), batch, HEAD_DIM**-0.5)
            x = device.linear(seen, out, residual=x)
            inner = device.gated(device.rms_norm(x, self.norm, 1e-6), gate_up)
            x = device.linear(inner, down, residual=x)
        rows = device.rms_norm(x[batch.logit_rows], self.norm, 1e-6)
        return device.linear(rows, Projection((self.embedding,)))


SHAPES = {"a": KvShape(2, 2, HEAD_DIM), "b": KvShape(3, 3, HEAD_DIM)}


def make_spec(model: str, weight_bytes: int = 1 << 20) -> ModelSpec:
    return ModelSpec(
        id=model,
        path=model,
        architecture="Tiny",
        weight_bytes=weight_bytes,
        kv_token_bytes=SHAPES[model].token_bytes,
        context_tokens=CONTEXT,
        vocab_tokens=VOCAB,
    )


def load_tiny(path: str, device: Device) -> TinyDecoder:
    shape = SHAPES[path]
    return TinyDecoder(device, seed=ord(path), layers=shape.layers, kv_heads=shape.kv_heads)


DEVICES = ("cpu", "staged")
# Of the staged device; small, so that copies are cut and take longer than a step.
CHUNK_BYTES = 16 << 10
LINK_BYTES_PER_S = 200 << 20


def make_engine(
    kv_bytes: int = 8 << 20,
    loader=load_tiny,
    load: bool = True,
    threads: int = 1,
    kv_path: str | None = None,
    device: str = "cpu",
    host_bytes: int | None = None,
    link_bytes_per_s: int = LINK_BYTES_PER_S,
    is_sharing: bool = True,
) -> ModelEngine:  # fmt: skip
    """Return an engine over models a and b, both loaded unless told otherwise; with a path, its KV
    is in a pool that four engines may share.

    On "staged", the KV that computes is in a pool of `kv_bytes` of its own, and has `host_bytes`
    (default: as many) of the other one.
    """
    specs = tuple(make_spec(model) for model in SHAPES)
    computing = CpuDevice(threads)
    weights = OwnWeights(lambda model: loader(model, computing))
    traffic = Traffic()
    costs = SwapCosts(traffic)
    quota_bytes = kv_bytes if host_bytes is None else host_bytes
    total_bytes = quota_bytes if kv_path is None else 4 * kv_bytes
    shared = KvPool(total_bytes, SHAPES.values(), kv_path, quota_bytes)
    kv: KvPlace = InPlaceKv(shared, is_sharing)
    if device == "staged":
        copier = CopyEngine(1, CHUNK_BYTES, link_bytes_per_s)
        pools = KvPool(kv_bytes, SHAPES.values()), shared
        kv = SwappedKv(pools, copier, traffic, costs, is_sharing)
    memory = EngineMemory(weights, kv, traffic, costs)
    engine = ModelEngine(specs, SHAPES, memory, computing)
    for spec in specs if load else ():
        load_in_thread(engine, spec.id)
    return engine


def all_kv_bytes(engine: ModelEngine) -> int:
    """Return what an engine holds of KV, on its device and on the host. What rests goes there no
    more."""
    spill = getattr(engine._kv, "_spill", None)
    if spill is not None:
        with engine._kv.lock:
            spill.stop()
    host = getattr(engine._kv, "_host", None)
    return engine._kv.pool.used_bytes + (host.used_bytes if host is not None else 0)


def load_in_thread(engine: ModelEngine, model: str) -> None:
    """Load as the copy lane does: on a thread of its own."""
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(engine.load(Load(model))))
    thread.start()
    thread.join(60)
    assert isinstance(outcomes[0], Loaded), outcomes


def make_request(name: str, prompt: list[int], model: str = "a", **changes) -> Request:
    values = {
        "id": name,
        "model": model,
        "prompt_token_ids": tuple(prompt),
        "sampling": SamplingParams(temperature=0.0),
        "max_tokens": 12,
        "stop_token_ids": (),
        "reply_to": "nobody",
        "arrival_s": 0.0,
        "deadline_s": 1e9,
    }
    return Request(**(values | changes))
