"""The `llm` command, with our models in its extra-openai-models.yaml."""

import os
import subprocess
import tempfile
from pathlib import Path

from probe import BASE_URL, KEY, MODEL, feature, main

home = Path(tempfile.mkdtemp())
# Without a name for its key, `llm` sends none: not that of --key either.
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {BASE_URL}/v1\n"
    "  api_key_name: ours\n"
    f"- model_id: text\n  model_name: {MODEL}\n  api_base: {BASE_URL}/v1\n  completion: true\n"
    "  api_key_name: ours\n"
)


def llm(*arguments: str) -> str:
    """Run the command; return what it printed."""
    command = ["llm", *arguments, "--key", KEY, "--no-log"]
    environment = {**os.environ, "LLM_USER_PATH": str(home)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    return done.stdout


CAPITAL = "What is the capital of France?"
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "24")


@feature("chat")
def _chat() -> None:
    assert "Paris" in llm("-m", "ours", CAPITAL, "--no-stream", *GREEDY)


@feature("chat, streamed")
def _streamed() -> None:
    assert "Paris" in llm("-m", "ours", CAPITAL, *GREEDY)


@feature("text completion, streamed too")
def _completion() -> None:
    assert llm("-m", "text", "Once upon a time", "-o", "max_tokens", "8").strip()


@feature("a system message")
def _system() -> None:
    assert llm("-m", "ours", "-s", "Answer in one word.", CAPITAL, *GREEDY).strip()


if __name__ == "__main__":
    main()
