"""Schemas with places where nothing may stand, told before an instance has begun an answer."""

import time

import pytest

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.schemas import check_loops
from tests.proxy.test_calls import CHAT, LOOP, of_schema, serving
from tests.proxy.test_routes import CHAT_PATH, error_of, post
from tests.proxy.test_tools import tagged
from tests.support.chat_templates import MARKS

AT_A = {"$ref": "#/$defs/a"}
NULL = {"type": "null"}
BAD = {
    "its root": AT_A,
    "properties.x": {"type": "object", "properties": {"x": AT_A}},
    "properties.x.properties.y": {"properties": {"x": {"properties": {"y": AT_A, "z": {}}}}},
    "additionalProperties": {"type": "object", "additionalProperties": AT_A},
    "patternProperties.^x": {"patternProperties": {"^x": AT_A}},
    "items.properties.x": {"items": {"properties": {"x": AT_A}}},
    "properties.a": {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, AT_A]}}},
}
GOOD = [
    {"type": "object"},
    {"type": "array", "items": AT_A},  # it may be empty
    {"properties": {"x": {"anyOf": [AT_A, NULL]}}},
    {"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}, NULL]}}},
    {"properties": {"next": {"$ref": "#"}}},
    {"properties": {"x": {"$ref": "#/$defs/none"}}},  # somebody else's to tell of
    {"properties": {"x": {"$ref": "http://example.com/a"}, "y": {"$ref": 5}}},
    {"properties": {"x": {"$ref": "#/$defs/a~1b%20c"}}, "$defs": {"a/b c": NULL}},
    {"enum": [{"$ref": "#/enum/0"}], "default": {"properties": {"x": AT_A}}},
    {"properties": "x", "anyOf": [5], "allOf": None, "items": [AT_A]},
]


@pytest.mark.parametrize("place", BAD)
def test_a_place_where_nothing_may_stand_is_named(place):
    with pytest.raises(ApiError) as caught:
        check_loops("tools", {**BAD[place], "$defs": LOOP})
    assert f"nothing may come at {place}; look for a $ref that leads" in caught.value.message
    assert (caught.value.status, caught.value.param) == (400, "tools")


@pytest.mark.parametrize("schema", GOOD)
def test_where_something_may_stand_it_is_no_loop(schema):
    check_loops("tools", {"$defs": LOOP, **schema})


def test_long_ways_are_looked_at_once():
    chain = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(5000)}
    chain["d5000"] = {"$ref": "#/$defs/d0"}
    schema = {"properties": {f"p{at}": {"$ref": "#/$defs/d0"} for at in range(5000)}}
    began_s = time.thread_time()
    with pytest.raises(ApiError, match="nothing may come"):
        check_loops("tools", {**schema, "$defs": chain})
    assert time.thread_time() - began_s < 2.0


@pytest.fixture
def proxy(tmp_path):
    return serving(tmp_path, MARKS, tagged("f", {}))


def test_such_a_format_is_refused_before_it_is_sent(proxy):
    schema = {"type": "object", "properties": {"a": AT_A}, "$defs": LOOP}
    response = post(proxy, CHAT_PATH, of_schema(schema))
    assert response.status_code == 400 and "properties.a" in error_of(response)["message"]
    assert proxy.instance.submitted == []


@pytest.mark.parametrize(("choice", "status"), [("required", 400), ("auto", 200)])
def test_such_a_function_is_refused_where_calls_are_held_to_it(proxy, choice, status):
    parameters = {"type": "object", "properties": {"a": AT_A}, "$defs": LOOP}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    response = post(proxy, CHAT_PATH, {**CHAT, "tools": tools, "tool_choice": choice})
    assert response.status_code == status
    assert status == 200 or error_of(response)["param"] == "tools"
