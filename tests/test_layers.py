"""The layer table of the design, held by reading the imports; nothing here runs our code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aegaeon"

ROW_0 = {"types", "sampling", "specs", "errors", "explanations", "measures", "handles"}
ROW_0 |= {"setting_text", "nodes", "clocks", "placements"}
ROW_1 = {"config", "metrics", "figures", "deaths", "logs", "workload", "_native"}
ROW_2 = {"scheduler", "store", "memory", "device", "engine", "models"}
ROW_3 = {"proxy", "instance", "sim", "transfer"}
ROW_4 = {"cli", "__main__", "supervisor", "child", "plan", "plan_devices", "simulate"}
ROW_4 |= {"plan_day", "day_runs", "day_report"}
ROW_4 |= {"flags", "load_flags", "explain", "keys", "config_command", "models_command"}
ROW_4 |= {"client", "keeper", "reload", "watch", "top", "ports", "holding", "status_command"}
ROW_4 |= {"sharing_command"}
ROW_4 |= {"cluster"}  # composes what one node does on many
PURE = {
    *("time", "datetime", "threading", "asyncio", "multiprocessing", "concurrent", "os", "io"),
    *("sys", "socket", "subprocess", "signal", "pathlib", "random", "logging", "torch", "numpy"),
}

# What each part may import of ours, and what it may not import of anybody's.
ALLOWED = {
    **dict.fromkeys(ROW_0, ROW_0),
    **{part: ROW_0 | {part} for part in ROW_1},
    "figures": ROW_0 | {"metrics", "figures"},  # counts against the one definition of targets
    "scheduler": ROW_0 | (ROW_1 - {"_native"}) | {"scheduler"},
    "store": ROW_0 | ROW_1 | ROW_2 - {"scheduler", "engine"},
    **dict.fromkeys(
        ("memory", "device", "engine", "models"), ROW_0 | ROW_1 | ROW_2 - {"scheduler", "store"}
    ),
    "proxy": ROW_0 | ROW_1 | ROW_2 - {"engine", "device"} | {"proxy"},
    "instance": ROW_0 | ROW_1 | ROW_2 | {"instance"},
    "sim": ROW_0 | ROW_1 | ROW_2 - {"engine", "store"} | {"sim"},
    "transfer": ROW_0 | ROW_1 | {"models", "transfer"},
    **dict.fromkeys(ROW_4, ROW_0 | ROW_1 | ROW_2 | ROW_3 | ROW_4),
}
FORBIDDEN = {
    "scheduler": PURE,
    "store": {"torch"},
    "proxy": {"torch"},
    "transfer": {"torch", "numpy"},
    "sim": {"time", "threading", "torch"},
    **{part: {"torch", "numpy"} for part in ROW_0 | ROW_1},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + sorted(PACKAGE.rglob("*.pyi"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: imports are absolute"
            name = node.module or ""
            if name == "aegaeon":
                yield from (f"aegaeon.{alias.name}" for alias in node.names)
            else:
                yield name


def complaints(path: Path) -> Iterator[str]:
    part = part_of(path)
    if part == "__init__":
        allowed: set[str] = set()
    elif part in ALLOWED:
        allowed = ALLOWED[part]
    else:
        yield f"{path}: {part} stands in no row of the layer table"
        return
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        inner = rest.split(".")[0]
        if top == "aegaeon" and inner not in allowed and inner != "__version__":
            yield f"{path}: {part} may not import {name}"
        if top in FORBIDDEN.get(part, set()):
            yield f"{path}: {part} may not import {name}"


def test_every_module_imports_only_its_row_and_those_above_it():
    assert [line for path in modules() for line in complaints(path)] == []


def test_a_forbidden_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    sources = {
        "types.py": "from aegaeon import config\n",
        "scheduler/a.py": "import time\n",
        "store/b.py": "from aegaeon.engine.base import Engine\n",
        "helpers.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    for name in sources:
        assert len(list(complaints(tmp_path / name))) == 1, name


def test_only_config_reads_the_environment():
    readers = {"environ", "environb", "getenv"}
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                reads = node.value.id == "os" and node.attr in readers
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                reads = any(alias.name in readers for alias in node.names)
            else:
                reads = False
            if reads and path != PACKAGE / "config.py":
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_ray_is_asked_for_in_one_place_and_imported_by_nobody():
    asking = [
        path
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "ray"
    ]
    assert asking == [PACKAGE / "cluster" / "link.py"]
    assert not [path for path in modules() for name in imports_of(path) if name == "ray"]


@pytest.mark.parametrize("module", ["aegaeon.proxy", "aegaeon.proxy.worker"])
def test_the_proxy_never_imports_torch_even_through_others(module):
    script = f"import sys, {module}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
