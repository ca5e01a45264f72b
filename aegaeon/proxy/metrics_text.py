"""Figures as the text that Prometheus reads, in its own format and in OpenMetrics.

Written here rather than by the client library, which takes a tenth of a second of the loop for a
hundred models; tests read the text back with that library's parsers.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

from aegaeon import __version__
from aegaeon.figures import BUCKETS_S, DeviceFigures, Histogram, InstanceFigures, Sums
from aegaeon.measures import PHASES, PhaseTotal
from aegaeon.types import Instance, ModelId

PREFIX = "aegaeon_"
TIERS = ("device", "host", "disk")

_BOUNDS = (*map(str, BUCKETS_S), "+Inf")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_Samples = Iterable[tuple[str, float]]  # labels as they stand in the text, value


class Text:
    """Writes families of samples. What does not change of a line is kept for the next scrape."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, ModelId], str] = {}
        self._parts: list[str] = []
        self._is_open = False

    def begin(self, is_openmetrics: bool) -> None:
        """Begin anew, in that format or the plain one."""
        self._parts = []
        self._is_open = is_openmetrics

    def end(self) -> bytes:
        """Return all that was written."""
        if self._is_open:
            self._parts.append("# EOF\n")
        return "".join(self._parts).encode()

    def counter(self, name: str, text: str, samples: _Samples) -> None:
        """Add a counter; `name` has no `_total`."""
        total = f"{PREFIX}{name}_total"
        self._head(f"{PREFIX}{name}" if self._is_open else total, "counter", text)
        self._parts += [f"{total}{labels} {value}\n" for labels, value in samples]

    def gauge(self, name: str, text: str, samples: _Samples) -> None:
        """Add a gauge."""
        self._head(f"{PREFIX}{name}", "gauge", text)
        self._parts += [f"{PREFIX}{name}{labels} {value}\n" for labels, value in samples]

    def histogram(self, name: str, text: str, samples: Iterable[tuple[ModelId, Histogram]]) -> None:
        """Add a histogram of each model."""
        self._head(f"{PREFIX}{name}", "histogram", text)
        for model, histogram in samples:
            key = name, model
            lines = self._lines.get(key)
            if lines is None:
                lines = self._lines[key] = _lines(f"{PREFIX}{name}", model)
            totals = tuple(itertools.accumulate(histogram.counts))
            self._parts.append(lines % (*totals, histogram.sum_s, totals[-1]))

    def _head(self, name: str, kind: str, text: str) -> None:
        self._parts.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")


def labels(**values: str) -> str:
    """Return label names and values as they stand behind a metric's name."""
    return "{" + ",".join(f'{k}="{v.translate(_ESCAPES)}"' for k, v in values.items()) + "}"


def write(text: Text, sums: Sums, rows: tuple[Instance, ...], served: tuple[ModelId, ...]) -> None:
    """Write everything: counts, and what the rows of the table say of now."""
    _write_requests(text, sums)
    _write_promises(text, sums)
    _write_queues(text, sums, rows, served)
    _write_moves(text, sums)
    _write_residency(text, sums, rows, served)
    _write_instances(text, sums, rows)
    _write_processes(text, sums, rows)


def _write_requests(text: Text, sums: Sums) -> None:
    models = sums.models
    text.histogram(
        "time_to_first_token_seconds",
        "From arrival to the first token: waiting, loading, switching and prefill.",
        ((model, figures.ttft) for model, figures in models.items()),
    )
    text.histogram(
        "inter_token_latency_seconds",
        "Before each token but the first; tokens that come together are 0 apart.",
        ((model, figures.tbt) for model, figures in models.items()),
    )
    text.histogram(
        "e2e_request_latency_seconds",
        "From arrival to the end, whatever it was.",
        ((model, figures.request) for model, figures in models.items()),
    )
    text.histogram(
        "request_queue_time_seconds",
        "Before a request's first step, but for its model's loads and switches.",
        ((model, figures.queue) for model, figures in models.items()),
    )
    waits = {
        "request_switch_seconds": "In which requests waited for weights, or for the device to be "
        "given to their model.",
        "request_preempted_seconds": "In which requests that had begun waited for other models.",
    }
    values = ("switch_s", "preempted_s")
    for (name, told), value in zip(waits.items(), values, strict=True):
        text.counter(name, told, ((_of(m), getattr(f, value)) for m, f in models.items()))


def _write_promises(text: Text, sums: Sums) -> None:
    models = sums.models
    counters = {
        "prompt_tokens": ("Tokens of prompts that were answered.", "prompt_tokens"),
        "generation_tokens": ("Tokens made.", "generated_tokens"),
        "tokens_in_time": ("Tokens made by the time that was promised.", "tokens_in_time"),
        "prefix_cache_queries": ("Tokens of prompts looked for in the cache.", "prompt_tokens"),
        "prefix_cache_hits": ("Tokens of prompts found there, not prefilled.", "cached_tokens"),
        "request_cancelled": ("Requests whose clients went away.", "cancelled"),
    }
    for name, (told, value) in counters.items():
        text.counter(name, told, ((_of(m), getattr(f, value)) for m, f in models.items()))
    by_label = {
        "request_success": ("Requests answered.", "finished", "finished_reason"),
        "request_failure": ("Requests that ended in an error.", "failed", "code"),
        "request_slo": (
            "Requests by which targets they kept (both, ttft, tbt, neither); attainment is the "
            "share of both.",
            *("within", "within"),
        ),
    }
    for name, (told, value, label) in by_label.items():
        text.counter(
            name,
            told,
            (
                (labels(model_name=model, **{label: key}), count)
                for model, figures in models.items()
                for key, count in getattr(figures, value).items()
            ),
        )


def _write_queues(
    text: Text, sums: Sums, rows: tuple[Instance, ...], served: tuple[ModelId, ...]
) -> None:
    for name in ("waiting", "running"):
        counts = dict.fromkeys(served, 0)
        for row in rows:
            for model, count in getattr(row.status, name).items():
                counts[model] = counts.get(model, 0) + count
        told = f"Requests {name} at instances."
        text.gauge(f"num_requests_{name}", told, ((_of(m), n) for m, n in counts.items()))
    text.gauge(
        "num_requests_open",
        "Requests that proxies have taken in and not answered to the end.",
        ((_of(model), figures.open) for model, figures in sums.models.items()),
    )
    text.gauge(
        "oldest_wait_seconds",
        "How long the oldest request without a token has waited.",
        ((_of(model), figures.oldest_wait_s) for model, figures in sums.models.items()),
    )


def _write_moves(text: Text, sums: Sums) -> None:
    found = tuple(_by_model(sums))
    moves = [
        (labels(instance=name, model_name=model, phase=phase, reason=reason), done)
        for name, model, figures in found
        for phase, reasons in figures.moves.items()
        for reason, done in reasons.items()
    ]
    text.counter(
        "switches",
        "Loads of weights (load), of keys and values (kv), and hand-overs of the device (switch), "
        "with the reason of the decision.",
        ((at, done.count) for at, done in moves),
    )
    told = "What those took; they run beside compute where they can."
    text.counter("switch_seconds", told, ((at, done.seconds) for at, done in moves))
    text.counter(
        "evictions",
        "Models that made way, on a device or in the node's cache, with the reason.",
        (
            (labels(instance=name, model_name=model, tier=tier, reason=reason), count)
            for name, model, figures in found
            for tier, reasons in figures.evictions.items()
            for reason, count in reasons.items()
        ),
    )
    for name, told, value in (
        ("num_preemptions", "Requests that lost their keys and values.", "preemptions"),
        ("load_failures", "Loads that failed.", "failed_loads"),
    ):
        text.counter(
            name,
            told,
            ((labels(instance=i, model_name=m), getattr(f, value)) for i, m, f in found),
        )


def _write_residency(
    text: Text, sums: Sums, rows: tuple[Instance, ...], served: tuple[ModelId, ...]
) -> None:
    device = dict.fromkeys(served, 0)
    for row in rows:
        for model in row.status.resident:
            device[model] = device.get(model, 0) + 1
    cached = {model for one in sums.instances.values() for model in one.cached}
    text.gauge(
        "model_resident",
        "Devices that hold a model's weights; whether the node's cache, and the disk, do.",
        (
            (labels(model_name=model, tier=tier), count)
            for model, on_devices in device.items()
            for tier, count in zip(TIERS, (on_devices, int(model in cached), 1), strict=True)
        ),
    )
    text.gauge(
        "model_on_device",
        "Instances whose device the model has now.",
        ((_of(model), sum(row.status.current == model for row in rows)) for model in device),
    )


def _write_instances(text: Text, sums: Sums, rows: tuple[Instance, ...]) -> None:
    live = {row.record.id for row in rows}
    present = [(name, one) for name, one in sums.instances.items() if name in live]
    for name, told in (
        ("weight_bytes", "Weights in an instance's memory: the device's, or the node's cache."),
        ("weight_budget_bytes", "The most that those may be."),
        ("kv_bytes", "Keys and values of an instance."),
        ("kv_budget_bytes", "The most that those may be."),
        ("stage_bytes", "Buffers that an instance's loads and copies go through."),
        ("grammar_host_bytes", "Memory of the process that follows schemas; 0: there is none."),
    ):
        text.gauge(name, told, ((_at(i), getattr(one, name)) for i, one in present))
    text.gauge(
        "kv_cache_usage_perc",
        "Keys and values as a share of their budget; 1 is all of it.",
        ((_at(i), one.kv_bytes / (one.kv_budget_bytes or 1)) for i, one in present),
    )
    every = tuple(sums.instances.items())
    for name, told, value in (
        ("compute_seconds", "Prefill and decode steps.", "compute_s"),
        ("expected_compute_seconds", "Those steps, by the costs known at start.", "expected_s"),
        ("stall_seconds", "With requests, and nothing computed.", "stall_s"),
    ):
        text.counter(name, told, ((_at(i), getattr(one, value)) for i, one in every))
    for name, told, value in (
        ("moves", "Copies by phase.", "count"),
        ("moved_bytes", "Bytes copied by phase.", "moved_bytes"),
        ("moved_seconds", "In which copies of a phase ran.", "seconds"),
    ):
        text.counter(name, told, _moved(every, value))


def _write_processes(text: Text, sums: Sums, rows: tuple[Instance, ...]) -> None:
    text.gauge(
        "instance_state",
        "1 for the state that an instance says it is in.",
        ((labels(instance=row.record.id, state=row.status.state), 1) for row in rows),
    )
    every = tuple(sums.instances.items())
    restarts = [(_at(name), one.starts - 1) for name, one in every]
    text.counter("instance_restarts", "Starts of an instance but the first.", restarts)
    hung = [(_at(name), one.hung) for name, one in every]
    text.counter("instance_hangs", "Of those, after the watchdog had ended it.", hung)
    text.counter(
        "proxy_restarts", "Starts of proxies but their first.", [("", sums.proxy_restarts)]
    )
    text.counter(
        "proxy_hangs", "Of those, after the watchdog had ended one.", [("", sums.proxies_hung)]
    )
    text.counter(
        "http_responses",
        "Answers begun, by route and status.",
        (
            (labels(route=route, status=status), count)
            for route, statuses in sums.responses.items()
            for status, count in statuses.items()
        ),
    )
    text.counter(
        "http_dropped",
        "What was refused or closed before any route had it, by the error's code or the reason.",
        ((labels(reason=why), count) for why, count in sums.dropped.items()),
    )
    text.counter(
        "traces",
        "Traces of requests by what became of them.",
        ((labels(outcome=what), count) for what, count in sums.traces.items()),
    )
    text.gauge("build_info", "1; the version.", [(labels(version=__version__), 1)])


def _moved(
    instances: Iterable[tuple[str, InstanceFigures]], value: str
) -> Iterator[tuple[str, float]]:
    for name, one in instances:
        for phase in PHASES:
            total = one.moved.get(phase, PhaseTotal())
            yield labels(instance=name, phase=phase), getattr(total, value)


def _by_model(sums: Sums) -> Iterator[tuple[str, ModelId, DeviceFigures]]:
    for name, one in sums.instances.items():
        for model, figures in one.models.items():
            yield name, model, figures


def _lines(name: str, model: ModelId) -> str:
    """The lines of a model's histogram, with places for the buckets, the sum and the count."""
    of = labels(model_name=model).replace("%", "%%")
    buckets = "".join(f'{name}_bucket{of[:-1]},le="{bound}"}} %d\n' for bound in _BOUNDS)
    return f"{buckets}{name}_sum{of} %r\n{name}_count{of} %d\n"


@lru_cache(maxsize=4096)
def _of(model: ModelId) -> str:
    return labels(model_name=model)


def _at(instance: str) -> str:
    return labels(instance=instance)
