"""The server that clients are tried against: a model that speaks English, and one for tools."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from aegaeon.proxy.keys import checked_key, create_key
from benchmark.random_model import write_model
from tests.conformance.environments import ROOT
from tests.support.server import Server

ENGLISH = "SmolLM2-135M-Instruct"
TOOLS = "random-qwen3"
# With Qwen3's vocabulary, and little else.
SIZES: dict[str, int] = {
    "vocab_size": 151_936,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


class Endpoint(msgspec.Struct, frozen=True):
    """Where the server is, and the key of it."""

    url: str
    key: str
    checkpoint: Path  # of ENGLISH

    def environment(self) -> dict[str, str]:
        """Return what the clients' scripts read."""
        told = {
            "URL": self.url,
            "KEY": self.key,
            "MODEL": ENGLISH,
            "TOOL_MODEL": TOOLS,
            "CHECKPOINT": str(self.checkpoint),
            "PYTHON": sys.executable,
            "ROOT": str(ROOT),
        }
        told = {f"CONFORMANCE_{name}": value for name, value in told.items()}
        return told | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}


@contextmanager
def running(directory: Path, models: Path) -> Iterator[Endpoint]:
    """Serve both models until the end."""
    english, tools = (models / ENGLISH).resolve(), directory / TOOLS
    write_model(tools, SIZES)
    for file in (models / ".qwen3-tokenizer").iterdir():
        shutil.copy(file, tools)
    keys = directory / "keys.json"
    # Not an administrator's: some clients try everything.
    key = create_key(keys, checked_key({"name": "clients", "scopes": ["inference", "metrics"]}))
    served = {ENGLISH: english, TOOLS: tools}
    with Server(directory, served, "--keys-file", str(keys)) as server:
        yield Endpoint(server.url, key, english)
