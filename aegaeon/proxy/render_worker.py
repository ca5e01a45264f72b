"""The process that renders chat templates: `-m aegaeon.proxy.render_worker FD SECONDS BYTES`.

A template is a stranger's program and may loop or grow for ever. The sandbox keeps it from reaching
out, the kernel's limits on this process end it: no check inside an interpreter stops every
`'a' * 10**10`.
"""

import logging
import resource
import signal
import socket
import sys
from typing import Any

import msgspec

from aegaeon.errors import CheckpointError, InvalidRequest
from aegaeon.proxy.chat import ChatTemplate
from aegaeon.proxy.frames import receive_frame, send_frame

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 30
# Beyond what came in: the least that a template may write.
LEAST_CHARS = 1 << 20
GROWTH = 4


class Render(msgspec.Struct, frozen=True, tag=True):
    """Render the template `key`; `source` and its `tokens` come with its first use."""

    key: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    extras: dict[str, Any] | None
    add_generation_prompt: bool = True
    source: str | None = None
    tokens: dict[str, str] = {}


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The prompt."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template refuses the conversation, or takes more than it may."""

    message: str


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The template cannot be compiled."""

    message: str


Rendering = Rendered | Refused | Unusable


def serve(peer: socket.socket, cpu_s: float) -> None:
    """Answer each Render in turn until the other side closes."""
    templates: dict[int, ChatTemplate] = {}
    decoder = msgspec.msgpack.Decoder(Render)
    while (frame := receive_frame(peer, MAX_FRAME_BYTES)) is not None:
        # The kernel ends us when it has run out, whatever we are in the middle of.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = msgspec.msgpack.encode(_answer(templates, decoder.decode(frame), len(frame)))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        send_frame(peer, answer)


def _answer(templates: dict[int, ChatTemplate], asked: Render, frame_bytes: int) -> Rendering:
    try:
        if asked.source is not None:
            templates[asked.key] = ChatTemplate(asked.source, asked.tokens)
        max_chars = LEAST_CHARS + GROWTH * frame_bytes
        text = templates[asked.key].render(
            asked.messages, asked.tools, asked.extras, asked.add_generation_prompt, max_chars
        )
        text.encode()  # half a surrogate pair is no text
        return Rendered(text)
    except CheckpointError as error:
        return Unusable(str(error))
    except InvalidRequest as error:
        return Refused(str(error))
    except UnicodeEncodeError:
        return Refused("the model's chat template makes what is no text of this conversation")
    except MemoryError:
        return Refused("the model's chat template needs too much memory for this conversation")


def main() -> int:
    """Bound ourselves, then serve."""
    descriptor, cpu_s, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C at a terminal is for the server, which closes our socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as peer:
        serve(peer, cpu_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
