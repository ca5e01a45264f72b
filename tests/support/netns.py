"""A network of namespaces on this machine: places with addresses of their own, and cables to them
that can be slow and lossy (slow_wire.py), or cut so that packets go nowhere and nobody is told."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.slow_wire import SlowWire

# For measurements between networks (RFC 2544), so nobody's here.
STORE, CLIENTS = "198.18", "198.19"
OURS = 1  # the last part of this side's address; places have those behind it
NAMES, NAMESPACES = "aeg", Path("/run/netns")


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if told.returncode:
        raise OSError(f"{' '.join(words)}: {told.stderr.strip()}")


class Cable:
    """From a place to a switch of ours, where it ends at the device `here`."""

    def __init__(self, here: str, switch: str) -> None:
        self._here, self._switch = here, switch
        self.mend()
        _run("ip", "link", "set", here, "up")

    def cut(self) -> None:
        """From now on nothing arrives, in either direction."""
        _run("ip", "link", "set", self._here, "nomaster")

    def mend(self) -> None:
        """All arrives."""
        _run("ip", "link", "set", self._here, "master", self._switch)


class Place:
    """A namespace with a cable to where the store is and one to where clients are."""

    def __init__(self, name: str, to_store: Cable, to_clients: Cable, host: str) -> None:
        self.to_store, self.to_clients = to_store, to_clients
        self.host = host  # where clients reach it
        self.wrapper = ("nsenter", f"--net=/run/netns/{name}")


class Network:
    """Two switches of ours, for the store and for clients, and places between them."""

    def __init__(self, owner: int) -> None:
        """It is the process `owner`'s; what those have left that were killed is removed."""
        for path in NAMESPACES.glob(f"{NAMES}-*"):
            dead = int(path.name.split("-")[1])
            if not Path(f"/proc/{dead}").exists():
                _remove(dead)
        self._owner, self._number = owner, owner % 250
        self._places = 0
        self._wires: list[SlowWire] = []
        self._switches = _switches(owner)
        self.store_host = self._host(STORE, OURS)
        for switch, part in zip(self._switches, (STORE, CLIENTS), strict=True):
            _run("ip", "link", "add", switch, "type", "bridge")
            _run("ip", "address", "add", f"{self._host(part, OURS)}/24", "dev", switch)
            _run("ip", "link", "set", switch, "up")

    def place(self, delay_s: float = 0.0, loss: float = 0.0) -> Place:
        """Add a place. Its packets to and from the store are late by `delay_s` each, and of them
        the share `loss` is lost."""
        self._places = rank = self._places + 1
        name = f"{NAMES}-{self._owner}-{rank}"
        _run("ip", "netns", "add", name)
        inside = ("ip", "-n", name)
        _run(*inside, "link", "set", "lo", "up")
        cables = []
        for kind, switch, part in zip("sc", self._switches, (STORE, CLIENTS), strict=True):
            here, there = f"{NAMES}{self._number}{kind}{rank}", f"eth{kind}"
            if part == STORE and (delay_s or loss):
                self._wires.append(SlowWire(name, (here, there), delay_s, loss))
            else:
                pair = ("type", "veth", "peer", "name", there, "netns", name)
                _run("ip", "link", "add", here, *pair)
            cables.append(Cable(here, switch))
            _run(*inside, "address", "add", f"{self._host(part, OURS + rank)}/24", "dev", there)
            _run(*inside, "link", "set", there, "up")
        return Place(name, *cables, self._host(CLIENTS, OURS + rank))

    def close(self) -> None:
        """Remove all of it, with the cables; what still runs there has no network then."""
        while self._wires:
            self._wires.pop().close()
        _remove(self._owner)

    def _host(self, part: str, last: int) -> str:
        return f"{part}.{self._number}.{last}"


def _switches(owner: int) -> tuple[str, str]:
    return f"{NAMES}{owner % 250}s", f"{NAMES}{owner % 250}c"


def _remove(owner: int) -> None:
    for path in NAMESPACES.glob(f"{NAMES}-{owner}-*"):
        with suppress(OSError):
            _run("ip", "netns", "del", path.name)
    for switch in _switches(owner):
        with suppress(OSError):
            _run("ip", "link", "del", switch)


class NoNetwork(Exception):
    """None may be made here; says why."""


@contextmanager
def network() -> Iterator[Network]:
    """Yield a network. Raises NoNetwork."""
    missing = [word for word in ("ip", "nsenter") if shutil.which(word) is None]
    if missing:
        raise NoNetwork(f"{missing[0]} is not installed (Debian: iproute2, util-linux)")
    if os.geteuid() != 0:
        raise NoNetwork("only root may make network namespaces")
    made = None
    try:
        try:
            made = Network(os.getpid())
            made.place(delay_s=0.001)
        except OSError as error:
            raise NoNetwork(f"no network namespaces can be made here ({error})") from None
        yield made
    finally:
        if made is not None:
            made.close()
