"""OpenTelemetry spans of requests that are over, sent by OTLP over HTTP. Imported only where traces
are asked for: the packages are an extra.

Names are those of the conventions for generative AI (opentelemetry.io, semantic conventions 1.41)
and, for what they do not know, `aegaeon.*`.
"""

import logging
import os
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aegaeon import __version__
from aegaeon.proxy.traces import Phase, Run, Trace, Value

EXPORT_S = 3.0  # for the collector to take a batch, attempts included


class SpanSender:
    """Makes spans of traces and sends them to the collector at `endpoint`, a URL of OTLP's. One
    thread calls `send`; whatever else OpenTelemetry's SDK reads of OTEL_* applies."""

    def __init__(self, endpoint: str) -> None:
        self._made = _Made()
        # Ended by `close`, and not by the interpreter's end.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(self._made)
        self._tracer = self._provider.get_tracer("aegaeon", __version__)
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)
        # What it says of each batch that it cannot send, whoever calls `send` says once.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)

    def send(self, traces: Sequence[Trace]) -> bool:
        """Send the spans of `traces`; False: they are lost. Waits up to EXPORT_S."""
        for trace in traces:
            _tell(trace, self._tracer)
        spans = self._made.take()
        return not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Give up what is being sent. Callable from any thread."""
        self._exporter.shutdown()


def _resource() -> Resource:
    """Return what OTEL_* say of this process, over what we do."""
    found = Resource.create({"service.version": __version__, "process.pid": os.getpid()})
    if str(found.attributes["service.name"]).startswith("unknown_service"):
        return found.merge(Resource({"service.name": "aegaeon"}))
    return found


class _Made(SpanProcessor):
    """Keeps spans that have ended until they are taken."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing is due yet."""

    def on_end(self, span: ReadableSpan) -> None:
        """Keep it, unless nobody wants it."""
        if span.context is not None and span.context.trace_flags.sampled:
            self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        """Return them, once."""
        spans, self._spans = self._spans, []
        return spans


def _tell(trace: Trace, tracer: Tracer) -> None:
    """Make the spans of a request: its own, one of each generation, and one of each phase."""
    carrier = {"traceparent": trace.traceparent, "tracestate": trace.tracestate}
    parent = TraceContextTextMapPropagator().extract(carrier, Context())
    operation = trace.asked.get("gen_ai.operation.name")
    name = f"{operation} {trace.model}" if operation else f"{trace.method} {trace.route}"
    root = tracer.start_span(
        name, parent, SpanKind.SERVER, attributes=_of(trace), start_time=trace.at_ns(trace.began_s)
    )
    if root.is_recording():
        within = set_span_in_context(root, parent)
        if trace.runs:
            first_s = min(run.arrival_s for run in trace.runs)
            prepared = tracer.start_span("prepare", within, start_time=trace.at_ns(trace.began_s))
            prepared.end(trace.at_ns(first_s))
        for index, run in enumerate(trace.runs):
            _tell_run(trace, index, run, (tracer, within))
        failed = next((run.error for run in trace.runs if run.error is not None), None)
        if trace.status >= 500 or failed is not None:
            root.set_attribute("error.type", failed or str(trace.status))
            root.set_status(Status(StatusCode.ERROR))
    root.end(trace.at_ns(trace.ended_s))


def _of(trace: Trace) -> dict[str, Value]:
    """The attributes of a request's own span."""
    found: dict[str, Value] = {
        "http.request.method": trace.method,
        "http.route": trace.route,
        "aegaeon.request_id": trace.request_id,
        **trace.asked,
    }
    if trace.status:
        found["http.response.status_code"] = trace.status
    if not trace.runs:
        return found
    runs = trace.runs
    found |= {
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": sum(run.tokens for run in runs),
        "gen_ai.usage.cache_read.input_tokens": sum(run.cached_tokens for run in runs),
        "gen_ai.response.finish_reasons": [run.finish_reason or "error" for run in runs],
    }
    began = [run.first_s for run in runs if run.tokens]
    if began and trace.asked.get("gen_ai.request.stream"):
        found["gen_ai.response.time_to_first_chunk"] = min(began) - trace.began_s
    if trace.left_out:
        found["aegaeon.generations_left_out"] = trace.left_out
    return found


def _tell_run(trace: Trace, index: int, run: Run, place: tuple[Tracer, Context]) -> None:
    tracer, within = place
    attributes: dict[str, Value] = {
        "aegaeon.choice": index,
        "aegaeon.instances": run.instances,
        "aegaeon.attempts": run.attempts,
        "gen_ai.usage.input_tokens": run.prompt_tokens,
        "gen_ai.usage.output_tokens": run.tokens,
        "gen_ai.usage.cache_read.input_tokens": run.cached_tokens,
    }
    if run.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [run.finish_reason]
    start_ns, end_ns = trace.at_ns(run.arrival_s), trace.at_ns(run.end_s)
    span = tracer.start_span("generate", within, attributes=attributes, start_time=start_ns)
    inside = set_span_in_context(span, within)
    for phase in run.phases():
        _tell_phase(trace, phase, tracer, inside)
    if run.error is not None:
        span.set_attribute("error.type", run.error)
        span.set_status(Status(StatusCode.ERROR))
    elif run.finish_reason is None:
        span.set_attribute("aegaeon.cancelled", True)
    span.end(end_ns)


def _tell_phase(trace: Trace, phase: Phase, tracer: Tracer, inside: Context) -> None:
    attributes: dict[str, Value] = {"aegaeon.instance": phase.instance}
    if phase.tokens:
        attributes["gen_ai.usage.output_tokens"] = phase.tokens
    start_ns, end_ns = trace.at_ns(phase.start_s), trace.at_ns(phase.end_s)
    span = tracer.start_span(phase.name, inside, attributes=attributes, start_time=start_ns)
    span.end(end_ns)
