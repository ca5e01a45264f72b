"""Who hears what actions really took, to refine what the policies think they take."""

from collections.abc import Sequence
from typing import Protocol

from aegaeon.scheduler.groups import Group
from aegaeon.types import Decode, ModelId, Prefill, Stepped


class Observer(Protocol):
    """Told of actions that ended as they were meant to; times that are 0 say nothing."""

    def prefilled(
        self, model: ModelId, lengths: Sequence[int], cached: Sequence[int], took_s: float
    ) -> None:
        """Prompts of `lengths` tokens, or so much of them, were prefilled together, each behind its
        first `cached` ones."""

    def decoded(self, model: ModelId, contexts: Sequence[int], took_s: float) -> None:
        """Sequences of `contexts` tokens got one more each."""

    def loaded(self, model: ModelId, took_s: float) -> None:
        """The weights came."""


def tell(observer: Observer, group: Group, action: Prefill | Decode, outcome: Stepped) -> None:
    """Tell of a step of `group`, whose requests are not up to date yet, unless some fared ill, did
    less (for want of a grammar's word), more (a prompt's likelihood), were computed one after the
    other, or are gone."""
    done = len(outcome.tokens) + len(outcome.begun)
    is_plain = done == len(action.requests) and not outcome.is_apart
    if not is_plain or outcome.preempted or outcome.scores:
        return
    here = group.waiting if isinstance(action, Prefill) else group.running
    if any(request not in here for request in action.requests):
        return
    if isinstance(action, Decode):
        contexts = [here[request].tokens for request in action.requests]
        observer.decoded(group.model, contexts, outcome.took_s)
        return
    spans = [(one.tokens, one.cached_tokens) for one in outcome.begun]
    for token in outcome.tokens:
        entry = here[token.request_id]
        known = entry.known if entry.id in group.begun else token.cached_tokens
        spans.append((entry.tokens, known))
    lengths, cached = zip(*spans, strict=True)
    observer.prefilled(group.model, lengths, cached, outcome.took_s)
