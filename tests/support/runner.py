"""Drives an engine as a scheduler with whims would, and keeps what every request got."""

import random

from aegaeon.types import Decode, Prefill, Request, Stepped, Switch, WeightsLost
from tests.support.decoder import load_in_thread


class Runner:
    """Turns of random models and batches; `tokens`, `log_probs`, `scores`, `reasons` and
    `failures` are by request."""

    def __init__(self, engine):
        self.engine = engine
        self.models = {}
        self.tokens = {}
        self.open = []
        self.running = []
        self.log_probs = {}
        self.scores = {}
        self.reasons = {}
        self.failures = {}
        self.preempted = 0
        self.begun = 0
        self.pieces = lambda: None  # says how large each prefill may be
        self.reloads = 0
        self.current = None

    def submit(self, *requests: Request):
        for request in requests:
            self.engine.submit(request)
            self._follow(request.id, request.model, [])

    def go_on(self, request: str, model: str, tokens: list[int]):
        """Follow one that the engine has already, with these tokens made."""
        self._follow(request, model, tokens)
        self.running.append(request)

    def _follow(self, request: str, model: str, tokens: list[int]):
        self.models[request] = model
        self.tokens[request] = tokens
        self.log_probs[request] = []
        self.scores[request] = []
        self.open.append(request)

    def act(self, action):
        outcome = self.engine.execute(action)
        if isinstance(outcome, WeightsLost):
            # Another engine's model took their room: as a scheduler does, load it and try again.
            self.reloads += 1
            load_in_thread(self.engine, outcome.model)
            return self.act(action)
        assert isinstance(outcome, Stepped), outcome
        for told in outcome.scores:
            assert told.position == len(self.scores[told.request_id]) + 1
            self.scores[told.request_id] += told.log_probs
        for token in outcome.tokens:
            self.tokens[token.request_id].append(token.token_id)
            self.log_probs[token.request_id].append(token.log_probs)
            if token.request_id not in self.running:
                self.running.append(token.request_id)
            if token.finish_reason:
                self.reasons[token.request_id] = token.finish_reason
                self._close(token.request_id)
        for request, code, _ in outcome.failed:
            self.failures[request] = code
            self._close(request)
        self.begun += len(outcome.begun)
        for request in outcome.preempted:
            self.preempted += 1
            if request in self.running:
                self.running.remove(request)
        return outcome

    def finish(self, choose=None, between=lambda model: None):
        """Prefill what waits and decode what runs, model by model, until all have ended;
        `between` is called with the model of each step before it."""
        choose = choose or random.Random(0)
        for _ in range(5000):
            if not self.open:
                return self.tokens
            model = self.models[choose.choice(self.open)]
            between(model)
            if model != self.current:
                self.engine.execute(Switch(model))
                self.current = model
            mine = [r for r in self.open if self.models[r] == model]
            waiting = [r for r in mine if r not in self.running]
            running = [r for r in mine if r in self.running]
            if waiting and (not running or choose.random() < 0.3):
                picked = choose.sample(waiting, choose.randint(1, len(waiting)))
                self.act(Prefill(model, tuple(picked), self.pieces()))
            else:
                picked = choose.sample(running, choose.randint(1, len(running)))
                self.act(Decode(model, tuple(picked)))
        raise AssertionError(f"never ended: {self.open}")

    def _close(self, request):
        self.open.remove(request)
        if request in self.running:
            self.running.remove(request)
