"""A layout of bytes in words and tables: what `aegaeon plan` and the banner of `serve` show."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from aegaeon.memory.budget import (
    GRAMMAR_HOST_MOST_BYTES,
    PROCESS_BYTES,
    SHARED_RESERVE_BYTES,
    NodeBudget,
    gb,
)
from aegaeon.memory.machine import DiskRate
from aegaeon.memory.plan import Plan
from aegaeon.memory.room import crowded

TIERS = {
    "device": "device",
    "memory": "cache",
    "disk": "disk: cache full",
}

_GRAMMARS = f"schemas; at most {gb(GRAMMAR_HOST_MOST_BYTES)}"


def layout_rows(node: NodeBudget) -> Iterator[tuple[str, int, int, str]]:
    """Yield (part, how many of it, bytes of each, where it lies); parts without bytes are left
    out."""
    each, count = node.instance, node.instances
    home = "memory of an instance" if each.is_device_in_host else "the device's own memory"
    rows = (
        ("weight cache", 1, node.weight_bytes, "/dev/shm, for all instances"),
        ("keys and values", count, each.kv_bytes, "/dev/shm, a quota for each"),
        ("device: weights", count, each.device_weight_bytes, home),
        ("device: keys and values", count, each.device_kv_bytes, home),
        ("device: workspace", count, each.device_workspace_bytes, "beside those, estimated"),
        ("stage", count, each.stage_bytes, "chunks being read or copied"),
        ("workspace", count, each.workspace_bytes, "a forward pass, estimated"),
        ("process", count, PROCESS_BYTES, "interpreter and libraries"),
        ("grammar host", count, each.grammar_host_bytes, _GRAMMARS),
        ("tables and mailboxes", 1, SHARED_RESERVE_BYTES, "/dev/shm"),
        ("supervisor and proxy", 1, node.front_bytes, "memory"),
    )
    return (row for row in rows if row[2])


def layout_lines(node: NodeBudget) -> Iterator[str]:
    """Yield the layout as lines of text: parts with their bytes, and the sum."""
    for name, count, size, place in layout_rows(node):
        yield f"{name}: {f'{count} x ' if count > 1 else ''}{gb(size)} ({place})"
    yield f"in all: {gb(node.total_bytes)}"


def plan_tables(plan: Plan) -> Iterator[Table | str]:
    """Yield what a person reads of a plan, in order."""
    yield "Bytes"
    yield _layout_table(plan)
    yield "\nModels, once loaded in this order while they fit"
    yield _models_table(plan)
    yield "\nSwitching to a model: warm from the cache, cold from disk, nothing overlapping"
    yield _times_table(plan)
    yield ""
    yield from _remarks(plan)


def _layout_table(plan: Plan) -> Table:
    table = _table("part", "each", "in all", "where")
    for name, count, size, place in layout_rows(plan.node):
        table.add_row(name, f"{count} x {gb(size)}", gb(count * size), place)
    machine = plan.machine
    table.add_row("sum", "", gb(plan.total_bytes), f"of {gb(machine.memory_bytes)} of memory")
    table.add_row(
        "of it shared", "", gb(plan.shared_bytes), f"of {gb(machine.shared_free_bytes)} in /dev/shm"
    )
    return table


def _models_table(plan: Plan) -> Table:
    table = _table("model", "weights", "KV/token", "tokens fit", "lies in")
    for model in plan.models:
        table.add_row(
            escape(model.id),
            gb(model.weight_bytes),
            f"{model.kv_token_bytes / 1000:.1f} kB",
            str(model.kv_tokens),
            TIERS[model.tier],
        )
    return table


def _times_table(plan: Plan) -> Table:
    if plan.link_bytes_per_s is None:
        table = _table("model", "warm", "cold")
        for model in plan.models:
            table.add_row(escape(model.id), "pointer change", duration(model.cold_switch_s))
        return table
    columns = ("disk to cache", "KV out", "weights in", "KV in", "warm", "cold")
    table = _table("model", *columns)
    for model in plan.models:
        steps = (model.from_disk_s, model.kv_out_s, model.to_device_s, model.kv_in_s)
        times = (*steps, model.warm_switch_s, model.cold_switch_s)
        table.add_row(escape(model.id), *map(duration, times))
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _remarks(plan: Plan) -> Iterator[str]:
    counts = {tier: sum(model.tier == tier for model in plan.models) for tier in TIERS}
    cached = len(plan.models) - counts["disk"]
    yield f"The cache holds {cached} of {len(plan.models)} models together."
    if plan.link_bytes_per_s is not None:
        how = "measured, one thread's copy" if plan.is_link_measured else "as set"
        yield f"A device holds {counts['device']} of {len(plan.models)} models together."
        yield f"Link: {_rate(plan.link_bytes_per_s)} in each direction ({how})."
    if plan.total_bytes > plan.machine.unused_bytes:
        yield f"Warning: {crowded(plan.node, plan.machine)}."
    files: dict[DiskRate, list[str]] = {}
    for model in plan.models:
        files.setdefault(model.disk, []).append(escape(model.id))
    for rate, names in files.items():
        how = "measured now, past the page cache"
        if not rate.is_direct:
            how = "measured now, maybe from the page cache: this file system refuses O_DIRECT"
        yield f"Disk, for {', '.join(names)}: {_rate(rate.bytes_per_s)} ({how})."
    if plan.link_bytes_per_s is not None:
        longest = (f"{escape(model.id)} {model.sequence_tokens}" for model in plan.models)
        yield f"KV is that of one full sequence, in tokens: {', '.join(longest)}."


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
