"""What a load puts where, held against numpy; what it says of files that are not as they were."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from aegaeon import _native
from aegaeon.errors import CheckpointError, LoadCancelled
from tests.support.weight_files import (
    FROM_BF16,
    FROM_F16,
    NO_CONVERSION,
    QUANTIZED_TILES,
    ROWS,
    TILES,
    Plan,
    key,
    plain,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(region_path):
    cache = _native.WeightCache.open_or_create(region_path, 1 << 28)
    yield cache
    for number in range(4):
        cache.evict(key(number))


def load(cache, plan, threads=2):
    model = plan.acquire(cache)
    assert model.is_loader
    model.load(plan.jobs, threads)
    assert model.pin()
    return model


SHAPES = [(1, 1), (31, 7), (32, 32), (33, 31), (64, 64), (100, 48), (5, 4097), (3000, 333)]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_tiles_hold_32_rows_column_by_column(cache, tmp_path, rows, columns, dtype):
    plan = Plan(tmp_path / "file", before=77)
    rng = np.random.default_rng(rows)
    plan.add(rng.integers(0, 1 << 16, (rows, columns)).astype(dtype), TILES)
    model = load(cache, plan.write())
    plan.check(model)
    model.unpin()


@pytest.mark.parametrize("convert", [NO_CONVERSION, FROM_BF16, FROM_F16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_quantized_tiles_hold_what_numpy_rounds(cache, tmp_path, rows, columns, convert):
    plan = Plan(tmp_path / "file", before=77)
    rng = np.random.default_rng(rows)
    matrix = rng.standard_normal((rows, columns), np.float32)
    if convert == FROM_BF16:
        matrix = (matrix.view(np.uint32) >> 16).astype(np.uint16)
    elif convert == FROM_F16:
        matrix = matrix.astype(np.float16).view(np.uint16)
    plan.add(matrix, QUANTIZED_TILES, convert)
    model = load(cache, plan.write())
    plan.check(model)
    model.unpin()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_int8_cannot_hold_fails_that_load_alone(cache, tmp_path, bad):
    plan, other = Plan(tmp_path / "file", before=64), Plan(tmp_path / "other")
    for one in (plan, other):
        one.add(np.ones((100, 70), np.float32), QUANTIZED_TILES)
        one.write()
    content = plan.path.read_bytes()
    plan.path.write_bytes(content[:-4] + np.float32(bad).tobytes())
    with pytest.raises(CheckpointError, match=r"file: the tensor at byte 64 holds infinity or NaN"):
        plan.acquire(cache).load(plan.jobs, 2)
    model = other.acquire(cache, 1)
    model.load(other.jobs, 2)
    other.check(model)


def test_every_16_bit_pattern_becomes_the_float_it_stands_for(cache, tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    plan = Plan(tmp_path / "file")
    plan.add(patterns, ROWS, FROM_BF16)
    plan.add(patterns, ROWS, FROM_F16)
    plan.add(patterns.reshape(64, -1), TILES, FROM_BF16)
    model = load(cache, plan.write())
    memory = np.frombuffer(model, np.uint8)
    for offset, wanted in plan.wanted:
        got = memory[offset : offset + wanted.nbytes].view(np.float32)
        assert np.array_equal(got, wanted.reshape(-1), equal_nan=True)
    model.unpin()


@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_of_many_files_and_stages_end_in_their_places(cache, tmp_path, threads):
    rng = np.random.default_rng(3)
    plan = Plan(tmp_path / "file", before=5)
    for stage in range(6):
        plan.add(rng.integers(0, 1 << 16, (1, 576)).astype(np.uint16), ROWS, FROM_BF16, stage)
        plan.add(rng.integers(0, 1 << 16, (700, 576)).astype(np.uint16), TILES, stage=stage)
        plan.add(rng.integers(0, 256, (3, 1_500_000)).astype(np.uint8), stage=stage)
    model = load(cache, plan.write(), threads)
    assert model.stages_done == 6
    plan.check(model)
    model.unpin()


def test_gaps_between_tensors_are_zero_and_take_their_room_at_once(cache, tmp_path, region_path):
    plan = plain(tmp_path / "file", stages=1, stage_bytes=4096)
    job = plan.jobs[0]
    jobs = [(*job[:7], offset, *job[8:]) for offset in (64 * 1000, 64 * 9000)]
    model = cache.acquire(key(0), "gaps", 1 << 20, 1, 1.0)
    model.load(jobs, 1)
    (data,) = Path(region_path).parent.glob(f"{Path(region_path).name}+*")
    assert data.stat().st_blocks * 512 == 1 << 20
    assert not np.frombuffer(model, np.uint8)[: 64 * 1000].any()


BROKEN = {
    "sizes": {2: 65535}, "rows": {3: 0}, "elements": {5: 3}, "layout": {6: 3},
    "alignment": {7: 32}, "end": {7: 1 << 30}, "stage": {8: 4}, "conversion": {9: 3},
    "convert bytes": {9: 1}, "halves to int8": {5: 2, 6: 2}, "bytes to int8": {6: 2, 9: 1},
    "no elements": {5: 0}, "overflow": {3: 1 << 63},
}  # fmt: skip


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
def test_jobs_that_make_no_sense_are_refused_and_it_may_be_loaded_anew(cache, tmp_path, changes):
    plan = plain(tmp_path / "file")
    job = list(plan.jobs[1])
    for at, value in changes.items():
        job[at] = value
    model = plan.acquire(cache)
    with pytest.raises(CheckpointError, match="the load of"):
        model.load([plan.jobs[0], tuple(job)], 1)
    other = plan.acquire(cache)
    assert other.is_loader
    other.load(plan.jobs, 1)
    plan.check(other)


def test_overlapping_destinations_and_disordered_stages_are_refused(cache, tmp_path):
    plan = plain(tmp_path / "file")
    for place, error in ((7, "overlaps"), (8, "behind that of a later stage")):
        job = list(plan.jobs[2])
        job[place] = plan.jobs[1][place] if place == 7 else 0
        with pytest.raises(CheckpointError, match=error):
            plan.acquire(cache).load([*plan.jobs[:2], tuple(job)], 1)


def cut(path):
    os.truncate(path, 70_000)


def remove(path):
    path.unlink()


def make_directory(path):
    path.unlink()
    path.mkdir()


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


def make_memory(path):
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "ends at 70000 bytes"), (remove, "No such file"), (make_directory, "is not a file"),
        (make_fifo, "is not a file"), (make_memory, "ends at 0 bytes"),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_of_its_model_for_all_who_wait(cache, tmp_path, harm, message):
    plan = plain(tmp_path / "file")
    good = plain(tmp_path / "good", seed=1)
    kept = good.acquire(cache, 1)
    kept.load(good.jobs, 1)
    harm(plan.path)
    model, waiter = plan.acquire(cache), plan.acquire(cache)
    for use in (lambda: model.load(plan.jobs, 2), lambda: waiter.wait_stage(1, 5.0)):
        with pytest.raises(CheckpointError, match=rf"{plan.path} .*{message}.*; download or"):
            use()
    assert not waiter.pin()
    assert cache.used_bytes == good.size_bytes
    good.check(kept)
    plan.path.rmdir() if plan.path.is_dir() else plan.path.unlink(missing_ok=True)
    plain(plan.path)
    again = plan.acquire(cache)
    assert again.is_loader
    again.load(plan.jobs, 1)
    plan.check(again)


def test_a_file_that_is_cut_or_written_to_during_the_load_is_an_error(cache, tmp_path):
    plan = plain(tmp_path / "file", stages=8, stage_bytes=8 << 20)
    for change in (lambda: os.truncate(plan.path, 1 << 20), plan.path.touch):
        model = plan.acquire(cache)
        failures = []

        def run(model=model, failures=failures):
            try:
                model.load(plan.jobs, 1)
            except CheckpointError as error:
                failures.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        assert model.wait_stage(1, 10.0)
        change()
        thread.join()
        assert failures, "the change came too late to be seen"
        assert "was changed while" in failures[0] or "ends at" in failures[0]
        plain(plan.path, stages=8, stage_bytes=8 << 20)


@pytest.mark.parametrize("stop", ["cancel", "close", "cache"])
def test_a_load_that_is_stopped_may_be_taken_over_where_it_was(cache, tmp_path, region_path, stop):
    plan = plain(tmp_path / "file", stages=24, stage_bytes=4 << 20)
    mine = _native.WeightCache.open_or_create(region_path, 1 << 28)
    model, waiter = plan.acquire(mine), plan.acquire(cache)
    assert not waiter.take_over()
    ended = []

    def run():
        try:
            model.load(plan.jobs, 1)
        except LoadCancelled as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert waiter.wait_stage(1, 10.0)
    {"cancel": model.cancel, "close": model.close, "cache": mine.close}[stop]()
    thread.join()
    assert ended, "the load was over before it was stopped"
    assert not waiter.wait_stage(plan.stages, 60.0)
    before, read = waiter.stages_done, cache.bytes_read
    assert 1 <= before < plan.stages
    assert waiter.take_over()
    assert waiter.is_loader
    waiter.load(plan.jobs, 2)
    assert cache.bytes_read - read == (plan.stages - before) * (4 << 20)
    plan.check(waiter)


FULL = """
    import sys
    from pathlib import Path
    from aegaeon import _native
    from aegaeon.errors import MemoryFull
    from tests.support.weight_files import plain
    directory = Path(sys.argv[1])
    small, large = plain(directory / "small"), plain(directory / "large", stage_bytes=1 << 20)
    cache = _native.WeightCache.open_or_create(str(directory / "shm" / "w"), 64 << 20)
    kept = small.acquire(cache, 1)
    kept.load(small.jobs, 1)
    try:
        large.acquire(cache, 2).load(large.jobs, 2)
    except MemoryFull as error:
        print(error)
    small.check(kept)
    print(cache.used_bytes == small.size_bytes, len(list((directory / "shm").iterdir())))
"""


def test_a_full_shared_memory_is_an_error_of_the_model_that_met_it(tmp_path):
    (tmp_path / "shm").mkdir()
    script = 'mount -t tmpfs -o size=2m none "$1/shm" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh"]
    try:
        made = subprocess.run([*command[:4], "true"], check=False, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so there is no small tmpfs to fill")
    if made.returncode:
        pytest.skip("no user namespaces here, so there is no small tmpfs to fill")
    done = subprocess.run(
        [*command, str(tmp_path), sys.executable, textwrap.dedent(FULL)],
        check=True, capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    error, rest = done.stdout.splitlines()
    assert "No space left on device" in error
    assert "shm-size" in error
    assert rest == "True 2"
