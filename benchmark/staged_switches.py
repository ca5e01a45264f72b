"""What a device's copies take against its link: weights, keys and values, beside compute."""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from aegaeon.config import Settings
from aegaeon.device.processors import compute_threads
from aegaeon.memory.budget import GB
from aegaeon.memory.kv import BLOCK_TOKENS, KvShape
from aegaeon.models.config import read_config
from aegaeon.types import ModelSpec
from benchmark.report_rows import Aim, Row, measured, progress
from benchmark.switch_engine import Driver, first_operator

TURN_SHARE = 1.3  # a turn beside a copy, of the time that the copy takes at best
WITHIN_10, WITHIN_15 = 1 / 1.1, 1 / 1.15

Specs = dict[str, ModelSpec]


class Link(NamedTuple):
    """A device with memory of its own, and the rate of its link."""

    device: str
    gb_per_s: float
    saved_tokens: int  # whose keys and values go out and come in

    @property
    def is_staged(self) -> bool:
        """Whether the device is this host."""
        return self.device == "staged"

    @property
    def name(self) -> str:
        """The rate as rows name it."""
        return f"{self.gb_per_s:.3g} GB/s"


LINKS = (Link("staged", 2.0, 448), Link("staged", 4.0, 448))


def cuda_link(device: str, gb_per_s: float) -> Link:
    """Return the link of a CUDA device: so fast that more keys and values are worth timing."""
    return Link(device, gb_per_s, 4096)


def measure_staged(specs: Specs, repeats: int) -> list[Row]:
    """All rows of the staged device."""
    rows = []
    for link in LINKS:
        rows += measure_swap_in(specs, link, repeats)
    rows += measure_overlap(specs, LINKS[0], repeats)
    for link in LINKS:
        rows += measure_kv(specs, link, repeats)
    return rows


def measure_on(specs: Specs, link: Link, repeats: int) -> list[Row]:
    """All rows of one device."""
    rows = measure_swap_in(specs, link, repeats)
    return rows + measure_overlap(specs, link, repeats) + measure_kv(specs, link, repeats)


def settings_for(specs: Sequence[ModelSpec], link: Link, kv_gb: float) -> Settings:
    """Return settings of a device that holds all of `specs`.

    One processor is left to the copies, as a device with memory of its own has an engine for them.
    """
    weights_gb = (sum(spec.weight_bytes for spec in specs) + (1 << 21)) / GB
    threads = max(1, compute_threads(Settings()) - 1)
    return Settings(
        device=link.device,
        model_cache_budget_gb=weights_gb,
        kv_budget_gb=kv_gb,
        device_memory_gb=weights_gb + kv_gb,
        link_gb_per_s=link.gb_per_s,
        threads_per_instance=threads,
    )


def measure_swap_in(specs: Specs, link: Link, repeats: int) -> list[Row]:
    """Seconds from the order to load until all weights are on the device, from the node's cache."""
    progress(f"{link.device}, a link of {link.name}")
    chosen = (specs["large"], specs["small"])
    large = chosen[0].weight_bytes
    times = []
    with Driver(settings_for(chosen, link, 0.3), chosen) as driver:
        _bring_in(driver, chosen[0])  # from the disk
        for _ in range(repeats):
            driver.load("small", "large")
            times.append(_bring_in(driver, chosen[0]))
            progress(f"  {times[-1]:.3f} s")
    row = Row(
        case=f"{link.device} switch, {large / GB:.1f} GB over {link.name}",
        unit="s",
        ours=median(times),
        limit=large / GB / link.gb_per_s,
    )
    return [measured(row, Aim("ratio_to_limit", WITHIN_10, "within 10 %"), less_is_better=True)]


def _bring_in(driver: Driver, spec: ModelSpec) -> float:
    """Load and wait until all is on the device; return the seconds."""
    start = time.perf_counter()
    return driver.bring_in(spec).arrived.result() - start


class Overlap(NamedTuple):
    """One turn beside a copy: seconds, but for the share of the copy that nobody waited for."""

    alone_s: float  # a step without the copy
    beside_s: float  # a step with it
    copy_alone_s: float
    copy_beside_s: float
    hidden: float


def measure_overlap(specs: Specs, link: Link, repeats: int) -> list[Row]:
    """What is left of a copy behind another model's turn, and what it does to that turn's steps."""
    progress("prefetch beside compute")
    chosen = (specs["large"], specs["middle"])
    settings = settings_for(chosen, link, 0.5)
    with Driver(settings, chosen) as driver:
        driver.load("middle")
        _bring_in(driver, chosen[0])  # from the disk
        runs = [overlap_once(driver, chosen[0], link) for _ in range(repeats)]
    middle = Overlap(*(median(values) for values in zip(*runs, strict=True)))
    rows = list(_overlap_rows(middle, chosen[0], link))
    # Elsewhere weights and copies are not in one memory.
    return rows + list(_traffic_rows(middle, *chosen)) if link.is_staged else rows


def overlap_once(driver: Driver, incoming: ModelSpec, link: Link) -> Overlap:
    """Measure one turn."""
    driver.load("middle", incoming.id)
    copy_alone_s = _bring_in(driver, incoming)
    driver.load("middle", incoming.id)
    request = driver.submit("middle", 16, 2048)
    turn_s = TURN_SHARE * incoming.weight_bytes / GB / link.gb_per_s
    driver.switch("middle")
    driver.prefill("middle", request)
    alone: list[float] = []
    while sum(alone) < turn_s / 2 or len(alone) < 8:
        alone.append(driver.decode("middle", request))
    beside: list[float] = []
    start = time.perf_counter()
    copy = driver.bring_in(incoming)
    with first_operator(link.device) as operator:
        while time.perf_counter() < start + turn_s:
            took_s = driver.decode("middle", request)
            if not copy.arrived.done() or not beside:
                beside.append(took_s)
        switched_s = time.perf_counter()
        copy.loaded.result()  # an instance orders no switch before
        driver.switch(incoming.id)
        new = driver.submit(incoming.id, 1, 8)
        driver.prefill(incoming.id, new)
        began_s = operator.began_s
    arrived_s = copy.arrived.result()
    exposed_s = max(began_s, arrived_s) - switched_s
    driver.release(request)
    driver.release(new)
    copied_s = arrived_s - start
    hidden = 1 - exposed_s / copied_s
    progress(f"  hidden {hidden:.1%}, copy {copied_s:.3f} s, {median(beside) * 1e3:.1f} ms a step")
    return Overlap(median(alone), median(beside), copy_alone_s, copied_s, hidden)


def _overlap_rows(turn: Overlap, incoming: ModelSpec, link: Link) -> Iterator[Row]:
    copied = f"{incoming.weight_bytes / GB:.1f} GB over {link.name}"
    yield measured(
        Row(case=f"share of a prefetch hidden, {copied}", unit="%", ours=100 * turn.hidden),
        Aim("ours", 95, ">= 95 %"),
    )
    steps = Row(
        case="a step of decoding beside the copy",
        unit="ms",
        ours=1e3 * turn.beside_s,
        peer="without",
        peer_value=1e3 * turn.alone_s,
    )
    aim = Aim("ratio_to_peer", WITHIN_10, "within 10 %, or the memory's limit")
    yield measured(steps, aim, less_is_better=True)


def _traffic_rows(turn: Overlap, incoming: ModelSpec, running: ModelSpec) -> Iterator[Row]:
    # A step reads all weights; a copy reads and writes.
    compute = running.weight_bytes / GB
    copy = 2 * incoming.weight_bytes / GB
    beside = compute / turn.beside_s + copy / turn.copy_beside_s
    for case, rate in (
        ("memory traffic of decoding alone", compute / turn.alone_s),
        ("memory traffic of the copy alone", copy / turn.copy_alone_s),
        ("memory traffic of both", beside),
    ):
        yield measured(Row(case=case, unit="GB/s", ours=rate))


def measure_kv(specs: Specs, link: Link, repeats: int) -> list[Row]:
    """Seconds from a switch until a sequence's keys and values are out, or in again.

    The device has room for those of one model: the other one's sequence has them leave.
    """
    progress(f"keys and values, a link of {link.name}")
    chosen = (specs["wide-a"], specs["wide-b"])
    config = read_config(chosen[0].path)
    shape = KvShape(config.layers, config.kv_heads, config.head_dim)
    kv_gb = 1.5 * link.saved_tokens * shape.block_bytes / BLOCK_TOKENS / GB
    with Driver(settings_for(chosen, link, kv_gb), chosen) as driver:
        for spec in chosen:
            driver.load(spec.id)
        runs = []
        for _ in range(repeats):
            moved_bytes, out_s, in_s = kv_once(driver, link.saved_tokens)
            progress(f"  out {out_s:.3f} s, in {in_s:.3f} s")
            runs.append((out_s, in_s))
    limit_s = moved_bytes / GB / link.gb_per_s
    aim = Aim("ratio_to_limit", WITHIN_15, "within 15 %")
    rows = []
    for way, times in zip(("out", "in"), zip(*runs, strict=True), strict=True):
        case = f"KV {way}, {moved_bytes / 1e6:.0f} MB over {link.name}"
        row = Row(case=case, unit="s", ours=median(times), limit=limit_s)
        rows.append(measured(row, aim, less_is_better=True))
    return rows


def kv_once(driver: Driver, saved_tokens: int) -> tuple[int, float, float]:
    """Return the bytes of a sequence's keys and values, and the seconds they take out and in."""
    first, second = (driver.submit(name, saved_tokens, 16) for name in ("wide-a", "wide-b"))
    driver.switch("wide-a")
    driver.prefill("wide-a", first)
    out_before, in_before = driver.moved_bytes("kv_out"), driver.moved_bytes("kv_in")
    start = time.perf_counter()
    driver.switch("wide-b")
    out_s = driver.await_moved("kv_out", out_before + 1) - start
    moved_bytes = driver.moved_bytes("kv_out") - out_before
    driver.prefill("wide-b", second)
    driver.release(second)
    start = time.perf_counter()
    driver.switch("wide-a")
    in_s = driver.await_moved("kv_in", in_before + 1) - start
    driver.decode("wide-a", first)
    driver.release(first)
    return moved_bytes, out_s, in_s
