"""What is measured of copies: weights from disk or from the node's cache, keys and values."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from aegaeon.config import Settings
from aegaeon.engine.shared import DTYPES
from aegaeon.measures import Phase
from aegaeon.memory.budget import GB, LEAST_SEQUENCE_TOKENS
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape
from aegaeon.models.config import read_config
from aegaeon.types import ModelId, ModelSpec
from benchmark.calibration_fit import Line, Sample, fit, middle
from benchmark.calibration_runs import Meter, Scale
from benchmark.cold_loads import OurLoad, drop_from_page_cache
from benchmark.report_rows import progress
from benchmark.switch_engine import Driver, region_of

# Of the longest sequence whose keys and values are copied: to fit, and to check.
FITTED, CHECKED = (1 / 8, 1 / 4, 1 / 2, 1.0), (3 / 16, 3 / 8, 5 / 8, 7 / 8)
SLAB_BYTES = 4 << 20  # room that may be left over
LEFT_TOKENS = 2  # so that the sequence that fills the device makes tokens
ROOM_GB = 0.002  # beside the weights


class Copies(msgspec.Struct, frozen=True):
    """`load`: seconds for a GB of weights, and for a load. `moves` (fitted, checked) are of keys
    and values, which cost as much for a GB and `move_fixed_s` once."""

    load: Line
    held_out_loads: list[Sample]
    move_fixed_s: float = 0.0
    held_out_moves: list[Sample] = []


def measure_copies(settings: Settings, specs: Sequence[ModelSpec], scale: Scale) -> Copies:
    """Measure what the device copies: only a staged one moves keys and values."""
    distinct = list({spec.path: spec for spec in specs}.values())
    if settings.device != "staged":
        fitted, checked = _alternate([_cold_loads(spec, scale) for spec in distinct])
        return Copies(_fit_loads(fitted), checked)
    loads, moves, checked_moves = [], [], []
    for spec in distinct:
        with _Pair(settings, spec, scale) as pair:
            loads.append(pair.loads())
            moves += pair.moves(FITTED)
            checked_moves += pair.moves(CHECKED)
    fitted, checked = _alternate(loads)
    line = _fit_loads(fitted)
    fixed_s = median(one.took_s - line[0] * one.amounts[0] for one in moves)
    return Copies(line, checked, max(0.0, fixed_s), checked_moves)


def _alternate(each: list[list[Sample]]) -> tuple[list[Sample], list[Sample]]:
    """Return every second sample of each, and the others."""
    chosen: tuple[list[Sample], list[Sample]] = ([], [])
    for one in each:
        chosen[0].extend(one[::2])
        chosen[1].extend(one[1::2])
    return chosen


def _fit_loads(samples: Sequence[Sample]) -> Line:
    """Return the line, which must have a slope: a link has a rate."""
    line = fit(samples)
    if line[0] > 0:
        return line
    return median(one.took_s / one.amounts[0] for one in samples), 0.0


def _cold_loads(spec: ModelSpec, scale: Scale) -> list[Sample]:
    """Load from the disk into the node's cache, again and again."""
    load = OurLoad(spec, region_of("weights"))

    def once() -> Sample:
        for path in Path(spec.path).glob("*.safetensors"):
            drop_from_page_cache(path)
        return Sample((spec.weight_bytes / GB,), load())

    samples = []
    for _ in range(2 * scale.copies):
        samples.append(middle([once() for _ in range(scale.rounds)]))
        progress(f"  cold load {samples[-1].took_s:.3f} s")
    return samples


class _Pair:
    """A model and its double on a staged device, which has room for the weights of both, and for
    the keys and values of one long sequence."""

    def __init__(self, settings: Settings, spec: ModelSpec, scale: Scale) -> None:
        """Open the engine, with the double's weights on the device."""
        self._spec, self._scale = spec, scale
        self._names = (spec.id, f"{spec.id} again")
        config = read_config(spec.path)
        shape = KvShape(config.layers, config.kv_heads, config.head_dim, DTYPES[settings.stored_kv])
        least_blocks = (scale.longest + LEAST_SEQUENCE_TOKENS) // BLOCK_TOKENS
        kv_bytes = least_blocks * shape.block_bytes + SLAB_BYTES
        pool = KvPool(kv_bytes, [shape])
        self._filling = BLOCK_TOKENS * pool.capacity_blocks(shape) - LEFT_TOKENS
        pool.close()
        specs = [msgspec.structs.replace(spec, id=name) for name in self._names]
        self._driver = Driver(_settings_of(settings, spec, kv_bytes), specs)
        self._meter = Meter(settings.threads_per_instance, scale)
        self._swap(self._names)

    def __enter__(self) -> "_Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.__exit__()

    def loads(self) -> list[Sample]:
        """Copy the weights of one in the place of the other's."""

        def both() -> Sample:
            return middle([self._swap(self._names[::-1]), self._swap(self._names)])

        return [self._meter.read(both).sample for _ in range(2 * self._scale.copies)]

    def moves(self, shares: Sequence[float]) -> list[Sample]:
        """Have sequences of such shares of the longest leave the device and come back."""
        for name in self._names:
            self._driver.load(name)
        samples = []
        for share in shares:
            blocks = max(1, int(share * self._scale.longest / 2 / BLOCK_TOKENS))
            pairs = [self._out_and_in(blocks * BLOCK_TOKENS) for _ in range(self._scale.rounds)]
            samples += [middle(one) for one in zip(*pairs, strict=True)]
            progress("  keys and values " + ", ".join(f"{s.took_s:.4f} s" for s in samples[-2:]))
        return samples

    def _swap(self, names: Sequence[ModelId]) -> Sample:
        """Bring in the second in the place of the first."""
        leaving, coming = names
        start = time.perf_counter()
        stop = self._driver.moved_bytes("weights") + self._spec.weight_bytes
        self._driver.load(coming, leaving)
        took_s = self._driver.await_moved("weights", stop) - start
        return Sample((self._spec.weight_bytes / GB,), took_s)

    def _out_and_in(self, tokens: int) -> tuple[Sample, Sample]:
        """The double's sequence needs all the room."""
        driver, (name, double) = self._driver, self._names
        first = driver.submit(name, tokens, 2)
        second = driver.submit(double, self._filling, 2)
        driver.switch(name)
        driver.prefill(name, first)
        out = self._time_switch(double, "kv_out")
        driver.prefill(double, second)
        driver.release(second)
        back = self._time_switch(name, "kv_in")
        driver.release(first)
        return out, back

    def _time_switch(self, model: ModelId, phase: Phase) -> Sample:
        before = self._driver.moved_bytes(phase)
        start = time.perf_counter()
        self._driver.switch(model)
        took_s = self._driver.await_moved(phase, before + 1) - start
        return Sample(((self._driver.moved_bytes(phase) - before) / GB,), took_s)


def _settings_of(settings: Settings, spec: ModelSpec, kv_bytes: int) -> Settings:
    weights_gb = 2 * spec.weight_bytes / GB + ROOM_GB
    return msgspec.structs.replace(
        settings,
        model_cache_budget_gb=weights_gb,
        kv_budget_gb=kv_bytes / GB,
        device_memory_gb=weights_gb + kv_bytes / GB,
    )
