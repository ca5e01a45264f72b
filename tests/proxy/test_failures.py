"""Errors as HTTP sees them: whether a client is told to try again."""

from aegaeon.errors import GivenUp, InstanceLost
from aegaeon.proxy.failures import as_api_error


def test_what_ends_instances_is_not_asked_for_again_but_what_was_lost_is():
    lost, given_up = (as_api_error(kind("it ended"), 3.0) for kind in (InstanceLost, GivenUp))
    assert (lost.status, lost.code) == (given_up.status, given_up.code) == (503, "instance_lost")
    assert lost.headers() == {"x-should-retry": "true", "retry-after": "3"}
    assert given_up.headers() == {"x-should-retry": "false"}
