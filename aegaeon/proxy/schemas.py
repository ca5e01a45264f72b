"""What of a JSON schema can never be: places where nothing may stand, since their `$ref`s lead only
back to themselves. llguidance tells of these only where an answer comes to one."""

from collections import defaultdict
from typing import Any
from urllib.parse import unquote

import msgspec

from aegaeon.proxy.failures import invalid

_MAPS = ("properties", "patternProperties")  # of names to schemas
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES = ("additionalProperties", "items")


class _Node(msgspec.Struct):
    """A schema, where it stands, and whether an answer may come to it."""

    schema: dict[str, Any]
    place: str
    is_met: bool


def check_loops(param: str, root: dict[str, Any]) -> None:
    """Raise ApiError where an answer may come to a place of the schema at which nothing may stand.
    `root` is of bounded depth; takes time by its size."""
    nodes = _nodes_of(root)
    needed_by: defaultdict[int, list[int]] = defaultdict(list)
    fine: list[int] = []
    for key, node in nodes.items():
        ways = _ways(node.schema, root)
        if ways is None:
            fine.append(key)
        for way in ways or ():
            needed_by[id(way)].append(key)
    left = set(nodes)
    while fine:
        key = fine.pop()
        if key in left:
            left.remove(key)
            fine += needed_by[key]
    place = next((nodes[key].place for key in nodes if key in left and nodes[key].is_met), None)
    if place is not None:
        text = f"nothing may come at {place or 'its root'}"
        look = "look for a $ref that leads back to itself"
        raise invalid(param, f"the schema cannot be followed: {text}; {look}")


def _nodes_of(root: dict[str, Any]) -> dict[int, _Node]:
    """Return all schemas that `root` leads to."""
    found: dict[int, _Node] = {}
    ahead = [_Node(root, "", True)]
    while ahead:
        node = ahead.pop()
        known = found.get(id(node.schema))
        if known is not None:
            if node.is_met and not known.is_met:
                known.place, known.is_met = node.place, True
            continue
        found[id(node.schema)] = node
        ahead += _below(node)
        ahead += [_Node(way, node.place, False) for way in _ways(node.schema, root) or ()]
    return found


def _below(node: _Node) -> list[_Node]:
    """Return the schemas within one. An array may be empty, so its items need not be met."""
    schema, place = node.schema, node.place
    found = []
    for name in _MAPS:
        for key, value in _items(schema.get(name)):
            found.append((value, f"{place}.{name}.{key}".lstrip("."), True))
    for name in _LISTS:
        values = schema.get(name)
        found += [(one, place, False) for one in values] if isinstance(values, list) else []
    for name in _SINGLES:
        found.append((schema.get(name), f"{place}.{name}".lstrip("."), name not in {"items"}))
    return [_Node(*one) for one in found if isinstance(one[0], dict)]


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _ways(schema: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the schemas of which one must be possible for this one to be; None: it is by itself,
    or nobody can tell."""
    reference = schema.get("$ref")
    if reference is not None:
        target = _target(reference, root)
        return [target] if isinstance(target, dict) else None
    choices = schema.get("anyOf")
    if isinstance(choices, list) and choices and all(isinstance(one, dict) for one in choices):
        return choices
    return None


def _target(reference: Any, root: dict[str, Any]) -> Any:
    """Return what a pointer into `root` points to; None: it is another kind, or leads nowhere."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: Any = root
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found
