"""Ports of this machine: whether one is free, and whether somebody listens there."""

import socket

from aegaeon.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Raise ConfigError when nobody can listen on `host`:`port`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host, "
            "or stop the server that uses it"
        ) from None


def free_port(host: str) -> int:
    """Return a port of `host` that is free now."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """Return an address at which who listens on `host` can be reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def is_listening(host: str, port: int) -> bool:
    """Say whether somebody accepts connections there."""
    try:
        with socket.create_connection((reachable(host), port), timeout=1.0):
            return True
    except OSError:
        return False
