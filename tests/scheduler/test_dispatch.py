"""Where requests go: live rows as places, and the dispatcher of homes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.dispatch import UNKNOWN_LOAD, LiveDispatcher, LivePlace, can_serve
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.scheduler.policies import POLICIES
from tests.support.specs import make_instance

MODELS = ("a", "b", "c")


@pytest.fixture
def homes():
    return LiveDispatcher(HomeDispatcher())


def chosen(dispatcher, rows, model="a", unseen=None):
    choice = dispatcher.dispatch(rows, model, unseen or {})
    return choice and choice.instance


def prefilled(dispatcher, rows, kv_bytes, model="a"):
    choice = dispatcher.dispatch_prefilled(rows, model, kv_bytes, {})
    return choice and choice.instance


def test_nobody_that_is_ready_and_serves_the_model_is_none(homes):
    rows = (
        make_instance("i0", ("b",)),
        make_instance("i1", MODELS, state="draining"),
        make_instance("i2", MODELS, state="starting"),
    )
    assert chosen(homes, rows) is None
    assert chosen(homes, ()) is None


def test_a_model_stays_where_its_requests_are_though_others_are_idle(homes):
    idle, busy = make_instance("i0", MODELS), make_instance("i1", MODELS, load=5.0)
    assert chosen(homes, (idle, busy)) == "i0"
    moved = make_instance("i1", MODELS, load=5.0, running={"a": 3}, joins=("a",))
    loaded = make_instance("i0", MODELS, load=2.0, waiting={"a": 1})
    assert chosen(homes, (loaded, moved)) == "i0"


def test_a_home_is_found_again_where_most_requests_are():
    rows = (
        make_instance("i0", MODELS),
        make_instance("i1", MODELS, load=1.0, running={"a": 1}),
        make_instance("i2", MODELS, load=9.0, running={"a": 3}),
    )
    assert LiveDispatcher(HomeDispatcher()).dispatch(rows, "a", {}) == ("i2", "home")


def test_another_proxys_home_is_joined_when_ones_own_is_empty(homes):
    first = (make_instance("i0", MODELS), make_instance("i1", MODELS, load=1.0))
    assert chosen(homes, first) == "i0"
    later = (make_instance("i0", MODELS), make_instance("i1", MODELS, load=1.0, waiting={"a": 1}))
    assert chosen(homes, later) == "i1"


def test_a_full_home_is_left_for_a_place_that_is_much_less_busy(homes):
    rows = (make_instance("i0", MODELS), make_instance("i1", MODELS, load=0.3))
    assert chosen(homes, rows) == "i0"
    full = make_instance("i0", MODELS, load=0.5, running={"a": 16})
    assert chosen(homes, (full, rows[1])) == "i0"
    assert chosen(homes, (full, make_instance("i1", MODELS, load=0.2))) == "i1"


def test_a_home_is_known_by_its_name_though_rows_come_and_go(homes):
    rows = tuple(make_instance(f"i{n}", MODELS, load=float(n != 1)) for n in range(3))
    assert chosen(homes, rows) == "i1"
    held = make_instance("i1", MODELS, load=9.0, running={"a": 1})
    assert chosen(homes, (held, rows[2])) == "i1"
    assert chosen(homes, (rows[0], rows[2])) == "i0"


def test_a_model_without_a_home_goes_where_its_weights_are_if_others_are_no_idler(homes):
    rows = (make_instance("i0", MODELS), make_instance("i1", MODELS, resident=("a",)))
    assert homes.dispatch(rows, "a", {}) == ("i1", "resident")
    busy = make_instance("i1", MODELS, resident=("b",), load=1.0)
    assert homes.dispatch((rows[0], busy), "b", {}) == ("i0", "least_load")


def test_what_was_sent_since_the_snapshot_counts(homes):
    rows = (make_instance("i0", MODELS), make_instance("i1", MODELS))
    assert chosen(homes, rows, "a", {"i0": {"b": 2}}) == "i1"
    assert homes.dispatch(rows, "c", {"i1": {"c": 1}}) == ("i1", "home")


def test_a_request_sent_since_counts_as_those_that_are_there():
    row = make_instance("i", MODELS, load=0.6, running={"b": 2}, waiting={"a": 1}, joins=("b",))
    place = LivePlace(row, {"a": 2, "c": 1})
    assert place.load == pytest.approx(0.6 + 3 * 0.2)
    assert (place.requests_of("a"), place.requests_of("b"), place.requests_of("c")) == (3, 2, 1)
    assert place.joins("b") and place.joins("c")
    assert LivePlace(make_instance("i", MODELS), {"a": 2}).load == 2 * UNKNOWN_LOAD


def test_new_requests_go_where_they_are_prefilled_and_prefilled_ones_where_decoded(homes):
    rows = (make_instance("p", MODELS, "prefill"), make_instance("d", MODELS, "decode"))
    assert chosen(homes, rows) == "p"
    assert prefilled(homes, rows, 0) == "d"
    both = (*rows, make_instance("c", MODELS, running={"a": 1}))
    assert chosen(LiveDispatcher(HomeDispatcher()), both) == "c"
    assert chosen(homes, rows[1:]) is None
    assert prefilled(homes, rows[:1], 0) is None


def test_a_prefilled_request_has_a_home_of_its_own(homes):
    rows = (make_instance("p", MODELS, "prefill"), make_instance("d", MODELS, "decode"))
    held = tuple(make_instance(r.record.id, MODELS, r.record.role, running={"a": 1}) for r in rows)
    for _ in range(2):
        assert chosen(homes, held) == "p"
        assert prefilled(homes, held, 0) == "d"


def test_kv_goes_where_there_is_room_and_the_weights_attract(homes):
    rows = (
        make_instance("d0", MODELS, "decode", kv_free_bytes=99, resident=("a",)),
        make_instance("d1", MODELS, "decode", kv_free_bytes=100),
        make_instance("d2", MODELS, "decode", kv_free_bytes=100, state="draining"),
    )
    assert prefilled(homes, rows, 99) == "d0"
    assert prefilled(homes, rows, 100) == "d1"
    assert prefilled(homes, rows, 101) is None


def test_a_node_serves_when_somebody_prefills_and_somebody_decodes():
    p, d = make_instance("p", MODELS, "prefill"), make_instance("d", MODELS, "decode")
    assert can_serve((p, d)) and can_serve((make_instance("c", MODELS),))
    assert not can_serve((p,)) and not can_serve((d,))
    assert not can_serve((p, make_instance("d", MODELS, "decode", state="starting")))


rows_of = st.lists(
    st.tuples(
        st.sampled_from(["ready", "draining"]),
        st.sets(st.sampled_from(MODELS)),
        st.dictionaries(st.sampled_from(MODELS), st.integers(0, 9)),
        st.floats(0, 3),
    ),
    max_size=5,
)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(st.lists(rows_of, max_size=4), st.sampled_from(MODELS))
def test_only_a_ready_instance_that_serves_the_model_is_chosen(policy, snapshots, model):
    dispatcher = LiveDispatcher(POLICIES[policy].dispatcher())
    for states in snapshots:
        rows = tuple(
            make_instance(f"i{n}", tuple(sorted(models)), state=state, waiting=waiting, load=load)
            for n, (state, models, waiting, load) in enumerate(states)
        )
        able = {r.record.id for r in rows if r.status.state == "ready" and model in r.record.models}
        instance = chosen(dispatcher, rows, model)
        assert instance in able if able else instance is None
