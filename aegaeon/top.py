"""The command `aegaeon top`: what a running server does, asked of it once a second."""

import argparse
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aegaeon.errors import ConfigError, StoreUnavailable
from aegaeon.flags import Parser
from aegaeon.proxy.status import InstanceNow, ModelNow, Quantiles, Status

URL = "http://127.0.0.1:8080"
TIMEOUT_S = 10.0
INTERVAL_S = 1.0

EXAMPLES = """\
examples:
  aegaeon top                                  # until Ctrl-C
  aegaeon top --url http://10.0.0.7:8080 --once
  aegaeon top --json | jq '.models[] | {id, tier, waiting}'

TTFT and TBT are those of the last minute, p50 / p90; what is beyond the target is red.
exit codes: 0 shown, 1 no server there, 2 wrong usage"""


def top_command(given: Sequence[str]) -> tuple[Iterator[RenderableType], bool]:
    """Return what is to be shown, one after another, and whether each takes the place of the one
    before. Raises ConfigError; showing raises StoreUnavailable."""
    parser = Parser(
        prog="aegaeon top",
        description="Show what a running server does, live.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default=URL, help=f"of the server (default: {URL})")
    parser.add_argument("--key", default="", help="an API key that may look (default: none)")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument("--json", action="store_true", help="once, as JSON, for programs")
    options = parser.parse_args(given)
    if not options.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, not be {options.url!r}")
    if options.json:
        return _json(options.url, options.key), False
    if options.once:
        return (picture(fetch(options.url, options.key)) for _ in range(1)), False
    return _live(options.url, options.key), True


def _json(url: str, key: str) -> Iterator[str]:
    yield json.dumps(msgspec.to_builtins(fetch(url, key)), indent=2)


def _live(url: str, key: str) -> Iterator[RenderableType]:
    """Yield a picture each second; a server that is away for a while is waited for."""
    yield picture(fetch(url, key))
    while True:
        time.sleep(INTERVAL_S)
        try:
            yield picture(fetch(url, key))
        except StoreUnavailable as error:
            yield Text(str(error), style="red")


def fetch(url: str, key: str = "") -> Status:
    """Ask the server at `url`. Raises StoreUnavailable."""
    request = urllib.request.Request(f"{url.rstrip('/')}/admin/status")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return msgspec.json.decode(answer.read(), type=Status)
    except urllib.error.HTTPError as error:
        remedy = "give --key a key that may" if error.code in (401, 403) else "see --url"
        raise StoreUnavailable(f"{url} answers with status {error.code}; {remedy}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StoreUnavailable(f"no server answers at {url} ({reason}); see --url") from None
    except msgspec.MsgspecError:
        raise StoreUnavailable(f"{url} is not a server of this version; see --url") from None


def picture(status: Status) -> RenderableType:
    """Return both tables."""
    return Group(
        Text(
            f"{status.open_requests} open requests; targets: TTFT {status.slo_ttft_s:g} s, "
            f"TBT {status.slo_tbt_s:g} s"
        ),
        _instances(status.instances),
        _models(status),
    )


def _instances(instances: Sequence[InstanceNow]) -> Table:
    table = _table("instance", "state", "device has", "coming", "waiting", "running", "weights GB",
                   "KV GB", "switches", "restarts")  # fmt: skip
    for one in instances:
        table.add_row(
            one.id,
            Text(one.state, style="" if one.state == "ready" else "red"),
            one.current or "-",
            one.loading or "-",
            str(one.waiting),
            str(one.running),
            _share(one.weight_bytes, one.weight_budget_bytes),
            _share(one.kv_bytes, one.kv_budget_bytes),
            str(one.switches),
            str(one.restarts),
        )
    return table


def _models(status: Status) -> Table:
    table = _table("model", "is", "tier", "waiting", "running", "oldest s", "TTFT s", "TBT ms",
                   "tokens/s", "done", "failed", "in target")  # fmt: skip
    for one in sorted(status.models, key=_busiest_first):
        table.add_row(
            one.id,
            one.status if one.progress is None else f"{one.status} {one.progress:.0%}",
            one.tier,
            str(one.waiting),
            str(one.running),
            f"{one.oldest_wait_s:.1f}",
            _quantiles(one.ttft_s, one.slo_ttft_s, 1.0),
            _quantiles(one.tbt_s, one.slo_tbt_s, 1e3),
            f"{one.tokens_per_s:.1f}",
            str(one.finished),
            str(one.failed),
            "-" if one.attained is None else f"{one.attained:.0%}",
        )
    return table


def _busiest_first(one: ModelNow) -> tuple[int, str]:
    return -(one.waiting + one.running), one.id


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        is_text = index < 2 or column in ("device has", "coming", "tier")
        table.add_column(column, justify="left" if is_text else "right")
    return table


def _share(used_bytes: int, budget_bytes: int) -> str:
    if not 0 < budget_bytes < 1 << 60:  # the null device has no bounds
        return f"{used_bytes / 1e9:.2f}"
    return f"{used_bytes / 1e9:.2f}/{budget_bytes / 1e9:.2f}"


def _quantiles(found: Quantiles, target_s: float, scale: float) -> Text:
    """p50 / p90, each red beyond the target."""
    text = Text()
    for value in (found.p50, found.p90):
        if text:
            text.append("/")
        if value is None:
            text.append("-")
        else:
            text.append(f"{value * scale:.3g}", style="red" if value > target_s else "")
    return text
