"""What is on the device, in bytes: models' weights and, where it shares their memory, KV.

Whose turn it is and who may not be evicted is the scheduler's decision, passed in.
"""

from collections.abc import Iterable, Mapping

from aegaeon.errors import BudgetTooSmall
from aegaeon.types import ModelId


class Residency:
    """The resident models and the one being loaded, never over the budget.

    `kv_token_bytes` of a model count against the same budget; 0, or none given, where KV has
    memory of its own. Raises BudgetTooSmall when a model would not fit even alone.
    """

    def __init__(
        self,
        weight_bytes: Mapping[ModelId, int],
        budget_bytes: int,
        kv_token_bytes: Mapping[ModelId, int] | None = None,
    ) -> None:
        self._bytes = dict(weight_bytes)
        self._kv_token_bytes = kv_token_bytes or {}
        self._budget_bytes = budget_bytes
        self._used: dict[ModelId, None] = {}  # the least recently used first
        self._pinned: frozenset[ModelId] = frozenset()
        self._loading: ModelId | None = None
        self._weight_bytes = 0  # of the resident models and of the one being loaded
        self._kv_bytes = 0
        for model, size in self._bytes.items():
            self._check_fits(model, size)

    def _check_fits(self, model: ModelId, size: int) -> None:
        if size > self._budget_bytes:
            raise BudgetTooSmall(
                f"model {model} needs {size / 1e9:.2f} GB for its weights, the budget of an "
                f"instance is {self._budget_bytes / 1e9:.2f} GB; raise --model-cache-budget-gb"
            )

    @property
    def loading(self) -> ModelId | None:
        """The model that the copy lane brings in now."""
        return self._loading

    @property
    def resident(self) -> tuple[ModelId, ...]:
        """The resident models, the least recently used first."""
        return tuple(self._used)

    @property
    def evictable(self) -> tuple[ModelId, ...]:
        """Those of them that may make room for others."""
        return tuple(model for model in self._used if model not in self._pinned)

    def pin(self, model: ModelId) -> None:
        """Let `model` make room for nobody. Raises BudgetTooSmall when that leaves too little for
        another one of those served."""
        pinned = self._pinned | {model}
        held = sum(self._bytes[one] for one in pinned)
        rest = max((size for one, size in self._bytes.items() if one not in pinned), default=0)
        if held + rest > self._budget_bytes:
            raise BudgetTooSmall(
                f"the pinned models have {held / 1e9:.2f} GB of weights, the largest other one has "
                f"{rest / 1e9:.2f} GB, the budget of an instance is {self._budget_bytes / 1e9:.2f} "
                "GB; pin fewer, or raise --model-cache-budget-gb"
            )
        self._pinned = pinned

    def unpin(self, model: ModelId) -> None:
        """Let `model` make room again, if it did not."""
        self._pinned -= {model}

    def evictable_bytes(self, model: ModelId) -> int:
        """What of the weights of `model` may make room for others."""
        return 0 if model in self._pinned else self._bytes[model]

    def is_pinned(self, model: ModelId) -> bool:
        """Whether `model` makes room for nobody."""
        return model in self._pinned

    @property
    def budget_bytes(self) -> int:
        """What everything here may take together."""
        return self._budget_bytes

    @property
    def held_bytes(self) -> int:
        """Weights on the device, with those being loaded, and KV."""
        return self._weight_bytes + self._kv_bytes

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self._budget_bytes - self._weight_bytes - self._kv_bytes

    @property
    def kv_margin_bytes(self) -> int:
        """What is best left free for KV to grow; 0 where it has memory of its own."""
        return self._budget_bytes // 32 if self._kv_token_bytes else 0

    def enter(self, model: ModelId, weight_bytes: int) -> None:
        """Let `model` come here, too. Raises BudgetTooSmall when it would not fit even alone."""
        self._check_fits(model, weight_bytes + sum(self._bytes[one] for one in self._pinned))
        self._bytes[model] = weight_bytes

    def leave(self, model: ModelId) -> None:
        """Let `model`, which is neither here nor on its way, come no more."""
        assert model not in self._used and self._loading != model
        self._bytes.pop(model, None)
        self.unpin(model)

    def serves(self, model: ModelId) -> bool:
        """Whether `model` is one of those that may come here."""
        return model in self._bytes

    def bytes_of(self, model: ModelId) -> int:
        """The size of the weights of `model`."""
        return self._bytes[model]

    def kv_bytes(self, model: ModelId, tokens: int) -> int:
        """What KV of `tokens` counts here."""
        return self._kv_token_bytes.get(model, 0) * tokens

    def is_resident(self, model: ModelId) -> bool:
        """Whether `model` may compute."""
        return model in self._used

    def touch(self, model: ModelId) -> None:
        """Note that `model`, if it is still resident, has just been used."""
        if model in self._used:
            self._enter(model)

    def hold_kv(self, model: ModelId, tokens: int) -> None:
        """KV of so many more tokens of `model` is here from now on; less than 0: no longer."""
        if self._kv_token_bytes:
            self._kv_bytes += self._kv_token_bytes[model] * tokens

    def drop(self, model: ModelId) -> None:
        """Note that the weights of `model` are not here any more, if they were."""
        if model in self._used:
            del self._used[model]
            self._weight_bytes -= self._bytes[model]

    def plan(self, model: ModelId, evictable: Iterable[ModelId]) -> tuple[ModelId, ...] | None:
        """The models of `evictable` (best victim first) to drop so that `model` fits, or None."""
        missing = self._bytes[model] - self.free_bytes
        victims: list[ModelId] = []
        for victim in evictable:
            if missing <= 0:
                break
            victims.append(victim)
            missing -= self._bytes[victim]
        if missing > 0:
            return None
        for victim in tuple(victims):  # a later, larger victim may have made it needless
            if missing + self._bytes[victim] <= 0:
                victims.remove(victim)
                missing += self._bytes[victim]
        return tuple(victims)

    def begin_load(self, model: ModelId, evict: Iterable[ModelId]) -> None:
        """The copy lane drops `evict` and brings in `model`, unless it is there, from here on."""
        assert self._loading is None
        for victim in evict:
            self.drop(victim)
        self._loading = model
        if model not in self._used:
            self._weight_bytes += self._bytes[model]
        assert self._weight_bytes <= self._budget_bytes

    def end_load(self, weight_bytes: int | None) -> bool:
        """The load has ended: with that many bytes on the device, or (None) in failure. Return
        whether weights have come that were not there."""
        assert self._loading is not None
        model, self._loading = self._loading, None
        if model in self._used:
            return False
        self._weight_bytes -= self._bytes[model]
        if weight_bytes is None:
            return False
        self._bytes[model] = weight_bytes
        self._weight_bytes += weight_bytes
        self._enter(model)
        return True

    def _enter(self, model: ModelId) -> None:
        self._used.pop(model, None)
        self._used[model] = None
