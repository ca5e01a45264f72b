"""Benchmarks on a CUDA device: what they say where there is none, and how its limits are found."""

import pytest
import torch

from aegaeon import cli
from benchmark import engine, switch
from benchmark.device_limits import DeviceProbe
from benchmark.limits import Pace
from benchmark.random_model import SMALL, write_model
from tests.support.cuda_device import why_no_device

NONE = "cuda:99"  # that nobody has


@pytest.mark.parametrize("benchmark", [engine, switch])
def test_without_the_device_they_end_with_the_line_of_the_server(benchmark, tmp_path, capsys):
    write_model(tmp_path / "small", SMALL)
    flags = ["--device", NONE, "--models", str(tmp_path / "small")]
    assert cli.main(["serve", *flags]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("aegaeon: error: ") and "\n" not in said
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--quick", "--device", NONE, "--dir", str(tmp_path / "none")])
    assert str(ended.value) == said


@pytest.mark.parametrize("benchmark", [engine, switch])
def test_what_is_no_device_is_refused(benchmark):
    with pytest.raises(SystemExit, match="--device is cpu or cuda:N, not cuda:x"):
        benchmark.main(["--device", "cuda:x"])


def test_on_a_device_kinds_are_those_that_it_computes(capsys):
    assert engine.parse(["--device", "cuda:0"]).kinds == ["bf16 x bf16"]
    assert engine.parse([]).kinds == ["bf16", "bf16 x bf16", "int8"]
    with pytest.raises(SystemExit):
        engine.parse(["--device", "cuda:0", "--kinds", "int8"])
    assert "on cuda:0, not int8" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def test_limits_are_what_torch_makes_of_a_copy_and_a_product(device):
    if device != "cpu" and (reason := why_no_device(is_torch_needed=True)):
        pytest.skip(reason)
    probe = DeviceProbe(torch.device(device), Pace(2, 0.001, 0.1), 1 << 20)
    assert probe.size_bytes == 2 << 20
    limits, rows = probe.limits(), probe.rows()
    figures = [limits.read_gb_per_s, limits.gflop_per_s, limits.pair_gflop_per_s]
    assert [row.ours for row in rows] == figures and all(figure > 0 for figure in figures)
    assert [row.case.partition(" of ")[0] for row in rows][1:] == [
        "limit: float32 product", "limit: bf16 product"
    ]  # fmt: skip
    assert all(f"by torch {torch.__version__} on {device}" in row.case for row in rows)
