"""What people read of a layout and a plan: every part, in 80 columns, whatever the names."""

import io

from rich.console import Console

from aegaeon.config import Settings
from aegaeon.memory.budget import Budgets, NodeBudget, lay_out
from aegaeon.memory.machine import DiskRate, Machine
from aegaeon.memory.plan import ModelPlan, Plan
from aegaeon.plan import duration, layout_lines, plan_tables
from tests.support.specs import make_spec

MACHINE = Machine(10_000_000_000, 10_000_000_000)


def make_plan(name: str, link_bytes_per_s: float | None, is_direct: bool = True) -> Plan:
    device = "cpu" if link_bytes_per_s is None else "staged"
    node = lay_out(Settings(device=device, colocated_count=2), [make_spec("a")], MACHINE)
    model = ModelPlan(
        id=name,
        tier="disk",
        weight_bytes=2_000_000_000,
        file_bytes=2_000_000_000,
        kv_token_bytes=46_080,
        kv_tokens=1600,
        sequence_tokens=1234,
        disk=DiskRate(1e9, is_direct),
        from_disk_s=2.0,
        to_device_s=0.25,
        kv_out_s=0.0625,
        kv_in_s=0.0625,
        warm_switch_s=0.375,
        cold_switch_s=2.375,
    )
    return Plan(
        device=device,
        machine=MACHINE,
        node=node,
        shared_bytes=node.shared_bytes,
        total_bytes=node.total_bytes,
        link_bytes_per_s=link_bytes_per_s,
        is_link_measured=True,
        models=(model,),
    )


def shown(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in plan_tables(plan):
        console.print(part, highlight=False)
    return console.file.getvalue()


def test_the_lines_of_a_layout_name_all_its_bytes():
    node = lay_out(Settings(device="staged", colocated_count=2), [make_spec("a")], MACHINE)
    lines = list(layout_lines(node))
    assert any(line.startswith("device: weights: 2 x ") for line in lines)
    assert lines[-1] == f"in all: {node.total_bytes / 1e9:.3f} GB"
    on_cpu = layout_lines(NodeBudget(1, Budgets(1, kv_bytes=1, threads=1)))
    assert not any("device" in line for line in on_cpu)


def test_a_plan_for_a_staged_device_shows_each_step_of_a_switch():
    text = shown(make_plan("a", 8e9))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "a 2.00 s 62.5 ms 250.0 ms 62.5 ms 375.0 ms 2.38 s" in rows
    assert "device: weights" in text and "disk: cache full" in text
    assert "8.00 GB/s in each direction (measured" in text
    assert "in tokens: a 1234." in text


def test_a_plan_for_the_cpu_speaks_of_no_device():
    text = shown(make_plan("a", None))
    assert "pointer change" in text and "2.38 s" in text
    assert "device" not in text and "Link" not in text


def test_a_disk_that_was_not_read_directly_is_told_apart():
    assert "past the page cache" in shown(make_plan("a", None))
    assert "refuses O_DIRECT" in shown(make_plan("a", None, is_direct=False))


def test_a_long_name_leaves_the_numbers_whole():
    text = shown(make_plan("Org/" + 60 * "long", 8e9))
    assert "375.0 ms" in text and "2.38 s" in text and "2.000 GB" in text


def test_a_name_is_no_markup():
    text = shown(make_plan("[b]x[/b]", 8e9))
    assert text.count("[b]x[/b]") == 4  # in two tables and two remarks


def test_times_are_told_in_the_unit_that_reads_well():
    assert (duration(0.00123), duration(1.5)) == ("1.2 ms", "1.50 s")
