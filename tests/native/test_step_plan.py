"""What a native plan refuses, while it is recorded and when it runs."""

import pytest
import torch

from aegaeon import _native

POOL = _native.ThreadPool(2)
PAGES = torch.zeros(4, 16, 8)
WEIGHTS = torch.zeros(8 * 32 + 16)
ADDRESS = WEIGHTS.data_ptr() + -WEIGHTS.data_ptr() % 64
PART = (ADDRESS, 5, 0, 0)  # [5, 8] in float32
X = (0, 0, 8)


def make_kv(shape=(1, 2, 8), rows=3):
    return _native.PagedRows((PAGES.data_ptr(), 4, 0), shape, [(0, rows, 0, (0,))])


def make_plan():
    plan = _native.StepPlan()
    assert plan.input(8) == 0
    return plan


def make_finished():
    plan = make_plan()
    plan.append_kv(0, 1, X, X)
    slot = plan.rms_norm_outputs(X, ADDRESS, 1e-6)
    plan.finish(plan.linear((slot, 0, 8), (PART,)))
    return plan


@pytest.mark.parametrize("columns", [(1, 0, 8), (0, 0, 0), (0, 1, 8), (0, 9, 1), (0, 2**64 - 1, 2)])
def test_columns_that_are_not_there_are_refused(columns):
    with pytest.raises(ValueError, match=r"no slot 1|more of a slot of 8"):
        make_plan().rms_norm(columns, 1, ADDRESS, 1e-6)


@pytest.mark.parametrize(
    ("verb", "arguments", "why"),
    [
        ("linear", ((0, 0, 4), (PART,)), "row behind row"),
        ("linear", (X, (PART,), X), "differ in width"),
        ("linear", (X, ((ADDRESS + 4, 5, 0, 0),)), "64-byte aligned"),
        ("linear", (X, ((ADDRESS, 5, 9, 0),)), "weight type 9"),
        ("rms_norm", (X, 3, ADDRESS, 1e-6), "3 heads share 8 columns"),
        ("rms_norm", (X, 0, ADDRESS, 1e-6), "0 heads share 8 columns"),
        ("rotate", (X, 8, X, X), "head_dim must be even"),
        ("rotate", (X, 2, X, X), "another head_dim"),
        ("rotate", (X, 1, (0, 0, 4), X), "row behind row"),
        ("gated", (X, (PART,)), "two parts of as many outputs"),
        ("gated", ((0, 0, 4), (PART, PART)), "row behind row"),
        ("append_kv", (0, 2, X, (0, 0, 4)), "differ in width"),
        ("append_kv", (0, 3, X, X), "3 heads share 8 columns"),
        ("attend", (0, 2, X, 1.0), "appended before"),
        ("finish", (0,), "ends with its result"),
    ],
)
def test_operands_that_do_not_fit_are_refused(verb, arguments, why):
    with pytest.raises(ValueError, match=why):
        getattr(make_plan(), verb)(*arguments)


def test_layers_of_unlike_keys_and_heads_that_do_not_fit_them_are_refused():
    plan = make_plan()
    plan.append_kv(0, 2, X, X)
    with pytest.raises(ValueError, match="layers differ"):
        plan.append_kv(1, 1, X, X)
    for layer, heads, why in [(1, 2, "appended before"), (0, 1, "do not fit"), (0, 4, "not fit")]:
        with pytest.raises(ValueError, match=why):
            plan.attend(layer, heads, X, 1.0)


def test_operands_of_all_rows_and_of_the_outputs_do_not_mix():
    plan = make_plan()
    slot = plan.rms_norm_outputs(X, ADDRESS, 1e-6)
    with pytest.raises(ValueError, match="not of both"):
        plan.rotate((slot, 0, 8), 1, X, X)
    with pytest.raises(ValueError, match="chosen once"):
        plan.rms_norm_outputs((slot, 0, 8), ADDRESS, 1e-6)


def test_a_finished_plan_takes_no_more():
    plan = make_finished()
    with pytest.raises(ValueError, match="takes no more"):
        plan.rms_norm(X, 1, ADDRESS, 1e-6)
    with pytest.raises(ValueError, match="come before operators"):
        plan.input(8)


def run(plan, kv, rows=3, inputs=1, wanted=(0,)):
    x, out = torch.zeros(8, 8), torch.zeros(8, 5)
    wanted = torch.tensor(wanted, dtype=torch.int64)
    given = (rows, (x.data_ptr(),) * inputs, (len(wanted), wanted.data_ptr()), out.data_ptr())
    return plan.run(POOL, _native.Workspace(), kv, given, (0, 0))


def test_a_pass_that_does_not_fit_its_plan_is_refused():
    plan = make_finished()
    one_head = make_kv((1, 1, 8))
    assert run(plan, one_head) == plan.operators == 3
    assert run(plan, one_head, wanted=()) == 3
    with pytest.raises(ValueError, match="finished before it runs"):
        run(make_plan(), one_head)
    with pytest.raises(ValueError, match="has 1 inputs"):
        run(plan, one_head, inputs=2)
    with pytest.raises(ValueError, match="1 KV heads of 8, the pages are not"):
        run(plan, make_kv((1, 2, 8)))
    with pytest.raises(ValueError, match="2 rows are given, the sequences have 3"):
        run(plan, one_head, rows=2)
    for row in (-1, 3):
        with pytest.raises(IndexError, match=f"row {row} of 3"):
            run(plan, one_head, wanted=(0, row))


def test_a_pass_stops_where_stages_are_missing_and_goes_on_there():
    plan = make_plan()
    plan.need_stages(2)
    slot = plan.rms_norm(X, 2, ADDRESS, 1e-6)
    plan.need_stages(3)
    slot = plan.rms_norm_outputs((slot, 0, 8), ADDRESS, 1e-6)
    plan.finish(plan.linear((slot, 0, 8), (PART,)))
    x, out, wanted = torch.ones(3, 8), torch.full((1, 5), torch.nan), torch.zeros(1).long()
    workspace, kv = _native.Workspace(), make_kv()
    given = (3, (x.data_ptr(),), (1, wanted.data_ptr()), out.data_ptr())
    stops = [plan.run(POOL, workspace, kv, given, at) for at in ((0, 0), (0, 1), (0, 2))]
    assert stops == [0, 0, 1]
    assert [plan.stages_of(at) for at in range(3)] == [2, 3, 3]
    assert out.isnan().all()
    assert plan.run(POOL, workspace, kv, given, (1, 3)) == 3
    assert (out == 0).all()
    without = (*given[:2], (0, 0), 0)
    assert plan.run(POOL, workspace, kv, without, (0, 2)) == 3


def test_a_workspace_is_as_large_as_the_largest_pass_was():
    plan, workspace, kv = make_finished(), _native.Workspace(), make_kv((1, 1, 8))
    assert workspace.bytes == 0
    sizes = []
    for rows in (3, 1000, 3):
        x, out = torch.zeros(rows, 8), torch.zeros(1, 5)
        wanted = torch.zeros(1, dtype=torch.int64)
        given = (rows, (x.data_ptr(),), (1, wanted.data_ptr()), out.data_ptr())
        plan.run(POOL, workspace, kv, given, (0, 0))
        sizes.append(workspace.bytes)
    assert sizes[0] >= 3 * plan.row_bytes
    assert sizes[1] == sizes[2] >= 1000 * plan.row_bytes
