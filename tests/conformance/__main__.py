"""`python -m tests.conformance`: start a server, let each client try it, write the table."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tests.conformance.environments import CLIENTS, ROOT, Missing, node, python
from tests.conformance.report import Line, Tried, to_markdown
from tests.conformance.served import Endpoint, running

TIMEOUT_S = 900


class Client(msgspec.Struct, frozen=True):
    """A client and the script that tries it."""

    name: str
    script: str
    package: str

    def command(self) -> list[str]:
        """Return what runs the script. Raises Missing."""
        if self.script.endswith(".mjs"):
            return ["node", str(node() / self.script)]
        return [str(python()), str(CLIENTS / self.script)]

    def version(self) -> str:
        """Return the version of the client that is there. Raises Missing."""
        if self.script.endswith(".mjs"):
            text = (node() / "node_modules" / self.package / "package.json").read_text()
            return str(json.loads(text)["version"])
        asked = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        done = subprocess.run([str(python()), "-c", asked], capture_output=True, check=True)
        return done.stdout.decode().strip()


CLIENTS_TRIED = (
    Client("openai-python", "openai_python.py", "openai"),
    Client("openai-node", "openai_node.mjs", "openai"),
    Client("langchain-openai", "langchain_client.py", "langchain-openai"),
    Client("Vercel AI SDK", "ai_sdk.mjs", "ai"),
    Client("llm", "llm_command.py", "llm"),
    Client("lm-eval", "lm_eval_client.py", "lm-eval"),
    Client("schemathesis", "schemathesis_client.py", "schemathesis"),
)


def try_client(client: Client, endpoint: Endpoint, say: Callable[[str], None]) -> Tried:
    """Return what came of one client."""
    try:
        command, version = client.command(), client.version()
    except Missing as error:
        return Tried(client.name, "", missing=str(error))
    environment = os.environ | endpoint.environment()
    environment["PATH"] = f"{python().parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    lines = tuple(msgspec.json.decode(line, type=Line) for line in done.stdout.splitlines())
    if not lines:
        said = done.stderr.strip().splitlines()
        lines = (Line("starts", False, said[-1] if said else "it said nothing"),)
    for line in lines:
        say(f"  {'yes' if line.ok else 'NO '}  {line.feature} {line.note}")
    return Tried(client.name, version, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where something does not work."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", default="", help="clients to try, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance.md")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    given = parser.parse_args(arguments)
    wanted = {name for name in given.only.split(",") if name}
    known = {client.name for client in CLIENTS_TRIED}
    if not wanted <= known:
        parser.error(f"no client {', '.join(wanted - known)}; there are {', '.join(sorted(known))}")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    tried = []
    with (
        tempfile.TemporaryDirectory() as directory,
        running(Path(directory), given.models_dir) as endpoint,
    ):
        for client in CLIENTS_TRIED:
            if not wanted or client.name in wanted:
                say(client.name)
                tried.append(try_client(client, endpoint, say))
    if wanted:
        print(to_markdown(tried))
    else:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(to_markdown(tried), encoding="utf-8")
        say(f"written: {given.out}")
    return int(any(one.missing or not all(line.ok for line in one.lines) for one in tried))


if __name__ == "__main__":
    sys.exit(main())
