"""Who is served when not everybody can be."""

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.shedding import Demand, shed


def test_nobody_is_shed_who_fits():
    assert shed([Demand("a", 0.5, 1, False), Demand("b", 0.5, 1, True)]) == frozenset()


def test_who_serves_the_fewest_for_the_time_goes():
    demands = [Demand("a", 0.6, 6, False), Demand("b", 0.5, 1, False), Demand("c", 0.4, 4, False)]
    assert shed(demands) == {"b"}


def test_who_is_shed_comes_back_only_for_clearly_more():
    def who_goes(requests):
        return shed([Demand("in", 0.6, 6, False), Demand("out", 0.6, requests, True)])

    assert who_goes(7) == {"out"}
    assert who_goes(8) == {"in"}


@given(
    st.lists(
        st.builds(
            Demand, st.uuids().map(str), st.floats(0.01, 2), st.integers(1, 99), st.booleans()
        ),
        max_size=9,
    )
)
def test_those_who_stay_fit(demands):
    gone = shed(demands)
    assert sum(d.share for d in demands if d.model not in gone) <= 1.0 + 1e-9
