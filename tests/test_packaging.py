"""A source distribution holds what builds the package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_has_the_native_sources_and_the_stubs(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    listed = set((tmp_path / "aegaeon.egg-info" / "SOURCES.txt").read_text().splitlines())
    found = [*(ROOT / "csrc").rglob("*"), *(ROOT / "aegaeon").rglob("*.py*")]
    needed = {str(path.relative_to(ROOT)) for path in found if path.suffix in {".cpp", ".h"}}
    needed |= {str(path.relative_to(ROOT)) for path in found if path.suffix in {".py", ".pyi"}}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "aegaeon/py.typed"}
    assert len(needed) > 100 and sorted(needed - listed) == []
