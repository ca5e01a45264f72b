"""Recording of steps that fails, on the stand-in for a device: a step is run all the same, and only
a lost device ends it. And what is taken of the device before any step is."""

import logging

import pytest
import torch

from aegaeon import _native
from aegaeon.device.cuda_graphs import MOST_FAILURES, Graphs
from aegaeon.engine.cuda import warm_up
from aegaeon.errors import BudgetTooSmall, DeviceError, DeviceLost
from tests.support.cuda_stand_in import EAGER, LAZY
from tests.support.cuda_steps import on_stand_in, operators


@pytest.fixture(params=[EAGER, LAZY], ids=["eager", "lazy"])
def module(request, monkeypatch):
    with on_stand_in(request.param, monkeypatch) as made:
        yield made


class Launches:
    """Of a step: the streams that it was launched on. Elsewhere than on that of `device` it raises
    an `error`, if one is given, the first `spared` times aside."""

    def __init__(self, device, error=None, spared=0):
        self.streams = []
        self._compute = device.stream
        self._error = error
        self._spared = spared

    def __call__(self, stream):
        self.streams.append(stream)
        if stream == self._compute or self._error is None:
            return
        self._spared -= 1
        if self._spared < 0:
            raise self._error("not today")


@pytest.mark.parametrize("error", [RuntimeError, DeviceError])
def test_a_step_that_cannot_be_run_for_a_recording_is_launched(error, module):
    """Its first product on that stream may find no memory."""
    device = _native.CudaDevice(0)
    graphs = Graphs(device)
    failing, good = Launches(device, error), Launches(device)
    for _ in range(4):
        graphs.run("failing", failing)
        graphs.run("good", good)
    # Tried once, and never again; the other is recorded.
    assert [stream == device.stream for stream in failing.streams] == [True, False, *[True] * 3]
    assert len(graphs) == 1 and graphs.launched == 2 and not graphs.refusal


@pytest.mark.parametrize("error", [RuntimeError, DeviceError])
def test_a_step_that_cannot_be_recorded_has_been_run_and_is_launched_from_then_on(error, module):
    device = _native.CudaDevice(0)
    graphs, failing = Graphs(device), Launches(device, error, spared=1)
    for _ in range(3):
        graphs.run("failing", failing)
    assert [stream == device.stream for stream in failing.streams] == [True, False, False, True]
    assert len(graphs) == 0 and not graphs.refusal


@pytest.mark.parametrize("verb", ["synchronize", "allocate"])
def test_what_waits_or_allocates_while_it_is_recorded_is_not_recorded(verb, module):
    device = _native.CudaDevice(0)
    graphs = Graphs(device)
    given = (1 << 12,) if verb == "allocate" else ()
    for _ in range(3):
        graphs.run("step", lambda _: getattr(device, verb)(*given))
    assert len(graphs) == 0 and not graphs.refusal


def test_only_failures_in_a_row_end_all_recording(module, caplog):
    device = _native.CudaDevice(0)
    graphs, good = Graphs(device), Launches(device)
    failing = Launches(device, RuntimeError)

    def run(*keys, launch):
        for key in keys:
            for _ in range(2):
                graphs.run(key, launch)

    with caplog.at_level(logging.WARNING):
        run(*range(MOST_FAILURES - 1), launch=failing)
        run("good", launch=good)
        run(*range(10, 10 + MOST_FAILURES - 1), launch=failing)
        assert not graphs.refusal and not caplog.messages
        run(20, launch=failing)
        run("also good", launch=good)
    assert graphs.refusal == "not today" and len(caplog.messages) == 1
    assert len(graphs) == 1


@pytest.mark.parametrize("spared", [0, 1], ids=["run", "recorded"])
def test_a_device_that_is_lost_under_a_recording_is_no_failure_of_it(spared, module):
    device = _native.CudaDevice(0)
    graphs = Graphs(device)
    in_our_words = Launches(device, DeviceLost, spared)
    graphs.run("step", in_our_words)
    with pytest.raises(DeviceLost, match="not today"):
        graphs.run("step", in_our_words)
    torchs = Launches(device, RuntimeError, spared)

    def in_torchs_words(stream):
        try:
            torchs(stream)
        except RuntimeError:
            module.lose_device(1)
            raise

    graphs.run("another", in_torchs_words)
    with pytest.raises(DeviceLost, match="lost to this process"):
        graphs.run("another", in_torchs_words)
    module.lose_device(0)


def test_each_call_of_the_driver_that_loses_the_device_is_told(module):
    for call in range(1, 30):
        device = _native.CudaDevice(0)
        graphs, launch = Graphs(device), Launches(device)
        graphs.run("step", launch)
        module.lose_device(call)
        try:
            graphs.run("step", launch)
        except DeviceLost:
            assert module.has_failed()
        else:
            assert not module.has_failed()
            break
        finally:
            module.lose_device(0)
    assert 5 < call < 29


# Before the first step


def test_products_of_every_type_begin_on_both_streams(module):
    device = operators(module, tile_rows=8)
    streams, types = [], []
    products = device.compute.products
    on_stream, multiply = products.on_stream, products.multiply

    def noted_stream(stream):
        streams.append(stream)
        return on_stream(stream)

    def noted(x, weight, out):
        types.append((x.dtype, len(x), out.dtype))
        multiply(x, weight, out)

    products.on_stream, products.multiply = noted_stream, noted
    native = device.compute.device
    before = native.free_bytes
    warm_up(native, device, before // 2)
    assert len(set(streams)) == 2 and streams[0] == native.stream
    expected = [(dtype, 8, torch.float32) for dtype in
                (torch.bfloat16, torch.float16, torch.float32)]  # fmt: skip
    assert types == 2 * expected
    assert native.free_bytes == before


def test_a_device_with_too_little_beside_steps_is_refused_with_the_numbers(module):
    device = operators(module)
    native = device.compute.device
    taken = native.allocate(100 << 20)
    expected = r"cuda:0 has 0\.969 GB free of 1\.074 GB beside what steps take, 1\.074 GB are asked"
    with pytest.raises(BudgetTooSmall, match=expected):
        warm_up(native, device, native.total_bytes)
    assert taken.size_bytes == 100 << 20


def test_products_that_find_no_memory_are_told_before_anything_is_served(module):
    device = operators(module)

    def multiply(*_):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    device.compute.products.multiply = multiply
    with pytest.raises(BudgetTooSmall, match=r"GB free of .*cannot begin \(CUBLAS_STATUS_ALLOC"):
        warm_up(device.compute.device, device, 0)
    module.lose_device(1)
    with pytest.raises(DeviceLost):
        warm_up(device.compute.device, device, 0)
    module.lose_device(0)


def test_a_driver_that_makes_no_second_stream_records_nothing(module, monkeypatch):
    def refuse(_):
        raise DeviceError("cannot make a stream")

    monkeypatch.setattr(_native, "CudaRecorder", refuse)
    device = operators(module)
    warm_up(device.compute.device, device, 0)
    assert "make a stream" in device.graphs.refusal
