"""Cuts the work of one action into forward passes of bounded rows, and builds each pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from aegaeon.device.base import StepBatch
from aegaeon.engine.sequence import Sequence
from aegaeon.memory.kv import KvPool, KvRows
from aegaeon.memory.workspace import MAX_PASS_ROWS

# Of a pass that scores a prompt: each of its rows has logits, as large as a vocabulary.
MAX_SCORED_ROWS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """Positions start .. stop - 1 of a sequence; `is_last` when its next token comes of them,
    `is_end` when they are the last that the step runs of it.

    Those of `scored` say how likely the prompt's next token was.
    """

    sequence: Sequence
    start: int
    stop: int
    is_last: bool
    scored: range = range(0)
    is_end: bool = False

    @property
    def ends_in_row(self) -> bool:
        """Whether its last row has logits that are not scored: of them comes the next token, or
        whether all that was run is finite."""
        return self.is_last or (self.is_end and not self.scored)


def plan_passes(
    sequences: Iterable[Sequence],
    max_rows: int = MAX_PASS_ROWS,
    shares: Callable[[Iterable[int]], list[int]] = list,
) -> list[list[Part]]:
    """Return passes of at most `max_rows` rows that together feed every token not yet cached, or
    so many of each sequence as `shares` makes of what they lack.

    Sequences whose prompts are to be scored are in passes of their own, of MAX_SCORED_ROWS rows.
    """
    plain: list[tuple[Sequence, int]] = []
    scoring: list[tuple[Sequence, int]] = []
    wanted = list(sequences)
    counts = shares(sequence.tokens - sequence.cached for sequence in wanted)
    for sequence, count in zip(wanted, counts, strict=True):
        (plain if sequence.is_scored else scoring).append((sequence, sequence.cached + count))
    return _cut(plain, max_rows) + _cut(scoring, min(max_rows, MAX_SCORED_ROWS))


def _cut(sequences: Iterable[tuple[Sequence, int]], max_rows: int) -> list[list[Part]]:
    passes: list[list[Part]] = []
    parts: list[Part] = []
    room = max_rows
    for sequence, end in sequences:
        start = sequence.cached
        while start < end:
            stop = min(start + room, end)
            scored = _scored_rows(sequence, start, stop)
            parts.append(Part(sequence, start, stop, stop == sequence.tokens, scored, stop == end))
            room -= stop - start
            start = stop
            if room == 0:
                passes.append(parts)
                parts, room = [], max_rows
    if parts:
        passes.append(parts)
    return passes


def _scored_rows(sequence: Sequence, start: int, stop: int) -> range:
    """Return which of the positions say how likely a token was that has not been told of."""
    if sequence.is_scored:
        return range(0)
    last = len(sequence.request.prompt_token_ids) - 1
    return range(max(start, sequence.scored - 1), min(stop, last))


def build_batch(parts: list[Part], pool: KvPool) -> StepBatch:
    """Return the pass over `parts`, all of one model and with blocks for what they write."""
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    rows: list[KvRows] = []
    for part in parts:
        count = part.stop - part.start
        rows.append(KvRows(len(token_ids), count, part.start, tuple(part.sequence.blocks)))
        logit_rows.extend(len(token_ids) + at - part.start for at in part.scored)
        token_ids.extend(part.sequence.slice(part.start, part.stop))
        positions.extend(range(part.start, part.stop))
        if part.ends_in_row:
            logit_rows.append(len(token_ids) - 1)
    return StepBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        kv=pool.view(parts[0].sequence.shape, rows),
    )
