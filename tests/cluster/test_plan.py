"""What each node is to have, without any node."""

import msgspec

from aegaeon.cluster.plan import MemberPlan, plan_members, rule_of, staying
from aegaeon.config import Settings, check_settings
from aegaeon.nodes import NodeNow, NodeSettings
from tests.support.specs import make_spec


def make_settings(**changes) -> Settings:
    return check_settings({"cluster": "auto", "colocated_count": 1, **changes})


def make_node(name: str, labels: dict[str, str] | None = None, **resources: float) -> NodeNow:
    return NodeNow(
        id=name * 8, address=f"host-{name}", labels=labels or {}, resources={"CPU": 4.0} | resources
    )


def planned(settings: Settings, *nodes: NodeNow, **known: str) -> dict[str, MemberPlan]:
    return plan_members(settings, nodes, nodes[0].id if nodes else "", known)


def instances(plans: dict[str, MemberPlan]) -> list[str]:
    return sorted(name for name, plan in plans.items() if plan.kind == "instance")


def test_each_node_gets_what_one_machine_would():
    plans = planned(make_settings(colocated_count=2), make_node("a"), make_node("b", CPU=8.0))
    assert instances(plans) == [
        *("instance-aaaaaaaa-0", "instance-aaaaaaaa-1"),
        *("instance-bbbbbbbb-0", "instance-bbbbbbbb-1"),
    ]
    second = plans["instance-bbbbbbbb-1"]
    assert (second.index, second.cpus, second.settings.threads_per_instance) == (1, 4.0, 0)
    assert second.settings.colocated_count == 2


def test_a_node_that_is_to_run_nothing_or_is_drained_gets_no_instance():
    drained = NodeNow(id="c" * 8, address="host-c", resources={"CPU": 4.0}, is_draining=True)
    plans = planned(make_settings(), make_node("a", CPU=0.0), make_node("b"), drained)
    assert instances(plans) == ["instance-bbbbbbbb-0"]
    assert plans["proxy-0"].node == "a" * 8


def test_the_first_rule_with_a_nodes_labels_holds():
    rules = (NodeSettings(labels={"pool": "big"}, instances=3), NodeSettings(instances=1))
    big, other = make_node("a", {"pool": "big", "zone": "x"}), make_node("b", {"pool": "small"})
    assert rule_of(rules, big) is rules[0]
    assert rule_of(rules, other) is rules[1]
    assert rule_of(rules[:1], other) is None
    settings = make_settings(
        cluster={"nodes": [{"labels": {"pool": "big"}, "instances": 3, "cpus": 1}]}
    )
    assert instances(planned(settings, big, other)) == [
        f"instance-aaaaaaaa-{index}" for index in range(3)
    ]


def test_no_node_gets_more_than_it_has_room_for():
    rule = {"instances": 9, "cpus": 1.0, "memory_gb": 2.0, "resources": {"slot": 1.0}}
    settings = make_settings(cluster={"nodes": [rule]})
    roomy = {"memory": 64e9, "slot": 64.0}
    assert len(instances(planned(settings, make_node("a", CPU=3.0, **roomy)))) == 3
    assert len(instances(planned(settings, make_node("a", CPU=64.0, slot=2.0, memory=64e9)))) == 2
    assert len(instances(planned(settings, make_node("a", CPU=64.0, slot=9.0, memory=9e9)))) == 4
    assert instances(planned(settings, make_node("a", CPU=64.0, memory=9e9))) == []
    one = planned(settings, make_node("a", CPU=64.0, slot=2.0, memory=64e9))["instance-aaaaaaaa-0"]
    assert (one.memory_bytes, one.resources) == (2_000_000_000, {"slot": 1.0})


def test_gpus_get_an_instance_each_or_are_shared_evenly():
    settings = make_settings(device="cuda:0")
    plans = planned(settings, make_node("a", GPU=4.0), make_node("b"))
    assert len(instances(plans)) == 4  # nothing where there is no GPU
    assert {plan.gpus for plan in plans.values() if plan.kind == "instance"} == {1.0}
    assert plans["instance-aaaaaaaa-3"].settings.device == "cuda:0"  # each sees its own alone
    shared = make_settings(cluster={"nodes": [{"device": "cuda", "instances": 4}]})
    one = planned(shared, make_node("a", GPU=2.0))["instance-aaaaaaaa-0"]
    assert (one.gpus, one.gpus_shared_by) == (0.5, 2)


def test_split_roles_come_together_or_not_at_all():
    settings = make_settings(
        colocated_count=0, prefill_count=1, decode_count=2, threads_per_instance=1
    )
    plans = planned(settings, make_node("a", CPU=3.0), make_node("b", CPU=2.0))
    assert instances(plans) == [f"instance-aaaaaaaa-{index}" for index in range(3)]
    assert plans["instance-aaaaaaaa-0"].settings.role_of(0) == "prefill"


def test_proxies_begin_where_the_server_was_asked_for_and_stay_where_they_are():
    a, b, c = make_node("a"), make_node("b"), make_node("c")
    settings = make_settings(cluster={"proxies": 2})
    first = plan_members(settings, (a, b, c), b.id, {})
    assert {n: p.node for n, p in first.items() if p.kind == "proxy"} == {
        "proxy-0": b.id,
        "proxy-1": a.id,
    }
    # One whose node is gone moves to a node that has none, the other stays.
    known = {"proxy-0": b.id, "proxy-1": a.id}
    moved = plan_members(settings, (a, c), b.id, known)
    assert (moved["proxy-0"].node, moved["proxy-1"].node) == (c.id, a.id)
    assert plan_members(settings, (a,), b.id, known).keys() & known == {"proxy-0"}
    everywhere = make_settings(cluster={"proxies": 0})
    plans = plan_members(everywhere, (a, b, c), b.id, {})
    assert {p.node for p in plans.values() if p.kind == "proxy"} == {a.id, b.id, c.id}


def test_no_nodes_get_nothing():
    assert planned(make_settings()) == {}


def test_what_is_on_a_drained_node_may_stay_but_nothing_comes_there():
    drained = NodeNow(id="c" * 8, address="host-c", resources={"CPU": 4.0}, is_draining=True)
    settings = make_settings(colocated_count=2)
    known = {"instance-cccccccc-0": drained.id, "proxy-0": drained.id}
    plans = staying(settings, [drained], known)
    assert list(plans) == ["instance-cccccccc-0"]
    able = msgspec.structs.replace(drained, is_draining=False)
    assert plans["instance-cccccccc-0"] == planned(settings, able)["instance-cccccccc-0"]


def test_a_node_may_have_models_whose_labels_it_has():
    plan = planned(make_settings(), make_node("a", {"pool": "x", "zone": "1"}))[
        "instance-aaaaaaaa-0"
    ]
    spec = make_spec("m")
    assert plan.may_have(spec)
    assert plan.may_have(msgspec.structs.replace(spec, labels={"pool": "x"}))
    assert not plan.may_have(msgspec.structs.replace(spec, labels={"pool": "y"}))
