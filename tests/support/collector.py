"""A collector of OpenTelemetry's traces on a port of its own: keeps the spans it is sent."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.fake_instance import wait_until


class Collector:
    """What it was sent, and how it answers: with `status`, once `goes_on` is set."""

    def __init__(self):
        self.requests, self.paths = [], []
        self.status, self.goes_on = 200, threading.Event()
        self.goes_on.set()
        self.url = ""

    @property
    def spans(self):
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name):
        """The spans, once one of that name is there."""
        wait_until(lambda: any(span.name == name for span in self.spans))
        return self.spans


@contextmanager
def collecting():
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.goes_on.wait(300)
            collector.paths.append(self.path)
            if collector.status == 200:
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(collector.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.goes_on.set()
        server.shutdown()
        thread.join(10)
        server.server_close()


def attributes_of(span):
    """A span's attributes as plain values."""
    return {one.key: _plain(one.value) for one in span.attributes}


def _plain(value):
    if value.WhichOneof("value") == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))
