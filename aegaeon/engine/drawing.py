"""What a sequence does to its logits, and what becomes of a pass's: tokens, log-probabilities."""

from collections.abc import Sequence as Seq

from torch import Tensor

from aegaeon._native import Adjustment
from aegaeon.device.base import Change, Device, RowLogProbs
from aegaeon.engine.batch import Part
from aegaeon.engine.constraints import SLOW_S, await_any
from aegaeon.engine.sequence import Sequence
from aegaeon.sampling import PromptScores, SamplingParams, TokenLogProbs
from aegaeon.types import Request

# What a step that has nothing else to do waits for.
BRIEFLY_S = 0.002

Drawn = tuple[int | None, TokenLogProbs | None]


def adjustment_of(request: Request) -> Adjustment | None:
    """Return what penalties and bias make of the request's logits, its tokens so far counted."""
    params = request.sampling
    if not params.adjusts_logits:
        return None
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    adjustment = Adjustment(penalties, params.logit_bias, request.prompt_token_ids)
    for token_id in request.generated_token_ids:
        adjustment.count(token_id)
    return adjustment


def draw_tokens(
    device: Device, sequences: Seq[Sequence], logits: Tensor, changes: Seq[Change | None]
) -> list[Drawn]:
    """Return the next token of each sequence, drawn of its row of `logits`, with its
    log-probabilities where the request asks; None where the logits are not finite."""
    draws = [(one.request.sampling, len(one.generated)) for one in sequences]
    tokens = device.sample(logits, draws, changes)
    asking = [
        row
        for row, (one, token) in enumerate(zip(sequences, tokens, strict=True))
        if one.request.sampling.logprobs is not None and token is not None
    ]
    found: list[TokenLogProbs | None] = [None] * len(tokens)
    if asking:
        chosen = [token for row in asking if (token := tokens[row]) is not None]
        counts = [sequences[row].request.sampling.logprobs or 0 for row in asking]
        theirs = logits if len(asking) == len(tokens) else device.select(logits, asking)
        rows = device.log_probabilities(theirs, chosen, max(counts))
        for row, values, count in zip(asking, rows, counts, strict=True):
            found[row] = _told(values, count)
    return list(zip(tokens, found, strict=True))


def score_prompt(device: Device, part: Part, logits: Tensor) -> PromptScores | None:
    """Return the log-probabilities of the prompt's tokens behind the part's scored rows, whose
    `logits` [rows, vocab] these are; None where they are not finite."""
    request, first = part.sequence.request, part.scored.start + 1
    chosen = request.prompt_token_ids[first : part.scored.stop + 1]
    count = request.sampling.prompt_logprobs or 0
    told = [_told(row, count) for row in device.log_probabilities(logits, chosen, count)]
    scores = tuple(row for row in told if row is not None)
    if len(scores) < len(told):
        return None
    return PromptScores(request.id, request.attempt, first, scores)


def split_logits(
    device: Device, parts: Seq[Part], logits: Tensor
) -> tuple[Tensor, list[tuple[Part, Tensor]]]:
    """Return the last rows of parts that end in one, and those of each part that scores a prompt;
    the rows of a pass are those of its parts, scored ones first."""
    if not any(part.scored for part in parts):
        return logits, []
    scored, drawn, row = [], [], 0
    for part in parts:
        if part.scored:
            scored.append((part, logits[row : row + len(part.scored)]))
            row += len(part.scored)
        if part.ends_in_row:
            drawn.append(row)
            row += 1
    return device.select(logits, drawn), scored


def leave_out_slow(sequences: Seq[Sequence]) -> list[Sequence]:
    """Return the sequences but for those that have nothing to compute until it is known which
    tokens they may have, which takes longer than a step is to wait."""
    slow = {id(one) for one in sequences if _is_slow(one) and one.tokens - one.cached <= 1}
    if slow and len(slow) == len(sequences):
        await_any([one.constraint for one in sequences if one.constraint is not None], BRIEFLY_S)
    return [one for one in sequences if id(one) not in slow]


def split_late(parts: Seq[Part]) -> list[bool]:
    """Return for each part whether its sequence must do without a token in this step: its prompt
    goes on, or its grammar is late. Waits only where all that have ended would have to."""
    ended = [part.sequence for part in parts if part.is_last]
    waiting = [one.constraint for one in ended if one.constraint is not None]
    if waiting and len(waiting) == len(ended) and not any(one.is_ready for one in waiting):
        await_any(waiting, SLOW_S)
    late = {id(one) for one in ended if one.constraint is not None and not one.constraint.is_ready}
    return [not part.is_last or id(part.sequence) in late for part in parts]


def finite_rows(device: Device, logits: Tensor, asked: Seq[bool]) -> list[int]:
    """Return the rows among those `asked` of whose logits are finite."""
    rows = [row for row, is_asked in enumerate(asked) if is_asked]
    if not rows:
        return []
    draws = [(SamplingParams(temperature=0.0), 0)] * len(rows)
    tokens = device.sample(device.select(logits, rows), draws)
    return [row for row, token in zip(rows, tokens, strict=True) if token is not None]


def _is_slow(sequence: Sequence) -> bool:
    return sequence.constraint is not None and sequence.constraint.is_slow


def change_of(sequence: Sequence) -> Change | None:
    """Return what is done to the sequence's logits before a draw.

    Raises AegaeonError where the sequence's grammar cannot go on: InvalidRequest, but for
    mistakes of ours.
    """
    allowed = None if sequence.constraint is None else sequence.constraint.allowed()
    if sequence.adjustment is None and allowed is None:
        return None
    return Change(sequence.adjustment, allowed)


def _told(row: RowLogProbs, count: int) -> TokenLogProbs | None:
    if row is None:
        return None
    value, best = row
    return TokenLogProbs(value, tuple(best[:count]))
