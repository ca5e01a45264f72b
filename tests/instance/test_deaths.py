"""Random deaths, silences, cancels and lost messages among instances of all roles."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import InstanceLost
from aegaeon.proxy.losses import MAX_UNKNOWN
from tests.support.node import Node, assert_empty, settle


def happen(node, what, name, number, which):
    """One event of a trace, at the instance `name` or among all requests."""
    life, proxy = node.lives[name], node.proxy
    match what:
        case "ask":
            proxy.ask(f"r{number}", "ab"[which % 2], max_tokens=1 + which)
        case "cancel" if proxy.opened:
            proxy.leave([*proxy.opened][which % len(proxy.opened)])
        case "kill":
            node.kill(name)
        case "start":
            node.start(name)
        case "drop":
            node.drop_answer(name)
        case "pump":
            proxy.pump()
        case "step":
            node.step()
        case "turn" if life is not None:
            life.turn()
        case "finish" if life is not None:
            life.finish()


events = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "ask",
                "ask",
                "turn",
                "turn",
                "finish",
                "pump",
                "step",
                "step",
                "cancel",
                "kill",
                "start",
                "drop",
            ]
        ),
        st.integers(0, 7),
        st.sampled_from([0.0, 0.01, 0.06, 0.4, 1.5]),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(
    events,
    st.sampled_from(
        [
            {"p": "prefill", "d": "decode"},
            {"p": "prefill", "d": "decode", "e": "decode"},
            {"c": "colocated", "p": "prefill", "d": "decode"},
            {"p": "prefill", "q": "prefill", "d": "decode"},
        ]
    ),
    st.sampled_from([1, 2, 100]),
)
def test_no_request_is_lost_or_doubled_whatever_happens(trace, roles, quota):
    node = Node(quota, **roles)
    names = tuple(roles)
    for number, (what, which, dt_s) in enumerate(trace):
        node.now += dt_s
        happen(node, what, names[which % len(names)], number, which)
        for life in node.alive():  # leases are kept, however slow the instances
            life.runtime._publish(node.now)
    for name in names:
        node.start(name)
    settle(node, 3000)
    for name, opened in node.proxy.opened.items():
        if opened.error is None:
            assert node.proxy.got[name] == node.proxy.expected(opened)
        else:
            assert isinstance(opened.error, InstanceLost)
            assert f"{MAX_UNKNOWN} instances ended" in str(opened.error)
    assert_empty(node)
