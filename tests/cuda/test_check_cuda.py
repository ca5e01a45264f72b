"""`make check-cuda` fails where it cannot tell anything, and says what is missing."""

from xml.etree import ElementTree

import pytest

from tests.support import check_cuda

KERNEL, FAULT = ("cuda kernel", "attend_short"), ("cuda fault", "a mutant")


def case(*properties):
    found = ElementTree.Element("testcase", name="test_one")
    for name, value in properties:
        ElementTree.SubElement(found, "property", name=name, value=value)
    return found


def test_a_run_with_kernels_faults_and_all_lines_passes(capsys):
    assert check_cuda.report([case(KERNEL), case(FAULT)], 10, []) == 0
    assert "1 kernels compiled, none spills; 1 faults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cases", "lines", "unrun"),
    [
        ([case(FAULT)], 10, []),
        ([case(KERNEL)], 10, []),
        ([], 0, []),
        ([case(KERNEL), case(FAULT)], 10, ["attend.cu:3"]),
    ],
)
def test_a_run_that_tells_nothing_fails(cases, lines, unrun):
    assert check_cuda.report(cases, lines, unrun) == 1


def test_without_a_toolkit_it_fails_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(check_cuda, "find_toolkit", lambda: None)
    monkeypatch.setattr(check_cuda.shutil, "which", lambda _: None)
    assert check_cuda.main() == 1
    told = capsys.readouterr().out
    assert "missing: the CUDA toolkit's headers; install it" in told
    assert "missing: gcov" in told


def test_headers_alone_are_not_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(check_cuda, "find_toolkit", lambda: tmp_path)
    assert check_cuda.missing()[0].startswith("nvcc in ")
