"""What it takes to keep a sequence's KV on the host, against prefilling it again; as measured."""

from aegaeon.memory.traffic import Traffic
from aegaeon.types import ModelId

# Of a new measurement, in a decaying mean.
SHARE = 0.25


class SwapCosts:
    """Owned by one engine, which tells of each prefill."""

    def __init__(self, traffic: Traffic) -> None:
        """`traffic` knows how long copies of KV take."""
        self._traffic = traffic
        self._token_s: dict[ModelId, float] = {}

    def note_prefill(self, model: ModelId, tokens: int, took_s: float) -> None:
        """Learn from a step that fed `tokens` tokens of `model`."""
        if tokens > 0:
            token_s = took_s / tokens
            known_s = self._token_s.get(model, token_s)
            self._token_s[model] = known_s + SHARE * (token_s - known_s)

    def is_worth_copying(self, model: ModelId, tokens: int, moved_bytes: int) -> bool:
        """Whether `moved_bytes`, out and in, are copied quicker than `tokens` are prefilled.

        What has not been measured yet counts as quick.
        """
        totals = self._traffic.totals()
        out, back = totals["kv_out"], totals["kv_in"]
        known_bytes = out.moved_bytes + back.moved_bytes
        if model not in self._token_s or not known_bytes:
            return True
        byte_s = (out.seconds + back.seconds) / known_bytes
        return moved_bytes * byte_s < tokens * self._token_s[model]
