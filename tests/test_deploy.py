"""What stands in deploy/ names metrics, files and flags that there are."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as families

from aegaeon.cli import serve_parser
from aegaeon.figures import ModelFigures, Sums
from aegaeon.proxy.metrics_text import Text, write
from tests.proxy.test_metrics_text import PUBLISHED
from tests.support.specs import make_instance

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana.json").read_text())


def exposed():
    """Every name that /metrics has, with the labels of its samples."""
    figures = ModelFigures(
        finished={"stop": 1}, within={"both": 1}, failed={"timeout": 1}, generated_tokens=1
    )
    sums = Sums(
        models={"m": figures},
        instances={"i": PUBLISHED},
        responses={"/metrics": {"200": 1}},
        dropped={"overloaded": 1},
        traces={"lost": 1},
    )
    text = Text()
    text.begin(is_openmetrics=False)
    row = make_instance("i", ("m",), resident=("m",), current="m", waiting={"m": 1})
    write(text, sums, (row,), ("m",))
    found = {}
    for family in families(text.end().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def panels():
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def queries():
    asked = [(panel["title"], t["expr"]) for panel in panels() for t in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return asked + [(rule["alert"], rule["expr"]) for group in rules for rule in group["rules"]]


def labels_of(query):
    """The labels that a query selects or groups by."""
    grouped = re.findall(r"by \(([^)]*)\)", query)
    selected = re.findall(r"\{([^}]*)\}", query)
    names = {name.strip() for group in grouped for name in group.split(",")}
    return names | {m for part in selected for m in re.findall(r"(\w+)\s*[=!]", part)}


@pytest.mark.parametrize(("title", "query"), queries(), ids=lambda value: value[:30])
def test_every_query_asks_for_what_is_exposed(title, query):
    found = exposed()
    names = re.findall(r"\baegaeon_\w+", query)
    assert names and set(names) <= found.keys()
    assert labels_of(query) <= set().union(*(found[name] for name in names))
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)


def test_every_metric_stands_on_the_board_or_is_one_of_few_that_need_none():
    asked = " ".join(query for _, query in queries())
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed()}
    left = {name for name in plain if name not in asked}
    assert left == {
        *("aegaeon_build_info", "aegaeon_moves_total"),
        *("aegaeon_kv_bytes", "aegaeon_kv_budget_bytes"),  # their share is there
    }


def test_panels_have_ids_and_places_of_their_own():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_legends_and_variables_name_labels_and_metrics_that_there_are():
    found = exposed()
    for panel in panels():
        assert panel["description"].endswith(".")
        for target in panel["targets"]:
            names = re.findall(r"\baegaeon_\w+", target["expr"])
            there = set().union(*(found[name] for name in names))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= there
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.findall(r"\((\w+), (\w+)\)", variable["query"]["query"])[0]
            assert label in found[metric]


def test_the_scrape_configuration_is_yaml_with_one_job():
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "aegaeon" and job["honor_labels"]


def known_flags():
    return set(re.findall(r"--[a-z-]+", serve_parser("serve").format_help()))


def test_the_flags_and_settings_in_unit_and_image_are_known():
    unit = (DEPLOY / "aegaeon.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    assert set(re.findall(r"--[a-z-]+", command)) <= known_flags()
    image = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", image, re.M)
    assert json.loads(entry)[:2] == ["aegaeon", "serve"]
    assert {word for word in json.loads(entry) if word.startswith("--")} <= known_flags()
    for name in re.findall(r"AEGAEON_(\w+)=", unit + image):
        assert "--" + name.lower().replace("_", "-") in known_flags()


def test_the_image_copies_what_there_is_and_all_that_a_build_needs():
    image = (DEPLOY / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", image, re.M)
        for word in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    needed = {"pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "cmake", "csrc"}
    assert needed | {"aegaeon"} <= copied


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    unit = (DEPLOY / "aegaeon.service").read_text()
    copy = tmp_path / "aegaeon.service"
    # It looks whether the command is there.
    copy.write_text(re.sub(r"^(ExecStart=)\S+", rf"\g<1>{sys.executable}", unit, flags=re.M))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
