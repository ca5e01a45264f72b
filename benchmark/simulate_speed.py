"""How fast simulated runs are: on the published load of 80 models, and on a very large one."""

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from aegaeon.sim.workloads import lengths_of, poisson, read_load
from benchmark.report_rows import Aim, Row, measured, progress
from benchmark.simulate_cases import Bench, Workload

REPEATS = 5
LARGE_MODELS, LARGE_DEVICES, LARGE_S = 1000, 256, 3600.0
LENGTHS = "synth-80-0.1-1.0-1.0.csv"


def speed(bench: Bench) -> list[Row]:
    """Return the rows of the best of some runs; one core runs them."""
    workload = Workload((80,))
    case = bench.case(workload)
    runs = [bench.run_case(case, "slack", "speed") for _ in range(REPEATS)]
    wall_s = min(run.wall_s for run in runs)
    rate = Row(case="slack, simulated on one core", unit="tokens/s", ours=runs[0].tokens / wall_s)
    took = Row(case=f"slack, {workload.name}: the run", unit="s", ours=wall_s)
    return [
        measured(rate, Aim("ours", 1e6, ">= 1 M")),
        measured(took, Aim("ours", 0.3, "< 0.3 s", is_least=False)),
    ]


def large(data: Path, hours: float = 1.0) -> list[Row]:
    """Return the rows of a run of 1,000 models on 256 devices, in a process of its own, so that its
    memory is known."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_run_large, args=(theirs, data, hours * LARGE_S)
    )
    progress("the large run")
    process.start()
    theirs.close()
    try:
        wall_s, memory_gb, tokens, share = ours.recv()
    finally:
        process.join()
    name = f"slack, {LARGE_MODELS} models on {LARGE_DEVICES} devices, {hours:g} h"
    return [
        measured(
            Row(case=f"{name}: the run", unit="s", ours=wall_s),
            Aim("ours", 120.0, "< 120 s", is_least=False),
        ),
        measured(
            Row(case=f"{name}: memory", unit="GB", ours=memory_gb),
            Aim("ours", 4.0, "< 4 GB", is_least=False),
        ),
        Row(case=f"{name}: simulated", unit="tokens/s", ours=tokens / wall_s),
        Row(case=f"{name}: attainment_request", unit="share", ours=share),
    ]


def _run_large(result: Connection, data: Path, horizon_s: float) -> None:
    bench = Bench(data, LARGE_DEVICES)
    lengths = lengths_of(read_load(data / "paper" / LENGTHS))
    case = bench.case_of([poisson(LARGE_MODELS, 0.1, horizon_s, lengths)], horizon_s=horizon_s)
    report = bench.run_case(case, "slack", "large")
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result.send((report.wall_s, memory_gb, report.tokens, report.attainment_request))
    result.close()
