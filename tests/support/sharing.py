"""Nodes that share models, for tests of fetching."""

import filecmp
import socket
import threading
from contextlib import contextmanager, suppress

import torch

from aegaeon.transfer.share import Share, Shelf
from aegaeon.transfer.wire import Line
from tests.support.checkpoints import make_checkpoint

SECRET = b"known to the nodes of a test"


def make_large(directory, seed=0):
    """Write a model of 3 chunks in each of 2 files of weights."""
    sizes = {"intermediate_size": 14000, "num_hidden_layers": 4}
    return make_checkpoint(directory, seed=seed, shards=2, dtype=torch.float32, **sizes)


@contextmanager
def sharing(models_dir, secret=SECRET, port=0, **models):
    """Share what is in `models_dir`, and `models` by name."""
    share = Share(Shelf(models, models_dir), secret, "127.0.0.1", port)
    share.start()
    try:
        yield share
    finally:
        share.close()


@contextmanager
def liar(answer):
    """Be a node that knows the secret and gives to each question what `answer(line, question)`
    sends; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with connection, suppress(Exception):
            line = Line(connection, SECRET, "say")
            while True:
                answer(line, line.question(30))

    def accept():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def assert_same(left, right):
    """Both directories have the same files, byte for byte; hidden ones do not count."""
    names = [{path.name for path in d.iterdir() if path.name[0] != "."} for d in (left, right)]
    assert names[0] == names[1]
    same, differ, failed = filecmp.cmpfiles(left, right, names[0], shallow=False)
    assert (set(same), differ, failed) == (names[0], [], [])
