"""Whole engines on the stand-in for a device, where one call of the runtime fails, or the device is
lost with it: whichever it is, nothing hangs, nothing leaks, no token is wrong."""

import time

import pytest

from aegaeon.errors import AegaeonError, DeviceLost
from aegaeon.models.references import resolve
from aegaeon.types import LoadFailed
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_life import Life
from tests.support.cuda_stand_in import EAGER, LAZY, RANDOM, cuda_device

# It takes long; `make check-cuda` and `make test-all` run it.
pytestmark = pytest.mark.thorough

ORDERS = (LAZY, RANDOM, EAGER)
# A life has two hundred calls or so; without `thorough` some of them are tried.
STEP = 12
OTHERS = range(1, STEP + 1)
LEAST_CALLS, MOST_CALLS = 150, 2000
# A load that is tried again gives up after half a minute.
LONGEST_S = 100.0


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = (make_checkpoint(root / name, "llama", seed=ord(name[0])) for name in ("ada", "bob"))
    return tuple(resolve(str(path), str(root)) for path in made)


@pytest.fixture(scope="module")
def undisturbed(specs):
    with cuda_device(EAGER):
        life = Life(specs)
        assert life.run(), life.error
    assert [len(tokens) for tokens in life.tokens.values()] == [6, 2, 2]
    return life.tokens


def check_lives(specs, undisturbed, mode, calls):
    """Live once for each of `calls`, at which things go wrong, until none is left; return how many
    lives that were, and their errors."""
    errors = []
    for call in calls:
        with cuda_device(ORDERS[call % len(ORDERS)]) as module:
            getattr(module, mode)(call)
            life = Life(specs)
            began_s = time.monotonic()
            life.run()
            assert time.monotonic() - began_s < LONGEST_S, (call, life.error)
            # A step of which keys and values did not come in makes its token later.
            for name, tokens in life.tokens.items():
                assert tokens == undisturbed[name][: len(tokens)], call
            if not module.has_failed():
                return errors
        errors.append(life.error)
    raise AssertionError("there is always one more call to fail")


def steps(first):
    return range(first, MOST_CALLS, STEP)


@pytest.mark.parametrize(
    "calls",
    [steps(3), *(pytest.param(steps(n), marks=pytest.mark.thorough) for n in OTHERS if n != 3)],
)
def test_a_call_that_fails_is_told_or_made_good(specs, undisturbed, calls, record_property):
    errors = check_lives(specs, undisturbed, "fail_call", calls)
    assert len(errors) > LEAST_CALLS / STEP
    for error in errors:
        assert error is None or isinstance(error, AegaeonError | LoadFailed), error
        assert error is None or error.code != AegaeonError.code, error
    assert None in errors, "what costs only speed ends nothing"
    record_property("cuda fault", f"{len(errors)} calls that fail in a life of two engines")


@pytest.mark.parametrize(
    "calls",
    [pytest.param(steps(n), marks=pytest.mark.thorough) for n in OTHERS],
)
def test_a_lost_device_is_told_wherever_it_shows(specs, undisturbed, calls, record_property):
    errors = check_lives(specs, undisturbed, "lose_device", calls)
    assert len(errors) > LEAST_CALLS / STEP
    # In the end, while all is given back, there is nothing left to be told.
    told = [error for error in errors if error is not None]
    assert told == errors[: len(told)] and all(isinstance(error, DeviceLost) for error in told)
    record_property("cuda fault", f"{len(errors)} calls by which a device is lost to two engines")
