"""The README agrees with the code: settings, benchmark flags and make targets."""

import re

from benchmark.offline_qwen3_colocation import make_parser
from tests.support.settings_table import README, with_table

TEXT = README.read_text(encoding="utf-8")


def test_the_settings_table_is_up_to_date():
    assert "| `--port` |" in TEXT
    assert with_table(TEXT) == TEXT, "run: python -m tests.support.settings_table"


def test_every_flag_of_the_offline_benchmark_is_explained():
    section = TEXT.partition("## Offline benchmark")[2].partition("\n## ")[0]
    flags = re.findall(r"--[a-z-]+", make_parser().format_help())
    assert [flag for flag in set(flags) - {"--help"} if f"`{flag}`" not in section] == []


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z0-9-]+):", (README.parent / "Makefile").read_text(), re.M)
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (README.parent / name).read_text(encoding="utf-8")
        named = re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.M)
        assert named and set(named) <= set(targets)
