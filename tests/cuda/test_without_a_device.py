"""What `pytest -m cuda` says where there is no device: of every test why it was skipped."""

import re
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

from tests.support.cuda_device import why_no_device
from tests.support.sanitized import ROOT


def test_every_test_of_a_device_is_skipped_and_says_why(tmp_path):
    if not why_no_device(is_torch_needed=True):
        pytest.skip("there is a device")
    results = tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "cuda"]
    command += [f"--junitxml={results}", "tests/cuda", "tests/benchmark/test_device_limits.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    reasons = Counter(case.find("skipped").get("message") for case in cases)
    assert sum(reasons.values()) == len(cases) > 100
    # Whatever this machine lacks, and what to do about it.
    told = re.compile(
        r"AEGAEON_CUDA=1|install it \(nvidia-smi|here has no CUDA|no CUDA device here"
    )
    assert all(told.search(reason) for reason in reasons), reasons
