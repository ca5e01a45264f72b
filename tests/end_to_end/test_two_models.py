"""Requests to several models in flight at once on one instance: interleaved, and the same tokens
as each alone."""

import pytest

from tests.support.server import Server, Streamed
from tests.support.smollm2 import smollm2_directory


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    # Who is late for its first token yields, and who is ahead goes on until others must begin: a
    # target that a busy machine keeps, and much shorter than an answer.
    flags = ("--colocated-count", "1", "--slo-ttft-s", "0.4", "--slo-tbt-s", "0.05")
    with Server(tmp_path_factory.mktemp("server"), checkpoints, *flags) as server:
        yield server


def assert_interleaved(streams):
    last_first = max(stream.times_s[0] for stream in streams)
    first_last = min(stream.times_s[-1] for stream in streams)
    assert last_first < first_last


def test_models_take_turns_and_answer_as_each_alone(server):
    asked = [(name, f"{name} says: the device") for name in ("ada", "bob", "cleo")]
    alone = [Streamed(server.url, name, prompt, 900).whole() for name, prompt in asked]
    assert len(set(alone)) == 3

    before = server.switches()
    together = [Streamed(server.url, name, prompt, 900) for name, prompt in asked]
    assert [stream.whole() for stream in together] == alone
    assert_interleaved(together)
    assert server.switches() - before > 3  # somebody had the device twice


def test_batch_mates_do_not_change_an_answer(server):
    alone = Streamed(server.url, "ada", "the quick", 100).whole()
    prompts = ["the quick", "She sells sea shells", "def main():", "0123456789"]
    together = [Streamed(server.url, "ada", prompt, 100) for prompt in prompts]
    assert together[0].whole() == alone
    for stream in together[1:]:
        stream.whole()


@pytest.mark.thorough
def test_a_real_checkpoint_takes_turns_with_the_same_tokens(tmp_path):
    weights = smollm2_directory()
    models = {"one": weights, "two": weights}
    prompt = "The capital of France is"
    with Server(tmp_path, models, "--slo-ttft-s", "0.5", "--slo-tbt-s", "0.2") as server:
        alone = [Streamed(server.url, name, prompt, 48).whole() for name in models]
        Streamed(server.url, "one", prompt, 1).whole()
        assert "Paris" in alone[0]
        together = [Streamed(server.url, name, prompt, 48) for name in models]
        assert [stream.whole() for stream in together] == alone
        assert_interleaved(together)
