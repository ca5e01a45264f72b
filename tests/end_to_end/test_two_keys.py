"""A flood of one key does not make another key wait for its end."""

from concurrent.futures import ThreadPoolExecutor

import httpx

from aegaeon.proxy.keys import checked_key, create_key
from tests.support.polling import eventually
from tests.support.server import Server

FLOOD, FLOOD_TOKENS = 24, 96


def test_a_key_is_served_in_the_middle_of_anothers_flood(checkpoints, tmp_path):
    file = tmp_path / "keys.json"
    flood = create_key(file, checked_key({"name": "flood"}))
    light = create_key(file, checked_key({"name": "light"}))
    admin = create_key(file, checked_key({"name": "admin", "scopes": ["admin"]}))
    ended = []

    def ask(key, name, max_tokens):
        body = {"model": "ada", "prompt": "the device", "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        bearer = {"Authorization": f"Bearer {key}"}
        url = f"{server.url}/v1/completions"
        answer = httpx.post(url, json=body, headers=bearer, timeout=90)
        ended.append(name)
        return answer

    flags = ("--keys-file", str(file), "--max-batch", "2")
    with Server(tmp_path, checkpoints, *flags) as server, ThreadPoolExecutor(FLOOD) as threads:
        flooding = [threads.submit(ask, flood, "flood", FLOOD_TOKENS) for _ in range(FLOOD)]
        eventually(lambda: server.requests() >= FLOOD - len(ended) > 0)
        before = len(ended)
        answer = ask(light, "light", 8)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert all(one.result().status_code == 200 for one in flooding)
        decisions = httpx.get(
            f"{server.url}/admin/decisions",
            params={"request": answer.json()["id"]},
            headers={"Authorization": f"Bearer {admin}"},
            timeout=30,
        ).json()
    # In the order in which they came it would have been the last one.
    assert ended.index("light") - before < 3 * (FLOOD - before) // 4, ended
    assert [one["key"] for one in decisions["dispatched"]] == ["light"]
