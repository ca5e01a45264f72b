"""What a URL of Redis says: which servers, how to log in, how to trust them. Connects to nothing.

redis://USER:PASSWORD@HOST:PORT/NUMBER, rediss:// over TLS, unix:///SOCKET?db=NUMBER, and
redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/NUMBER or rediss+sentinel://, whose hosts are
Sentinels. Behind a question mark: options of OPTIONS.
"""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from aegaeon.errors import ConfigError

SERVER_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
FORMS = (
    "write redis://user:password@host:port/number, rediss:// (TLS), "
    "redis+sentinel://host,host/service/number or unix:///socket, with what is none of "
    "A-Z a-z 0-9 - . _ ~ in a password as %XX"
)
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
PASSWORD_FILES = ("password_file", "sentinel_password_file")
OPTIONS = (
    *("db", "username", "password", "sentinel_username", "sentinel_password"),
    *("ssl_check_hostname", "ssl_cert_reqs"),
    *(*FILES, *PASSWORD_FILES),
)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Login:
    """Who we are to a server. A file is read at each connection: a password may change there."""

    username: str = ""
    password: str = field(default="", repr=False)
    file: str = ""

    def read(self) -> str:
        """Return the password; raises OSError, UnicodeDecodeError."""
        return Path(self.file).read_text(encoding="utf-8").strip() if self.file else self.password


@dataclass(frozen=True, slots=True)
class RedisPlace:
    """Where Redis is. With a `service` the `servers` are Sentinels, which know its master."""

    shown: str  # the URL without passwords and options
    servers: tuple[tuple[str, int], ...]
    socket: str
    service: str
    database: int
    is_tls: bool
    login: Login
    sentinel_login: Login
    tls: dict[str, str | bool]  # as redis-py takes them


def read_place(url: str) -> RedisPlace:
    """Return what `url` says. Raises ConfigError, which shows no password."""
    try:
        parts = urlsplit(url)
        # A password with a bare / ? or # is cut there, and its rest must not be taken for a place.
        if parts.scheme not in SCHEMES or parts.fragment or "@" in parts.path:
            raise ValueError
        pairs = parse_qsl(parts.query, strict_parsing=True) if parts.query else []
        return _place(parts, dict(pairs))
    except ValueError:
        shown = without_password(url)
        raise ConfigError(f"--redis-url {shown} is not a Redis URL; {FORMS}") from None


def without_password(url: str) -> str:
    """Return `url` as it may be shown: without its password and its query."""
    try:
        parts = urlsplit(url)
        hosts = ",".join(_shown(host, port) for host, port in _servers(parts, 0))
    except ValueError:
        return "(malformed)"
    if parts.fragment or "@" in parts.path:
        return "(malformed)"
    user = parts.netloc.rpartition("@")[0].partition(":")[0]
    return f"{parts.scheme}://{user}{'@' if user else ''}{hosts}{parts.path}"


def _place(parts: SplitResult, options: dict[str, str]) -> RedisPlace:
    shown = without_password(parts.geturl())
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ConfigError(
            f"--redis-url {shown} has an option {unknown[0]!r}, which is unknown; "
            f"known are: {', '.join(sorted(OPTIONS))}"
        )
    is_sentinel, is_tls = parts.scheme.endswith("+sentinel"), parts.scheme.startswith("rediss")
    path = parts.path.strip("/").split("/") if parts.scheme != "unix" else [""]
    service = unquote(path.pop(0)) if is_sentinel else ""
    database = int(options.get("db") or "/".join(path) or 0)
    servers = _servers(parts, SENTINEL_PORT if is_sentinel else SERVER_PORT)
    if database < 0 or (is_sentinel and not service) or (len(servers) > 1 and not is_sentinel):
        raise ValueError
    _check_files(shown, options)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    return RedisPlace(
        shown=shown,
        servers=servers if parts.scheme != "unix" else (),
        socket=unquote(parts.path) if parts.scheme == "unix" else "",
        service=service,
        database=database,
        is_tls=is_tls,
        login=Login(
            unquote(user) or options.get("username", ""),
            unquote(password) or options.get("password", ""),
            options.get("password_file", ""),
        ),
        sentinel_login=Login(
            options.get("sentinel_username", ""),
            options.get("sentinel_password", ""),
            options.get("sentinel_password_file", ""),
        ),
        tls=_tls(options) if is_tls else {},
    )


def _servers(parts: SplitResult, port: int) -> tuple[tuple[str, int], ...]:
    """The hosts and ports of a URL; raises ValueError."""
    hosts = parts.netloc.rpartition("@")[2].split(",")
    each = [urlsplit(f"//{host}") for host in hosts]
    default = "" if parts.scheme == "unix" or not port else "localhost"
    return tuple((one.hostname or default, one.port or port) for one in each)


def _shown(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}"


def _tls(options: dict[str, str]) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {k: options[k] for k in FILES if k in options}
    if "ssl_cert_reqs" in options:
        if options["ssl_cert_reqs"] not in ("none", "optional", "required"):
            raise ValueError
        found["ssl_cert_reqs"] = options["ssl_cert_reqs"]
    checks = options.get("ssl_check_hostname", "true" if _is_verified(options) else "false")
    if checks.lower() not in _TRUTH:
        raise ValueError
    found["ssl_check_hostname"] = _TRUTH[checks.lower()]
    return found


def _is_verified(options: dict[str, str]) -> bool:
    return options.get("ssl_cert_reqs") != "none"


def _check_files(shown: str, options: dict[str, str]) -> None:
    for name in (*FILES, *PASSWORD_FILES):
        if name not in options:
            continue
        try:
            Path(options[name]).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"--redis-url {shown}: cannot read {name} {options[name]} ({error.strerror}); "
                "correct the path, or let this user read it"
            ) from None
