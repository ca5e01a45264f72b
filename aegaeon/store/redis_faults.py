"""Why a Redis server cannot be talked to, and what to do about it: TLS, logins, memory."""

import socket
import ssl

from aegaeon.store.redis_url import RedisPlace

PROBE_S = 1.0
_PLAIN_ANSWERS = (b"+PONG", b"-NOAUTH", b"-DENIED", b"-LOADING", b"-ERR")


def certain_fault(error: Exception) -> str:
    """Return what is wrong, with the remedy, where another try would meet it again; else ""."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        if "mismatch" in text or "not valid for" in text:
            return (
                "its certificate is for another name; give the host by that name, or add "
                "?ssl_check_hostname=false to --redis-url"
            )
        return (
            "its certificate is not trusted here; add ?ssl_ca_certs=FILE, the certificate of who "
            "signed it, to --redis-url"
        )
    if "CERTIFICATE_REQUIRED" in text or "certificate required" in text:
        return (
            "it asks for a certificate of ours; add ?ssl_certfile=FILE&ssl_keyfile=FILE to "
            "--redis-url"
        )
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak TLS there; write redis:// in --redis-url, or give its TLS port"
    if any(word in text for word in ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED")):
        return "it does not trust our certificate; correct ssl_certfile in --redis-url"
    return ""


def found_fault(place: RedisPlace) -> str:
    """Ask the first server itself whether it speaks TLS; return what is wrong, or ""."""
    if not place.servers:
        return ""
    if place.is_tls and _speaks_plainly(place.servers[0]):
        return "it does not speak TLS there; write redis:// in --redis-url, or give its TLS port"
    if not place.is_tls and _speaks_tls(place.servers[0]):
        return "it speaks TLS there; write rediss:// in --redis-url"
    return ""


def _speaks_tls(address: tuple[str, int]) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said there
    try:
        with (
            socket.create_connection(address, timeout=PROBE_S) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in str(error)
    except OSError:
        return False


def _speaks_plainly(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=PROBE_S) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(64).startswith(_PLAIN_ANSWERS)
    except OSError:
        return False
