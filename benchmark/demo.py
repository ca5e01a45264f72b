#!/usr/bin/env python3
"""The demo: one server, two instances, three models that answer at the same time.

Imports the weights under three names, starts a server, asks through the `openai` client, shows
the answers as they come and a table at the end. The server is stopped however this ends.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from openai.types.chat import ChatCompletionMessageParam
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.metrics import summarize, time_to_first_token_s, times_between_tokens_s
from benchmark.serving import ServerError, running_server

QUESTIONS = {
    "smollm2-red": "Explain in three sentences why the sky is blue.",
    "smollm2-green": "Write a short poem about a library at night.",
    "smollm2-blue": "Name three ways to save energy at home, with one sentence each.",
}
ANSWER_TOKENS = 80
LINE_CHARS = 72


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass
class Answer:
    """One model's answer so far. Times are seconds of the monotonic clock."""

    model: str
    asked_s: float = 0.0
    instance: str = ""
    text: str = ""
    token_times_s: list[float] = field(default_factory=list)
    is_done: bool = False


class Stage:
    """Shows answers while they grow: side by side on a terminal, else line by line."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        """Nothing is shown before `show`."""
        self._console = console
        self._answers = answers
        self._printed = dict.fromkeys((answer.model for answer in answers), 0)
        self._live = Live(console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> "Stage":
        """Begin to show."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last of it."""
        self.show()
        if self._console.is_terminal:
            self._live.stop()

    def show(self) -> None:
        """Bring what is seen up to date."""
        if self._console.is_terminal:
            self._live.update(Columns([_panel(answer) for answer in self._answers], expand=True))
            return
        for answer in self._answers:
            self._print_lines(answer)

    def _print_lines(self, answer: Answer) -> None:
        while rest := answer.text[self._printed[answer.model] :]:
            line = _first_line(rest, answer.is_done)
            if line is None:
                return
            self._printed[answer.model] += len(line)
            if line.strip():
                prefix = f"{answer.model} @ {answer.instance} | "
                print(prefix + line.strip(), flush=True)


def _first_line(text: str, is_whole: bool) -> str | None:
    """The part of `text` to print as one line, or None when more is to come first."""
    line, newline, _ = text.partition("\n")
    if len(line) > LINE_CHARS:
        return line[: line.rfind(" ", 0, LINE_CHARS) + 1 or LINE_CHARS]
    return line + newline if newline or is_whole else None


def _panel(answer: Answer) -> Panel:
    text = Text(QUESTIONS[answer.model] + "\n\n", style="dim")
    text.append(answer.text, style="not dim")
    colour = answer.model.rpartition("-")[2]
    where = answer.instance or "waiting"
    return Panel(text, title=answer.model, subtitle=where, border_style=colour, width=38)


def import_models(gguf: Path, models_dir: Path, console: Console) -> None:
    """Make a checkpoint of its own for every name. Raises DemoError."""
    for name in QUESTIONS:
        if (models_dir / name / "config.json").is_file():
            continue
        console.print(f"importing {gguf.name} as {name}")
        command = [sys.executable, "-m", "aegaeon", "models", "import", str(gguf)]
        command += ["--name", name, "--models-dir", str(models_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise DemoError(f"the import failed: {done.stderr.strip()}")


async def ask(client: openai.AsyncOpenAI, answer: Answer, stage: Stage) -> None:
    """Ask one model and note its answer as it streams."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": QUESTIONS[answer.model]}
    ]
    answer.asked_s = time.monotonic()
    stream = await client.chat.completions.create(
        model=answer.model,
        messages=messages,
        stream=True,
        max_tokens=ANSWER_TOKENS,
        temperature=0.6,
        seed=7,
    )
    async for chunk in stream:
        figures = (chunk.model_extra or {}).get("aegaeon") or {}
        answer.instance = figures.get("instance") or answer.instance
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            answer.token_times_s.append(time.monotonic())
            answer.text += piece
            stage.show()
    answer.is_done = True
    stage.show()


async def ask_all(url: str, answers: Sequence[Answer], console: Console, limit_s: float) -> int:
    """Ask all models at once; return the switches of all instances. Raises DemoError."""
    try:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=limit_s, max_retries=0
        ) as client:
            with Stage(console, answers) as stage:
                asked = asyncio.gather(*(ask(client, answer, stage) for answer in answers))
                await asyncio.wait_for(asked, limit_s)
    except asyncio.TimeoutError:
        raise DemoError(f"not all answers were there within {limit_s:.0f} s") from None
    except openai.OpenAIError as error:
        raise DemoError(f"the server answered with an error: {error}") from None
    async with httpx.AsyncClient(timeout=10.0) as plain:
        health = (await plain.get(f"{url}/health")).json()
    return sum(int(instance["switches"]) for instance in health["instances"])


def _serve_flags(models_dir: Path) -> list[str]:
    models = ",".join(QUESTIONS)
    flags = ["--colocated-count", "2", "--models", models, "--models-dir", str(models_dir)]
    return [*flags, "--drain-s", "2"]


def print_table(console: Console, answers: Sequence[Answer], switches: int) -> None:
    """Say how it went."""
    table = Table("model", "instance", "pieces", "TTFT ms", "TBT p50 ms", "TBT p99 ms", box=None)
    for answer in answers:
        ttft_s = time_to_first_token_s(answer.asked_s, answer.token_times_s)
        tbt = summarize(1000 * gap for gap in times_between_tokens_s(answer.token_times_s))
        shown = [None if ttft_s is None else 1000 * ttft_s, tbt.p50, tbt.p99]
        figures = ["-" if value is None else f"{value:.0f}" for value in shown]
        table.add_row(answer.model, answer.instance, str(len(answer.token_times_s)), *figures)
    console.print()
    console.print(table)
    console.print(f"the two instances switched models {switches} times in between")


def run(gguf: Path, models_dir: Path, limit_s: float) -> None:
    """Run the demo. Raises DemoError."""
    console = Console(highlight=False)
    import_models(gguf, models_dir, console)
    answers = [Answer(model) for model in QUESTIONS]
    with tempfile.TemporaryFile("w+", prefix="aegaeon-demo-") as log:
        try:
            console.print("starting a server with two instances")
            with running_server(_serve_flags(models_dir), log) as url:
                console.print(f"asking {', '.join(QUESTIONS)} at {url}\n")
                switches = asyncio.run(ask_all(url, answers, console, limit_s))
        except (DemoError, ServerError):
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-20:])
            raise
    print_table(console, answers, switches)
    if not all(answer.text.strip() for answer in answers):
        raise DemoError("a model gave an empty answer; its checkpoint may be damaged")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Three models on two instances answer at once.")
    parser.add_argument("--gguf", required=True, type=Path, help="the weights of all three")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="imported to here")
    parser.add_argument("--limit-s", type=float, default=240.0, help="time for the answers")
    options = parser.parse_args(arguments)
    try:
        run(options.gguf, options.models_dir, options.limit_s)
    except (DemoError, ServerError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    # Both stop what was started, also where a shell that put us in the background ignores SIGINT;
    # here, since it is the process's to decide.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
