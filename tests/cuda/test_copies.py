"""The copy engine's CUDA backend without a GPU: on a stand-in for the CUDA runtime, in eager, lazy
and random orders, with calls that fail; and bugs put into it, which must all be found."""

import itertools
from pathlib import Path

import pytest

from tests.support.cuda_toolkit import the_toolkit
from tests.support.sanitized import CSRC, SANITIZERS, compile_one, link, run, run_sanitized

# It takes long; `make check-cuda` and `make test-all` run it.
pytestmark = pytest.mark.thorough

PROGRAM = "cuda_copies"
LAZY = "1"
ORDERS = {"eager": "0", "lazy": LAZY, "random": "2"}
COPIES, ENGINE = CSRC / "cuda" / "copies.cpp", CSRC / "copy" / "engine.cpp"
DEVICE, PLACES = CSRC / "cuda" / "device.cpp", CSRC / "cuda" / "places.cpp"
SOURCES = [
    source
    for part in ("copy", "cuda", "testing/cudart")
    for source in sorted((CSRC / part).glob("*.cpp"))
] + [CSRC / "shm" / "futex.cpp"]

RECORD = "  slot.done.record(slot.stream);\n"
ISSUE = "  copy::for_each_piece(flight, [&]"
# What is left out or changed, where, and what must be heard of it.
MUTANTS = {
    "a stage that is used again before it was read": (
        COPIES,
        (("slot.stage.base() + slot.staged_bytes", "slots_.front().stage.base()"),),
    ),
    "a chunk more under way than there are stages": (
        COPIES,
        (("return slots_.size(); }", "return slots_.size() + 1; }"),),
    ),
    "no wait for the event of a chunk": (COPIES, (("slot.done.wait();", ""),)),
    "an event that is recorded before the copy": (
        COPIES,
        ((RECORD, ""), (ISSUE, RECORD + ISSUE)),
    ),
    "a copy over what kernels still use": (
        COPIES,
        (("fence->event.hold_back(slot.stream);", "(void)fence;"),),
    ),
    "a fence that holds back one stream of two": (
        COPIES,
        (("fence->event.hold_back(slot.stream);", "fence->event.hold_back(stream_.handle());"),),
    ),
    "a fence behind nothing": (
        COPIES,
        (("    fence->event.record(device_->compute());\n", ""),),
    ),
    "a stage that is read before the device wrote it": (
        COPIES,
        (
            (
                "slot.to_deliver.push_back({to, reachable, bytes});",
                "copy::copy_on_host(to, reachable, bytes, false);",
            ),
        ),
    ),
    "a chunk that failed half issued": (
        COPIES,
        (("    settle(slot);  // of what has been issued\n", ""),),
    ),
    "a chunk that nobody waits for after a failure": (
        COPIES,
        (("  } catch (...) {\n    settle(slot);\n    throw;", "  } catch (...) {\n    throw;"),),
    ),
    "a move over itself without a third place": (
        COPIES,
        (("if (is_overlapping(piece)) {", "if (is_overlapping(piece) && bytes == 0) {"),),
    ),
    "memory that the device cannot reach": (
        COPIES,
        (("    if (source.place == Place::pageable) {", "    if (false) {"),),
    ),
    "one chunk at a time": (COPIES, (("return slots_.size(); }", "return 1; }"),)),
    "memory that another device's thread locks": (
        DEVICE,
        (("  use_device(number_);\n  unsigned flags", "  unsigned flags"),),
    ),
    "memory that is only read, locked to be written": (
        DEVICE,
        (("flags |= cudaHostRegisterReadOnly;", "(void)has_flag;"),),
    ),
    "a flag that the driver does not know": (
        DEVICE,
        (("if (is_read_only && has_flag)", "if (is_read_only)"),),
    ),
    "pieces that stay locked after a refusal": (
        PLACES,
        (("    for (const std::uintptr_t piece : pieces_) unregister(piece);\n", ""),),
    ),
    "a copy across the border of two pieces": (
        PLACES,
        (("std::min(bytes, range.bytes - (begin - start))};", "bytes};"),),
    ),
    "an unlock of the first piece alone": (
        PLACES,
        (("    while (piece != ranges_.end()", "    if (piece != ranges_.end()"),),
    ),
    "a thread that cannot begin and says nothing": (
        ENGINE,
        (('    lose("a copy thread cannot begin: " + failure->what);\n', ""),),
    ),
    "a loss that nobody else is told": (
        ENGINE,
        (("  queue_.lose_all(why, now_ns());\n", ""),),
    ),
    "a cancellation that does not wait": (
        ENGINE,
        (("  changed_.wait(lock, [&] { return ticket->touching == 0; });\n", ""),),
    ),
}


@pytest.fixture(scope="module")
def flags() -> list[str]:
    return ["-isystem", str(the_toolkit() / "include")]


@pytest.mark.parametrize(
    ("sanitizer", "order"),
    [
        pytest.param(*case, marks=() if case[1] == "random" else pytest.mark.thorough)
        for case in itertools.product(SANITIZERS, ORDERS)
    ],
)
def test_copies_are_right_in_every_order_and_whatever_fails(sanitizer, order, flags):
    run_sanitized(PROGRAM, SOURCES, sanitizer, ORDERS[order], flags=flags)


# The others are of the same kinds: `make check-cuda` runs them.
QUICK = {
    "a stage that is used again before it was read",
    "a copy over what kernels still use",
    "memory that is only read, locked to be written",
    "a loss that nobody else is told",
}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in MUTANTS],
)
def test_a_bug_that_is_put_in_is_found(name, flags, tmp_path, record_property):
    original, changes = MUTANTS[name]
    text = original.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"the mutant has nothing to change: {old}"
        text = text.replace(old, new)
    mutant = tmp_path / "mutant.cpp"
    mutant.write_text(text, encoding="utf-8")
    result = run(build(mutant, original, flags, tmp_path), LAZY)
    assert result.returncode != 0, "the mutant survives"
    # Either what went wrong is named, or an error came where there is none without the mutant.
    assert result.stderr.startswith((f"{PROGRAM}: ", "terminate called after throwing"))
    record_property("cuda fault", name)


def build(mutant: Path, original: Path, flags: list[str], directory: Path) -> Path:
    """Link the program with `mutant` in place of `original`; the rest is compiled once for all."""
    sources = [source for source in SOURCES if source != original]
    sources += [CSRC / "testing" / f"{PROGRAM}.cpp", mutant]
    objects = [compile_one(source, "", flags) for source in sources]
    return link(str(directory / PROGRAM), objects, "")
