"""What a step may do while it is recorded, and what its plan shares memory for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.device.base import Operators, Projection, StepInputs
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import pack
from aegaeon.device.recorder import record
from aegaeon.memory.kv import KvShape
from tests.support.eager import EagerCpu
from tests.support.paged import PagedSequences

HIDDEN, HEAD_DIM = 12, 4
HEAD = Projection((pack(torch.eye(HIDDEN), torch.float32),))
WIDEN = Projection((pack(torch.eye(HIDDEN)[:, HEAD_DIM:] + 1, torch.float32),))


def make_inputs(rows: int, seed: int = 0) -> StepInputs:
    draw = torch.Generator().manual_seed(seed)
    batch = PagedSequences(KvShape(1, 1, HEAD_DIM), [rows]).batch([(0, 0, rows)])
    x, cos, sin = (torch.randn(rows, n, generator=draw) for n in (HIDDEN, HEAD_DIM, HEAD_DIM))
    wanted = type(batch)(batch.token_ids, batch.positions, torch.arange(rows), batch.kv)
    return StepInputs(x, cos, sin, wanted)


def end(device: Operators, inputs: StepInputs, x: torch.Tensor) -> torch.Tensor:
    """The end of every step."""
    normed = device.rms_norm(x, torch.ones(HIDDEN), 1e-6, rows=inputs.batch.logit_rows)
    return device.linear(normed, HEAD)


def refuse_to_wait(stage: int) -> None:
    raise AssertionError(f"stage {stage} is awaited")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), *[st.integers(0, 1 << 16)] * 2), max_size=25))
def test_operands_are_kept_for_as_long_as_they_are_needed(choices):
    """Steps of random operators on whatever was made before, long ago or just now."""

    def step(device, inputs, _):
        made = [inputs.x]
        for kind, one, other in choices:
            x, y = made[one % len(made)], made[other % len(made)]
            match kind:
                case 0:
                    made.append(device.rms_norm(x, torch.ones(HIDDEN), 1e-6))
                case 1:
                    made.append(device.linear(x, HEAD, residual=y))
                case 2:
                    heads = x.view(len(x), 3, HEAD_DIM)
                    made.append(device.rotate(heads, inputs.cos, inputs.sin).view(len(x), HIDDEN))
                case 3:
                    heads = x.view(len(x), 3, HEAD_DIM)[:, 1:]
                    narrow = device.rms_norm(heads, torch.ones(HEAD_DIM), 1e-6)
                    narrow = narrow.view(len(x), 2 * HEAD_DIM)
                    made.append(device.linear(narrow, WIDEN, residual=y))
        return end(device, inputs, made[-1])

    inputs = make_inputs(5)
    runner = CpuDevice(2).new_runner()
    expected = EagerCpu().new_runner().run(step, inputs, refuse_to_wait)
    for _ in range(2):
        actual = runner.run(step, inputs, refuse_to_wait)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_longer_needed_makes_room():
    def chain(length):
        def step(device, inputs, _):
            x = inputs.x
            for _ in range(length):
                x = device.linear(x, HEAD, residual=inputs.x)
            return end(device, inputs, x)

        return record(step, HIDDEN, HEAD_DIM, _native.StepPlan()).plan.row_bytes

    assert 0 < chain(3) == chain(30)


def test_a_plan_runs_for_rows_that_it_was_not_recorded_with():
    def step(device, inputs, _):
        return end(device, inputs, device.linear(inputs.x, HEAD, residual=inputs.x))

    runner, reference = CpuDevice().new_runner(), EagerCpu().new_runner()
    for rows in (3, 1, 70, 2):
        inputs = make_inputs(rows, seed=rows)
        expected = reference.run(step, inputs, refuse_to_wait)
        assert torch.equal(runner.run(step, inputs, refuse_to_wait), expected)


@pytest.mark.parametrize(
    "spoil", [lambda x: x + 1, lambda x: x[:1], lambda x: x[:, ::2], lambda x: x.T]
)
def test_a_step_that_computes_by_itself_or_cuts_rows_is_refused(spoil):
    def step(device, inputs, _):
        return end(device, inputs, device.rms_norm(spoil(inputs.x), torch.ones(HIDDEN), 1e-6))

    with pytest.raises(AssertionError, match="a step"):
        record(step, HIDDEN, HEAD_DIM, _native.StepPlan())


def test_a_product_of_columns_is_refused():
    def step(device, inputs, _):
        return end(device, inputs, device.linear(inputs.x[:, HEAD_DIM:], WIDEN))

    with pytest.raises(ValueError, match="row behind row"):
        record(step, HIDDEN, HEAD_DIM, _native.StepPlan())


def test_a_step_that_ends_before_its_result_is_refused():
    def step(device, inputs, _):
        result = end(device, inputs, inputs.x)
        device.linear(inputs.x, HEAD)
        return result

    with pytest.raises(ValueError, match="ends with its result"):
        record(step, HIDDEN, HEAD_DIM, _native.StepPlan())
