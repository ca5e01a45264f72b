"""Placement, instances and routing together: nodes and load come and go, requests end as ever."""

import random

import msgspec
import pytest

from aegaeon.engine.base import NullEngine
from aegaeon.errors import ConfigError, Draining, Forgotten
from tests.support.specs import make_spec
from tests.support.town import EPOCH_S, Town


def assert_served(town):
    """All requests have all their tokens, and failed at most because their model had moved."""
    for _ in range(3000):
        if all(opened.has_ended for opened in town.proxy.opened.values()):
            break
        town.step()
    for name, opened in town.proxy.opened.items():
        assert opened.error is None, (name, opened.error)
        assert town.proxy.got[name] == town.proxy.expected(opened), name
    assert {failed.code for failed in town.proxy.failures()} <= {Forgotten.code, Draining.code}


def test_each_node_serves_what_lives_there_and_requests_find_it():
    town = Town("abcdef", "xyz")
    assert {node for nodes in town.where().values() for node in nodes} == set("xyz")
    assert town.serving() == {model: set(nodes) for model, nodes in town.where().items()}
    for model in "abcdef":
        town.proxy.ask(f"r-{model}", model)
    assert_served(town)


def test_what_lived_on_a_lost_node_is_served_elsewhere_and_streams_go_on():
    town = Town("abcdef", "xyz")
    for model in "abcdef":
        town.proxy.ask(f"r-{model}", model, max_tokens=80)
    town.work(30)
    (lost,) = town.where()["a"]
    town.lose(lost)
    town.proxy.ask("late", "a", max_tokens=50)  # lives nowhere just now
    assert_served(town)
    assert lost not in {node for nodes in town.where().values() for node in nodes}


def test_load_that_shifts_moves_models_under_streams_that_go_on():
    town = Town("abcdef", "xyz")
    before = town.where()
    crowded = [model for model, nodes in before.items() if nodes == before["a"]]
    crowded += [model for model in before if model not in crowded][:1]
    for turn in range(3):
        for model in crowded:
            town.proxy.ask(f"{model}{turn}", model, max_tokens=600)
    town.work(20)
    town.rates = dict.fromkeys(crowded[:2], 4.0)
    ran = {model: set(nodes) for model, nodes in town.serving().items()}
    for _ in range(int(3 * EPOCH_S / 0.05)):
        town.step()
        assert all(town.serving().values())  # none is ever without a place
        for model, nodes in town.serving().items():
            ran[model] |= nodes
    after = town.where()
    assert any(after[model] != before[model] for model in crowded)
    assert_served(town)
    # The load goes elsewhere: and with it what it had.
    town.rates = {}
    town.work(int(20 * EPOCH_S / 0.05))
    assert all(len(nodes) == 1 for nodes in town.where().values())
    assert town.serving() == {model: set(nodes) for model, nodes in town.where().items()}


def test_a_model_that_comes_while_serving_gets_a_node():
    town = Town("ab", "xy")
    spec = make_spec("new")
    town.catalog.change(lambda catalog: catalog.with_model(spec))
    town.proxy.ask("r", "new")
    town.work(40)
    assert len(town.where()["new"]) == 1
    assert town.serving()["new"] == set(town.where()["new"])
    town.proxy.ask("s", "new")
    assert_served(town)


def test_a_controller_that_begins_anew_and_a_store_that_forgot_change_nothing():
    town = Town("abcdef", "xyz")
    before = town.where()
    town.placing = type(town.placing)(town.settings)
    town.work(40)
    assert town.where() == before
    # And both at once: instances say where models live.
    town.placing = type(town.placing)(town.settings)
    town.catalog.change(lambda catalog: msgspec.structs.replace(catalog, placement=None))
    town.work(40)
    assert town.where() == before


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_requests_end_as_ever(seed):
    chance = random.Random(seed)
    town, models = Town("abcdefg", "xyz", most_moves=4), "abcdefg"
    for turn in range(60):
        event = chance.randrange(6)
        if event == 0 and len(town.alive) > 1:
            town.lose(chance.choice(sorted(town.alive)))
        elif event == 1:
            town.begin(chance.choice("vwxyz"))
        elif event == 2:
            town.rates = {model: chance.choice((0.0, 1.0, 5.0)) for model in models}
        elif event == 3:
            town.placing = type(town.placing)(town.settings)
        for number in range(chance.randrange(3)):
            name, model = f"r{turn}-{number}", chance.choice(models)
            town.proxy.ask(name, model, max_tokens=chance.randrange(1, 80))
        town.work(chance.randrange(1, 60))
    assert_served(town)
    town.work(20)
    assert all(town.serving().values())


def test_a_model_that_a_node_refuses_is_served_by_another(monkeypatch):
    begin, refusing = NullEngine.begin_model, set()

    def begin_or_refuse(engine, spec):
        if (engine, spec.id) in refusing:
            raise ConfigError("no budget")
        begin(engine, spec)

    monkeypatch.setattr(NullEngine, "begin_model", begin_or_refuse)
    town = Town("ab", "xyz")
    before = town.where()
    refusing |= {(town.alive[node].engine, "new") for node in "xy"}
    town.catalog.change(lambda catalog: catalog.with_model(make_spec("new")))
    town.proxy.ask("r", "new")
    town.work(100)
    assert town.where() == {**before, "new": ("z",)}
    assert_served(town)
    # The last one that takes it goes: it is left, says so, and comes to whoever is new.
    town.lose("z")
    town.work(100)
    abode = town.catalog.read().placement.abodes["new"]
    assert abode.why == "refused_by_all" and len(abode.nodes) == 1 and not abode.leaving
    told = {row.record.node: row.status.refused for row in town.rows()}
    assert told[abode.nodes[0]] == {"new": "no budget"}
    town.begin("w")
    town.proxy.ask("s", "new")
    assert_served(town)
    assert town.where()["new"] == ("w",)
