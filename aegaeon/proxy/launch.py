"""What the proxy process is told on its stdin, and how it says that it cannot start."""

import msgspec

from aegaeon.config import Settings
from aegaeon.types import ModelSpec

EXIT_DRAINED = 0
EXIT_CRASHED = 1
EXIT_CANNOT_START = 2  # with one line on `status_fd`


class ProxyLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """The proxy's settings, models and identity. Instances answer to the mailbox `address`.

    `status_fd` is an inherited pipe's writing end: closed once requests are taken, after one line
    when they never will be. The process before it `was_hung`: it was ended for that.
    """

    settings: Settings
    specs: tuple[ModelSpec, ...]
    address: str
    status_fd: int
    parent_pid: int
    was_hung: bool = False
