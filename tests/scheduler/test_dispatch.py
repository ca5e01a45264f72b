"""Where requests go."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.dispatch import STICKINESS, can_serve, dispatch, dispatch_prefilled
from tests.support.specs import make_instance

MODELS = ("a", "b", "c")


def test_nobody_that_is_ready_and_serves_the_model_is_none():
    rows = (
        make_instance("i0", ("b",)),
        make_instance("i1", MODELS, state="draining"),
        make_instance("i2", MODELS, state="starting"),
    )
    assert dispatch(rows, "a", {}) is None
    assert dispatch((), "a", {}) is None


def test_the_weights_at_hand_attract_until_others_wait_there():
    rows = (make_instance("i0", MODELS), make_instance("i1", MODELS, resident=("a",)))
    assert dispatch(rows, "a", {}) == "i1"
    assert dispatch(rows, "a", {"i1": STICKINESS - 1}) == "i1"
    assert dispatch(rows, "a", {"i1": STICKINESS + 1}) == "i0"


def test_the_current_model_is_better_than_a_resident_one():
    rows = (
        make_instance("i0", MODELS, resident=("a", "b"), current="b"),
        make_instance("i1", MODELS, resident=("a", "b"), current="a"),
    )
    assert dispatch(rows, "a", {}) == "i1"
    assert dispatch(rows, "b", {}) == "i0"


def test_less_work_wins_and_counts_assignments_since_the_snapshot():
    rows = (make_instance("i0", MODELS, waiting={"b": 2}), make_instance("i1", MODELS))
    assert dispatch(rows, "a", {}) == "i1"
    assert dispatch(rows, "a", {"i1": 3}) == "i0"


def test_idle_instances_share_the_models_out_the_same_way_each_time():
    rows = tuple(make_instance(f"i{n}", tuple(f"m{k}" for k in range(90))) for n in range(3))
    homes = Counter(dispatch(rows, f"m{k}", {}) for k in range(90))
    assert set(homes) == {"i0", "i1", "i2"} and min(homes.values()) > 10
    for k in range(90):
        assert dispatch(rows, f"m{k}", {}) == dispatch(rows[::-1], f"m{k}", {})


def test_new_requests_go_where_they_are_prefilled_and_prefilled_ones_where_decoded():
    rows = (make_instance("p", MODELS, "prefill"), make_instance("d", MODELS, "decode"))
    assert dispatch(rows, "a", {"p": 100}) == "p"
    assert dispatch_prefilled(rows, "a", 0, {"d": 100}) == "d"
    both = make_instance("c", MODELS)
    assert dispatch((*rows, both), "a", {"p": 100}) == "c"
    assert dispatch_prefilled((*rows, both), "a", 0, {"d": 100}) == "c"
    assert dispatch(rows[1:], "a", {}) is None
    assert dispatch_prefilled(rows[:1], "a", 0, {}) is None


def test_kv_goes_where_there_is_room_and_the_weights_attract():
    rows = (
        make_instance("d0", MODELS, "decode", kv_free_bytes=99, resident=("a",)),
        make_instance("d1", MODELS, "decode", kv_free_bytes=100),
        make_instance("d2", MODELS, "decode", kv_free_bytes=100, state="draining"),
    )
    assert dispatch_prefilled(rows, "a", 99, {}) == "d0"
    assert dispatch_prefilled(rows, "a", 100, {}) == "d1"
    assert dispatch_prefilled(rows, "a", 101, {}) is None


def test_a_node_serves_when_somebody_prefills_and_somebody_decodes():
    p, d = make_instance("p", MODELS, "prefill"), make_instance("d", MODELS, "decode")
    assert can_serve((p, d)) and can_serve((make_instance("c", MODELS),))
    assert not can_serve((p,)) and not can_serve((d,))
    assert not can_serve((p, make_instance("d", MODELS, "decode", state="starting")))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ready", "draining"]),
            st.sets(st.sampled_from(MODELS)),
            st.dictionaries(st.sampled_from(MODELS), st.integers(0, 9)),
        ),
        max_size=5,
    ),
    st.sampled_from(MODELS),
)
def test_only_a_ready_instance_that_serves_the_model_is_chosen(states, model):
    rows = tuple(
        make_instance(f"i{n}", tuple(sorted(models)), state=state, waiting=waiting)
        for n, (state, models, waiting) in enumerate(states)
    )
    able = {r.record.id for r in rows if r.status.state == "ready" and model in r.record.models}
    chosen = dispatch(rows, model, {})
    assert chosen in able if able else chosen is None
