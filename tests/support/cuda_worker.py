"""The process of an instance on the stand-in for a device, which is lost at a chosen call after the
engine has been opened: told as aegaeon.instance.worker is, and the call by the environment."""

import os
import sys

from aegaeon.engine import open as engine_open
from aegaeon.instance import worker
from tests.support.cuda_stand_in import open_beside, stand_in

LOSE = "AEGAEON_TEST_LOSE_CALL"


def open_and_lose(settings, specs, regions):
    """Open the engine; the device is lost at a later call."""
    engine = open_beside(settings, specs, regions)
    stand_in().lose_device(int(os.environ[LOSE]))
    return engine


if __name__ == "__main__":
    engine_open.OPENERS["cuda"] = open_and_lose
    sys.exit(worker.main())
