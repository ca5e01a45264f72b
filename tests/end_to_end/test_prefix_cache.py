"""A server finds what prompts begin with: the same answers, and the usage tells how much."""

import os
import signal

import httpx
import pytest

from tests.support.polling import eventually
from tests.support.server import Server, Streamed

FIRST = "In the beginning there was the device, and it passed from model to model. " * 3
STAGED = ("--device", "staged", "--link-gb-per-s", "0.1", "--model-cache-budget-gb", "0.05")
STAGED += ("--device-memory-gb", "0.0065", "--kv-budget-gb", "0.006")
SPLIT = ("--colocated-count", "0", "--prefill-count", "1", "--decode-count", "1")
WAYS = {"cpu": (), "staged": STAGED, "split": SPLIT}


def complete(server, model, prompt, **changes):
    """Return text and usage of an answer that is not streamed."""
    body = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0, **changes}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    return answer["choices"][0]["text"], answer["usage"]


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def found_by_all(server):
    """Return how many tokens the instances say they have found."""
    health = httpx.get(f"{server.url}/health", timeout=10).json()
    return sum(instance["found_tokens"] for instance in health["instances"])


def brought_out(server):
    """Return how many bytes instances that decode have brought out of their devices."""
    decoding = [row for row in server._rows() if row.record.role == "decode"]
    return sum(row.status.moved["kv_out"].moved_bytes for row in decoding if row.status.moved)


def talk(server, models):
    """Two turns with each model, the others' between them; return texts, and what was found."""
    texts, found = [], []
    firsts = {model: complete(server, model, FIRST) for model in models}
    for model, (text, usage) in firsts.items():
        second, later = complete(server, model, FIRST + text + " And then?")
        texts += [text, second]
        found.append((cached(usage), cached(later), usage["prompt_tokens"]))
    return texts, found


@pytest.fixture(scope="module")
def expected(checkpoints, tmp_path_factory):
    """What a server answers that finds nothing."""
    directory = tmp_path_factory.mktemp("without")
    with Server(directory, checkpoints, "--no-prefix-cache") as server:
        texts, found = talk(server, checkpoints)
        assert {(first, second) for first, second, _ in found} == {(0, 0)}
        return texts


@pytest.mark.parametrize(
    "way", ["cpu", "split", pytest.param("staged", marks=pytest.mark.thorough)]
)
def test_second_turns_begin_behind_the_first_ones(checkpoints, tmp_path, expected, way):
    with Server(tmp_path, checkpoints, *WAYS[way]) as server:
        texts, found = talk(server, checkpoints)
        assert texts == expected
        for first, second, prompt_tokens in found:
            assert first == 0
            assert second >= prompt_tokens // 16 * 16 - 16
        told = sum(second for _, second, _ in found)
        eventually(lambda: found_by_all(server) >= told)


@pytest.mark.parametrize(
    "flags",
    [
        SPLIT,
        pytest.param((*SPLIT, "--decode-count", "2"), marks=pytest.mark.thorough),
        (*SPLIT, *STAGED),
    ],
    ids=["cpu", "two decode", "staged"],
)
def test_an_answer_that_another_instance_made_is_not_run_again(checkpoints, tmp_path, flags):
    first, answer, new = list(range(3, 103)), [7] * 40, list(range(13, 23))
    with Server(tmp_path, checkpoints, *flags) as server:
        before = brought_out(server)
        for model in checkpoints:
            said = {"ignore_eos": True, "logit_bias": {"7": 100}}
            _, usage = complete(server, model, first, **said)
            assert cached(usage) == 0
            second = [*first, *answer, *new]
            if "staged" in flags:  # it comes to the host behind the answer, and nobody waits for it
                eventually(lambda before=before: brought_out(server) > before)
                before = brought_out(server)
            known = len(first) + len(answer) - 1
            _, usage = complete(server, model, second, **said)
            assert cached(usage) in (known // 16 * 16, known)


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    """One for tests that ask a model each: what is kept of one is of no use to another."""
    with Server(tmp_path_factory.mktemp("server"), checkpoints) as server:
        yield server


def test_streams_say_so_in_their_usage(server):
    for is_found in (False, True):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "ada", "prompt": FIRST, "max_tokens": 5, **options}
        lines = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text
        assert ('"cached_tokens":0}' in lines) == (not is_found)


def test_choices_of_one_prompt_count_it_once(server):
    _, usage = complete(server, "bob", FIRST)
    assert cached(usage) == 0
    _, usage = complete(server, "bob", [FIRST, FIRST + "more"], n=3)
    assert 0 < cached(usage) < usage["prompt_tokens"]


@pytest.mark.thorough
def test_what_a_killed_instance_kept_is_in_nobodys_way(checkpoints, tmp_path, expected):
    with Server(tmp_path, checkpoints, "--colocated-count", "2") as server:
        talk(server, checkpoints)
        stream = Streamed(server.url, "ada", FIRST, 200)
        eventually(lambda: stream.has_begun, within_s=30)
        for pid in server.instance_pids().values():
            os.kill(pid, signal.SIGKILL)
        assert stream.whole()
        assert talk(server, checkpoints)[0] == expected
