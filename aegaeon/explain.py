"""The command `aegaeon explain`: the story of a request, asked of a running server and told in
sentences."""

import argparse
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence

import msgspec

from aegaeon.config import api_key
from aegaeon.errors import AegaeonError, ConfigError, InvalidRequest, StoreUnavailable
from aegaeon.explanations import At, Dispatched, Explanation, is_of
from aegaeon.flags import Parser
from aegaeon.types import RequestId

URL = "http://127.0.0.1:8080"
TIMEOUT_S = 10.0
LIMIT = 1000
WAIT_S = 0.5  # gaps from here on are told

EXAMPLES = """\
examples:
  aegaeon explain chatcmpl-3f1c5a0b9d2e4f60718293a4
  aegaeon explain chatcmpl-3f1c5a0b9d2e4f60718293a4 --url http://10.0.0.7:8080 --json

The id is that of the answer (its key "id"). Servers remember their last few thousand decisions.
exit codes: 0 told, 1 unknown id or no server there, 2 wrong usage"""

# The codes of reasons that may stand beside any action.
REASONS = {
    "only_one": "it is the only instance that can",
    "home": "requests of its model are there",
    "resident": "its model's weights are there, and others are no less busy",
    "least_load": "it is the least busy",
    "least_wait": "its node makes it wait least",
    "prefix": "it has what the prompt begins with, so the first token comes sooner",
    "least_slack": "its model is the next to be late of those on the device",
    "turn_goes_on": "others have time enough",
    "takes_turns": "all are in time, and take turns",
    "newcomer": "it is new, and the device has time",
    "goes_on": "nothing has changed since",
    "least_slack_absent": "its model is the next to be late of those not on the device",
    "makes_way": "who computed is well ahead, or has kept another one waiting for long",
    "room_for_kv": "those who compute need room for keys and values",
    "no_room_for_kv": "there is no room for keys and values",
    "kv_not_here": "its keys and values are not on the device",
    "not_loaded": "no model with requests is on the device",
    "no_requests": "there is nothing to do",
    "prefilled": "it has its first token; another instance decodes",
    "preload": "the settings ask for it at start",
    "turn": "it is the model's turn",
    "this_turn": "it is the turn's batch",
    "next_turn": "its turn is next",
    "front_group": "its group is the first in line",
    "front_of_queue": "its request is the first in line",
}
ACTIONS = {
    "switch": "the device is given to {model}",
    "prefill": "prefill{others}",
    "decode": "decode{others}",
    "handoff": "handed over to an instance that decodes",
}


def explain_command(given: Sequence[str]) -> Iterator[str]:
    """Yield what is to be printed. Raises ConfigError, InvalidRequest, StoreUnavailable."""
    parser = Parser(
        prog="aegaeon explain",
        description="Tell why a request was served as it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("request", metavar="REQUEST_ID", help="the id of the answer")
    parser.add_argument("--url", default=URL, help=f"of the server (default: {URL})")
    parser.add_argument("--key", help="with the scope admin (default: AEGAEON_API_KEY)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(given)
    found = fetch(options.url, options.request, options.key or api_key())
    if options.json:
        yield json.dumps(msgspec.to_builtins(found), indent=2)
        return
    yield from story(found, options.request)


def fetch(url: str, request: RequestId, key: str = "") -> Explanation:
    """Ask the server at `url`. Raises ConfigError, InvalidRequest, StoreUnavailable."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, not be {url!r}")
    query = urllib.parse.urlencode({"request": request, "limit": LIMIT})
    address = f"{url.rstrip('/')}/admin/decisions?{query}"
    try:
        asked = urllib.request.Request(address, headers=_bearer(key))
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise _refused(error, url) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StoreUnavailable(f"no server answers at {url} ({reason}); see --url") from None
    try:
        return msgspec.json.decode(body, type=Explanation)
    except msgspec.MsgspecError:
        raise StoreUnavailable(f"{url} is not a server of this version; see --url") from None


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _refused(error: urllib.error.HTTPError, url: str) -> AegaeonError:
    try:
        message = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{url} answers with status {error.code}; is it an aegaeon server?"
    return InvalidRequest(str(message))


def story(found: Explanation, request: RequestId) -> Iterator[str]:
    """Yield the lines of the story, times counted from the arrival."""
    decided = _during(found, request)
    arrivals = [one.arrival_s for one in found.dispatched]
    firsts = [at.decision.at_s for at in decided]
    zero_s = min(arrivals or firsts, default=found.now_s)
    told = [(one.at_s, one.at_s, _dispatch_line(one)) for one in found.dispatched]
    told += [(at.decision.at_s, at.decision.until_s, _decision_line(at, request)) for at in decided]
    yield f"request {request}, which came {found.now_s - zero_s:.1f} s ago"
    before_s = zero_s
    for at_s, until_s, line in sorted(told):
        if at_s - before_s >= WAIT_S:
            yield f"{'':>10}  ({at_s - before_s:.3f} s without a decision on it or its model)"
        yield f"{at_s - zero_s:+9.3f}s  {line}"
        before_s = max(before_s, until_s)
    if found.silent:
        yield f"without {', '.join(found.silent)}, which did not answer in time"


def _during(found: Explanation, request: RequestId) -> list[At]:
    """What concerns the request, and loads and switches of its model meanwhile."""
    own = [at for at in found.decisions if any(is_of(r, request) for r in at.decision.requests)]
    begins_s = min((one.arrival_s for one in found.dispatched), default=float("-inf"))
    if not own:
        return [at for at in found.decisions if at.decision.until_s >= begins_s]
    ends_s = max(at.decision.until_s for at in own)
    begins_s = min(begins_s, own[0].decision.at_s) if found.dispatched else own[0].decision.at_s
    where = {at.instance for at in own}
    return [
        at
        for at in found.decisions
        if at.instance in where and begins_s <= at.decision.until_s and at.decision.at_s <= ends_s
    ]


def _dispatch_line(one: Dispatched) -> str:
    words = f"sent to {one.instance}: {_reason(one.reason)}"
    if one.attempt:
        words += f" (attempt {one.attempt + 1})"
    if one.excluded:
        words += f"; not to {', '.join(one.excluded)}, which took nothing or ended"
    return words


def _decision_line(at: At, request: RequestId) -> str:
    one = at.decision
    others = sum(not is_of(other, request) for other in one.requests)
    beside = f" with {others} other{'s' if others > 1 else ''}" if others else ""
    if one.action == "load":
        words = f"load of {one.model} begins"
        if one.evicted:
            words += f" in the place of {', '.join(one.evicted)}"
    else:
        words = ACTIONS.get(one.action, one.action).format(model=one.model, others=beside)
    if one.times > 1:
        words += f", {one.times} steps in {one.until_s - one.at_s:.3f} s"
    return f"{at.instance}: {words}: {_reason(one.reason)}"


def _reason(code: str) -> str:
    return f"{REASONS[code]} ({code})" if code in REASONS else code or "no reason given"
