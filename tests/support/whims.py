"""Two engines of one node, driven by whims through all that can befall weights and KV."""

import threading
from collections import Counter

import msgspec

from aegaeon.errors import KvGone, KvUnreachable, OutOfBlocks
from aegaeon.types import Decode, Load, Loaded, Prefill, Stepped, Switch, WeightsLost

# Models that a device is asked to hold at once.
MOST_RESIDENT = 2
LONGEST_TURN = 4


class Whims:
    """`tokens` are those of each request so far; `did` counts which paths were taken."""

    def __init__(self, engines, models, choose):
        self.engines = engines
        self.models = models
        self.choose = choose
        self.tokens = {}
        self.did = Counter()
        self._requests = {}
        self._home = {}  # of those that have not ended
        self._resident = [[] for _ in engines]
        self._loading = [None for _ in engines]

    def submit(self, *requests):
        for request in requests:
            self._requests[request.id] = request
            self.tokens[request.id] = list(request.generated_token_ids)
            self._enter(self.choose.randrange(len(self.engines)), request)

    def finish(self, doomed=()):
        """Run until all have ended; those of `doomed` are cancelled on the way."""
        doomed = list(doomed)
        for _ in range(2000):
            if not self._home:
                break
            chosen = self.choose.choice(list(self._home))
            self._turn(self._home[chosen], self._requests[chosen].model)
            if self.choose.random() < 0.4:
                self._move()
            if doomed and self.choose.random() < 0.2:
                self._cancel(doomed.pop())
        for at in range(len(self.engines)):
            self._join(at)
        assert not self._home, f"never ended: {self._home}"

    # Turns

    def _turn(self, at, model):
        engine = self.engines[at]
        self._join(at)
        if model not in self._resident[at]:
            self._begin_load(at, model)
            self._join(at)
        if isinstance(engine.execute(Switch(model)), WeightsLost):
            self._lose(at, model)
            return
        if self.choose.random() < 0.5:
            self._prefetch(at, model)
        for _ in range(self.choose.randint(1, LONGEST_TURN)):
            mine = [r for r in self._home if self._is_at(r, at, model)]
            if not mine or not self._step(at, model, mine):
                return

    def _step(self, at, model, mine):
        picked = tuple(self.choose.sample(mine, self.choose.randint(1, len(mine))))
        action = self.choose.choice((Prefill, Decode))(model, picked)
        if isinstance(action, Prefill) and self.choose.random() < 0.5:
            action = Prefill(model, picked, self.choose.choice((1, 5, 16, 40)))
        outcome = self.engines[at].execute(action)
        if isinstance(outcome, WeightsLost):
            self._lose(at, model)
            return False
        assert isinstance(outcome, Stepped) and not outcome.failed, outcome
        self.did["preempted"] += len(outcome.preempted)
        self.did["begun"] += len(outcome.begun)
        self.did["deferred"] += len(picked) - len(outcome.tokens) - len(outcome.preempted)
        for token in outcome.tokens:
            self.tokens[token.request_id].append(token.token_id)
            if token.finish_reason is not None:
                del self._home[token.request_id]
        return True

    def _is_at(self, request, at, model):
        return self._home[request] == at and self._requests[request].model == model

    # Weights

    def _lose(self, at, model):
        self.did["weights lost"] += 1
        if model in self._resident[at]:
            self._resident[at].remove(model)

    def _prefetch(self, at, computing):
        """Load another model beside compute: one that is wanted next, or not at all."""
        absent = [m for m in self.models if m not in self._resident[at]]
        if absent:
            model = self.choose.choice(absent)
            is_right = any(self._is_at(r, at, model) for r in self._home)
            self.did["prefetch right" if is_right else "prefetch wrong"] += 1
            self._begin_load(at, model, computing)

    def _begin_load(self, at, model, computing=None):
        resident = self._resident[at]
        spare = [m for m in resident if m != computing]
        victims = spare[: max(0, len(resident) + 1 - MOST_RESIDENT)]
        self._resident[at] = [m for m in resident if m not in victims]
        action, outcomes = Load(model, evict=tuple(victims)), []
        thread = threading.Thread(target=lambda: outcomes.append(self.engines[at].load(action)))
        thread.start()
        self._loading[at] = (thread, outcomes)

    def _join(self, at):
        if self._loading[at] is None:
            return
        thread, outcomes = self._loading[at]
        thread.join(60)
        self._loading[at] = None
        assert outcomes and isinstance(outcomes[0], Loaded), outcomes
        self.did["evicted by others"] += len(outcomes[0].evicted)
        gone = {*outcomes[0].evicted, outcomes[0].model}
        kept = [m for m in self._resident[at] if m not in gone]
        self._resident[at] = [*kept, outcomes[0].model]

    # Requests

    def _enter(self, at, request):
        self.engines[at].submit(request)
        self._home[request.id] = at

    def _move(self):
        """One goes to the other engine, with its KV or, as after a crash, without."""
        if not self._home:
            return
        name = self.choose.choice(list(self._home))
        at = self._home[name]
        to = 1 - at
        told = msgspec.structs.replace(
            self._requests[name], generated_token_ids=tuple(self.tokens[name])
        )
        if self.choose.random() < 0.3:
            self.engines[at].release(name)
            self._enter(to, told)
            self.did["resumed"] += 1
            return
        try:
            try:
                self.engines[to].adopt(told, self.engines[at].hand_over(name))
            except KvUnreachable:
                self.engines[to].adopt(told, self.engines[at].hand_over(name, by_host=True))
                self.did["handed over by the host"] += 1
            self._home[name] = to
            self.did["handed over"] += 1
        except (KvGone, OutOfBlocks):
            self._enter(to, told)
            self.did["handed over without KV"] += 1
        self.engines[at].release(name)

    def _cancel(self, name):
        if name in self._home:
            self.engines[self._home.pop(name)].release(name)
            self.did["cancelled"] += 1
