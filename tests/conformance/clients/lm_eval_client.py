"""lm-eval: the log-likelihoods that multiple-choice tasks are made of, on a task of our own.

The task's samples are held against what `transformers` makes of the same checkpoint.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from probe import BASE_URL, KEY, MODEL, feature, main

TOLERANCE = 1e-3
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""

home = Path(tempfile.mkdtemp())


def write_task() -> None:
    """Write the task and its data to `home`."""
    choices = list(CITIES.values())
    rows = [
        {"question": f"The capital of {country} is", "choices": choices, "answer": at}
        for at, country in enumerate(CITIES)
    ]
    data = home / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "capitals.yaml").write_text(TASK.format(data=data))


def evaluate() -> list[dict[str, object]]:
    """Run lm-eval; return its samples."""
    write_task()
    told = {
        "model": MODEL,
        "base_url": f"{BASE_URL}/v1/completions",
        "tokenizer": os.environ["CONFORMANCE_CHECKPOINT"],
        "num_concurrent": "4",
        "max_retries": "1",
    }
    arguments = ",".join(f"{name}={value}" for name, value in told.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", "capitals", "--include_path", str(home)]
    command += ["--output_path", str(home / "out"), "--log_samples"]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HOME": str(home / "hub")}
    environment["HF_DATASETS_OFFLINE"] = environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.strip()[-2000:].splitlines()[-1]
    (samples,) = (home / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def expected(pairs: list[list[str]]) -> list[list[float]]:
    """Return what transformers makes of (context, continuation) pairs: log-likelihood, whether
    greedy decoding says the same."""
    command = [os.environ["CONFORMANCE_PYTHON"], "-m", "tests.conformance.likelihoods"]
    done = subprocess.run(
        [*command, os.environ["CONFORMANCE_CHECKPOINT"]],
        input=json.dumps(pairs),
        cwd=os.environ["CONFORMANCE_ROOT"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout)


@feature("log-likelihoods within 1e-3 of transformers")
def _likelihoods() -> None:
    pairs, ours = [], []
    for sample in evaluate():
        for given, answer in zip(sample["arguments"].values(), sample["resps"], strict=True):
            pairs.append([given["arg_0"], given["arg_1"]])
            ours.append([float(answer[0][0]), str(answer[0][1]) == "True"])
    assert len(pairs) == len(CITIES) ** 2, len(pairs)
    for pair, mine, theirs in zip(pairs, ours, expected(pairs), strict=True):
        assert abs(mine[0] - theirs[0]) <= TOLERANCE, (pair, mine, theirs)
        assert mine[1] == bool(theirs[1]), (pair, mine, theirs)


if __name__ == "__main__":
    main()
