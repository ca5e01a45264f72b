"""A scripted life of two engines on the stand-in for a device: opened, loaded, stepped, switched,
with keys and values that leave and come back, handed over, closed. Any call of it may fail."""

import gc
import threading
from contextlib import ExitStack

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.types import Decode, Load, Loaded, LoadFailed, Prefill, Stepped, Switch, WeightsLost
from tests.support.cuda_stand_in import open_beside
from tests.support.decoder import make_request
from tests.support.regions import own_regions

GB = 1e9
# Of the device and of the host each: not enough for all three requests, on the device not for two.
DEVICE_MODELS = 1.3
PROMPT_TOKENS = 60
KV_GB = 0.0002
PATIENCE_S = 60.0


class Ended(Exception):
    """The script goes no further: something failed as it may, by an error of ours."""


class Life:
    """`tokens` are those of each request so far; `error` is what ended it early, if anything."""

    def __init__(self, specs):
        self.specs = specs
        self.tokens = {}
        self.error = None
        self._requests = {}
        self._engines = []

    def run(self):
        """Live, to the end or to the first failure; everything is closed then. Returns whether all
        of it was done."""
        with own_regions() as regions, ExitStack() as opened:
            try:
                self._open(regions, opened)
                self._script()
            except Ended:
                pass
            except AegaeonError as error:
                # Without its frames, which keep what is to be given back.
                self.error = error.with_traceback(None)
                error.__context__ = error.__cause__ = None
        self._engines = []
        gc.collect()
        return self.error is None

    def _open(self, regions, opened):
        largest_gb = max(spec.weight_bytes for spec in self.specs) / GB
        settings = Settings(
            device="cuda:0",
            colocated_count=2,
            threads_per_instance=1,
            model_cache_budget_gb=2.5 * largest_gb,
            kv_budget_gb=KV_GB,
            device_memory_gb=KV_GB + DEVICE_MODELS * largest_gb,
        )
        for _ in range(2):
            engine = open_beside(settings, self.specs, regions)
            opened.callback(engine.close)
            self._engines.append(engine)

    def _script(self):
        ada, bob = (spec.id for spec in self.specs)
        self._submit("first", ada)
        self._submit("second", bob)
        self._load(0, ada)
        self._turn(0, ada, "first", steps=2)
        self._load(0, bob, evict=(ada,))
        self._turn(0, bob, "second", steps=2)
        self._submit("third", bob)  # for which the first one has to leave the device
        self._turn(0, bob, "third", steps=2)
        self._load(0, ada, evict=(bob,))
        self._turn(0, ada, "first", steps=2)
        self._load(1, ada)
        self._hand_over("first")
        self._turn(1, ada, "first", steps=2)

    def _submit(self, name, model):
        prompt = [(11 * at + len(name)) % 300 + 3 for at in range(PROMPT_TOKENS)]
        self._requests[name] = make_request(name, prompt, model=model)
        self.tokens[name] = []
        self._engines[0].submit(self._requests[name])

    def _load(self, at, model, evict=()):
        """As the copy lane does, on a thread of its own."""
        outcomes = []

        def load():
            try:
                outcomes.append(self._engines[at].load(Load(model, evict=evict)))
            except AegaeonError as error:
                outcomes.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        thread.join(PATIENCE_S)
        assert outcomes, "a load hangs"
        outcome = outcomes.pop()
        if isinstance(outcome, AegaeonError):
            raise outcome
        self._end_unless(isinstance(outcome, Loaded), outcome)

    def _turn(self, at, model, name, steps):
        self._execute(at, Switch(model))
        for step in range(steps):
            kind = Prefill if step == 0 and not self.tokens[name] else Decode
            outcome = self._execute(at, kind(model, (name,)))
            assert isinstance(outcome, Stepped) and not outcome.failed, outcome
            self.tokens[name] += [token.token_id for token in outcome.tokens]

    def _execute(self, at, action):
        outcome = self._engines[at].execute(action)
        if isinstance(outcome, WeightsLost):
            self._load(at, action.model)
            outcome = self._engines[at].execute(action)
        self._end_unless(not isinstance(outcome, WeightsLost | LoadFailed), outcome)
        return outcome

    def _hand_over(self, name):
        told = msgspec.structs.replace(
            self._requests[name], generated_token_ids=tuple(self.tokens[name])
        )
        # Of one process, two engines do not see each other's memory of a device.
        kv = self._engines[0].hand_over(name, by_host=True)
        if kv.blocks:
            self._engines[1].adopt(told, kv)
        else:
            self._engines[1].submit(told)
        self._engines[0].release(name)

    def _end_unless(self, is_well, outcome):
        if is_well:
            return
        self.error = outcome
        raise Ended
