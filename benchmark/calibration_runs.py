"""What is measured to calibrate: an engine's actions over designed points, at quiet moments."""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from aegaeon.types import ComputeAction, Decode, ModelSpec, Prefill
from benchmark.calibration_fit import Sample, Step, middle
from benchmark.report_rows import progress
from benchmark.switch_engine import Driver

LOOK_S = 0.25
LONGEST_WAIT_S = 1.0  # before one reading
# Of a processor, that others may use of those we compute on.
MARGIN = 0.2
SHORTEST = 8  # prompt
MOST_IN_BATCH = 8  # prompts of one prefill
MOST_GROWN = 256  # tokens, by which sequences that decode outgrow their prompts

Run = Callable[[], Sample]


class Scale(msgspec.Struct, frozen=True):
    """How much is measured: prompts up to `longest`, points to fit and to check with.

    A reading lasts `reading_s` or more: the system counts busy processors in hundredths of a
    second. All waits for quiet together last `patience_s` at most.
    """

    longest: int = 1024
    max_batch: int = 16
    rounds: int = 3
    decodes: int = 64
    held_out: int = 32
    copies: int = 8
    steps: int = 400
    reading_s: float = 0.25
    patience_s: float = 100.0


class Reading(msgspec.Struct, frozen=True):
    """`disturbed`: processors, of those that we compute on, that others had meanwhile."""

    sample: Sample
    disturbed: float


class Meter:
    """Times runs while others leave us the processors that we need; waits for that, not for ever.

    `readings` counts all, `disturbed` those that others disturbed.
    """

    def __init__(self, threads: int, scale: Scale) -> None:
        """`threads` compute."""
        self._spare = (os.cpu_count() or 1) - threads
        self._patience_s = scale.patience_s
        self._reading_s = scale.reading_s
        self.readings = 0
        self.disturbed = 0

    def read(self, run: Run) -> Reading:
        """Return the middle of enough runs."""
        self._await_quiet()
        samples: list[Sample] = []

        def repeat() -> None:
            while sum(sample.took_s for sample in samples) < self._reading_s:
                samples.append(run())

        disturbed = self._disturbance(repeat)
        self.readings += 1
        self.disturbed += disturbed > MARGIN
        return Reading(middle(samples), disturbed)

    def _await_quiet(self) -> None:
        give_up_s = self._patience_s - LONGEST_WAIT_S
        while self._patience_s > max(0.0, give_up_s):
            if self._disturbance(lambda: time.sleep(LOOK_S)) <= MARGIN:
                return
            self._patience_s -= LOOK_S

    def _disturbance(self, run: Callable[[], None]) -> float:
        start_s, busy_s, own_s = time.perf_counter(), busy_seconds(), time.process_time()
        run()
        used_s = busy_seconds() - busy_s - (time.process_time() - own_s)
        return max(0.0, used_s / (time.perf_counter() - start_s) - self._spare)


def busy_seconds() -> float:
    """Return the seconds in which all processors together have worked since the system began."""
    first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _, _, *rest = map(int, first.split()[1:9])
    return float(user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def measure(meter: Meter, runs: Sequence[Run], rounds: int, rng: random.Random) -> list[Sample]:
    """Return a sample for each of `runs`: the middle of its least disturbed readings, in `rounds`
    rounds through all of them, each in another order, so that a spell does not fall on one."""
    readings: list[list[Reading]] = [[] for _ in runs]
    for round_ in range(rounds):
        progress(f"  round {round_ + 1} of {rounds}, {len(runs)} points")
        for index in rng.sample(range(len(runs)), len(runs)):
            readings[index].append(meter.read(runs[index]))
    return [quietest(some) for some in readings]


def quietest(readings: Sequence[Reading]) -> Sample:
    """Return the middle of the least disturbed."""
    least = min(reading.disturbed for reading in readings)
    return middle([one.sample for one in readings if one.disturbed <= least + MARGIN])


# Points


def prompts(longest: int, most: int) -> list[tuple[int, ...]]:
    """Return the lengths of prompts that are prefilled together, for a fit."""
    singles, length = [], SHORTEST
    while length <= longest:
        singles.append((length,))
        length *= 2
    several = ((8,) * 4, (16,) * 8, (32, 64, 128), (64,) * 4, (256, 128, 64), (300, 100))
    return singles + [one for one in several if sum(one) <= longest and len(one) <= most]


def any_prompts(longest: int, most: int, rng: random.Random) -> tuple[int, ...]:
    """Return lengths at random: mostly of one prompt, never more than `longest` together."""
    most = max(1, min(most, longest // (2 * SHORTEST)))
    count = rng.choice((1, 1, *range(1, most + 1)))
    top = longest // count
    return tuple(round(SHORTEST * (top / SHORTEST) ** rng.random()) for _ in range(count))


def batch_lengths(scale: Scale) -> list[int]:
    """Return the prompts of the sequences that decode together: short ones to the longest."""
    ratio = scale.longest / SHORTEST
    last = max(1, scale.max_batch - 1)
    return [round(SHORTEST * ratio ** (at / last)) for at in range(scale.max_batch)]


# Actions


class Bench:
    """One model of an opened engine that is resident.

    Where one thread computes, the points are timed by that thread's own clock, which stands still
    while others have its processor: on a machine that is never quiet the times are those of one
    that is. What is served is timed by the clock on the wall.
    """

    def __init__(self, driver: Driver, spec: ModelSpec, threads: int) -> None:
        """Give the device to the model."""
        self._driver = driver
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self.spec = spec
        self._held: dict[str, int] = {}  # tokens of the sequences that decode
        self._grown = 0  # steps since they were empty
        driver.load(spec.id)
        driver.switch(spec.id)

    def prefill(self, lengths: tuple[int, ...]) -> Sample:
        """Prefill prompts together, and forget them."""
        sample, requests = self._prefill(lengths)
        for request in requests:
            self._forget(request)
        return sample

    def switch(self) -> float:
        """Give the device to the model; return the seconds."""
        return self._driver.switch(self.spec.id)

    def decode_some(self, which: Sequence[int], lengths: Sequence[int]) -> Sample:
        """Make the next token of those numbered `which` of sequences with prompts of `lengths`,
        which are kept until they have grown too long."""
        if len(self._held) != len(lengths) or self._grown >= MOST_GROWN:
            self.let_go()
            for length in lengths:
                self._prefill((length,))
        requests = tuple(self._held)
        return self.decode([requests[index] for index in which])

    def decode(self, requests: Sequence[str]) -> Sample:
        """Make the next token of each."""
        amounts = float(sum(self._held[request] for request in requests)), float(len(requests))
        took_s = self._execute(Decode(self.spec.id, tuple(requests)))
        for request in requests:
            self._held[request] += 1
        self._grown += 1
        return Sample(amounts, took_s)

    def let_go(self) -> None:
        """Forget the sequences that are held."""
        for request in tuple(self._held):
            self._forget(request)
        self._grown = 0

    def serve(self, scale: Scale, rng: random.Random) -> Iterator[Step]:
        """Yield the steps of a load at random: prompts come in, some sequences end, all decode."""
        self._clock = time.perf_counter
        for _ in range(scale.steps):
            room = scale.max_batch - len(self._held)
            if room and (not self._held or rng.random() < 1 / MOST_IN_BATCH):
                most = min(room, MOST_IN_BATCH)
                lengths = any_prompts(scale.longest // 2, most, rng)
                yield Step("prefill", self._prefill(lengths)[0])
            else:
                yield Step("decode", self.decode(tuple(self._held)))
                for request in tuple(self._held):
                    if rng.random() < 1 / (2 * scale.max_batch):
                        self._forget(request)
        self.let_go()

    def _prefill(self, lengths: tuple[int, ...]) -> tuple[Sample, list[str]]:
        requests = [self._driver.submit(self.spec.id, length, 2 * MOST_GROWN) for length in lengths]
        took_s = self._execute(Prefill(self.spec.id, tuple(requests)))
        for request, length in zip(requests, lengths, strict=True):
            self._held[request] = length + 1
        squares = sum(length * length for length in lengths)
        return Sample((float(sum(lengths)), float(squares)), took_s), requests

    def _execute(self, action: ComputeAction) -> float:
        began_s = self._clock()
        self._driver.execute(action)
        return self._clock() - began_s

    def _forget(self, request: str) -> None:
        del self._held[request]
        self._driver.release(request)
