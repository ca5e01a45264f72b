"""What the tests of schedulers share."""

import pytest

from tests.support.policies import LIVE


@pytest.fixture(params=LIVE, scope="session")
def policy(request):
    """The name of each policy that live instances may run."""
    return request.param
