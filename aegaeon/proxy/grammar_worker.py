"""The process that checks grammars: `-m aegaeon.proxy.grammar_worker FD SECONDS BYTES`."""

import sys

from aegaeon.errors import InvalidRequest
from aegaeon.models.grammar import check_grammar
from aegaeon.proxy.bounded_worker import run

_TOO_MUCH = "the schema takes too much memory to follow; make it simpler"


def answer(frame: bytes) -> bytes:
    """Return what is wrong with a grammar; nothing where it is good."""
    try:
        check_grammar(frame.decode())
    except InvalidRequest as error:
        return str(error).encode()
    except MemoryError:
        return _TOO_MUCH.encode()
    return b""


if __name__ == "__main__":
    sys.exit(run(answer))
