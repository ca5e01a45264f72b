"""The loads that benchmark/simulate.py runs: the published ones, and variations of them."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.load_flags import Case, read_costs
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs
from aegaeon.scheduler.policies import Policy
from aegaeon.sim.cluster import Extras, Failure
from aegaeon.sim.fleets import make_fleet, policy_of
from aegaeon.sim.report import Report
from aegaeon.sim.workloads import Load, lengths_of, poisson, prepare, read_load
from aegaeon.simulate import run_case
from benchmark.report_rows import progress

SHIFT_S = 37.0
TARGET = Target()


class Workload(msgspec.Struct, frozen=True):
    """Published files laid over each other; `sizes` are their numbers of models."""

    sizes: tuple[int, ...]
    rate: str = "0.1"  # requests per second of a model
    scales: str = "1.0-1.0"  # of inputs and outputs
    tile: int = 1

    @property
    def horizon_s(self) -> float:
        """How long the files last."""
        return 60.0 if self.rate == "0.5" else 120.0

    @property
    def models(self) -> int:
        """All models."""
        return sum(self.sizes)

    @property
    def name(self) -> str:
        """As people call it."""
        inputs, outputs = self.scales.split("-")
        words = f"{'+'.join(map(str, self.sizes))} models at {self.rate}/s"
        words += f", inputs x{float(inputs):g}" if inputs != "1.0" else ""
        words += f", outputs x{float(outputs):g}" if outputs != "1.0" else ""
        return words + (f", {self.tile} times" if self.tile > 1 else "")


class Bench:
    """Reads loads from `data` and runs them on so many devices; what ran once is remembered."""

    def __init__(self, data: Path, devices: int = 16) -> None:
        """Raises ConfigError when there is no data."""
        self.data = data
        self.devices = devices
        if not (data / "paper").is_dir():
            raise ConfigError(f"no {data / 'paper'} with the published loads; give --data DIR")
        self.costs = read_costs(data / "paper" / "h100-cost-model.json")
        self._reports: dict[tuple[Workload, str, float], Report] = {}

    def load(self, workload: Workload) -> list[Load]:
        """Return the loads of the files."""
        names = [f"synth-{n}-{workload.rate}-{workload.scales}.csv" for n in workload.sizes]
        return [read_load(self.data / "paper" / name, workload.horizon_s) for name in names]

    def case(self, workload: Workload, target: Target = TARGET) -> Case:
        """Return it ready to run."""
        return self.case_of(self.load(workload), target, workload.horizon_s, workload.tile)

    def case_of(
        self,
        loads: Sequence[Load],
        target: Target = TARGET,
        horizon_s: float = 120.0,
        tile: int = 1,
        costs: Costs | None = None,
    ) -> Case:
        """Return `loads` over each other ready to run, with other costs if some are given."""
        costs = self.costs if costs is None else costs
        load, models = prepare(loads, costs, SHIFT_S, horizon_s, tile)
        return Case(load, models, costs, target)

    def generated(self, models: int, rate: float, lengths: Path, zipf: float = 0.0) -> Load:
        """Return a load of two minutes with the lengths of a file."""
        return poisson(models, rate, 120.0, lengths_of(read_load(lengths)), zipf=zipf)

    def run(self, workload: Workload, policy: str, scale: float = 1.0) -> Report:
        """Return what becomes of it with targets of `scale` times the usual ones."""
        key = (workload, policy, scale)
        if key not in self._reports:
            case = self.case(workload, scaled(scale))
            self._reports[key] = self.run_case(case, policy, f"{workload.name}, targets x{scale}")
        return self._reports[key]

    def run_case(
        self, case: Case, policy: str | Policy, name: str, failures: Sequence[Failure] = ()
    ) -> Report:
        """Return what becomes of `case`, which people know as `name`."""
        chosen = policy_of(policy) if isinstance(policy, str) else policy
        fleet = make_fleet(chosen.name, self.devices, case.target)
        extras = Extras(failures=failures)
        report, _ = run_case(case, chosen, fleet, extras)
        progress(
            f"{chosen.name}, {name}: {report.attainment_request:.3f} of {report.requests} "
            f"requests, {report.wall_s:.2f} s"
        )
        return report


def scaled(scale: float) -> Target:
    """Return so much of the usual targets."""
    return Target(TARGET.ttft_s * scale, TARGET.tbt_s * scale)
