"""What `transformers` makes of (context, continuation) pairs: run with ours, for lm-eval's script.

Reads a JSON list of pairs, writes a JSON list of [log-likelihood, is greedy].
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def likelihood(model: torch.nn.Module, ids: list[int], first: int) -> tuple[float, bool]:
    """Return the log-likelihood of ids[first:] behind those before, and whether they are each the
    likeliest."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, first - 1 :].double()
    wanted = torch.tensor(ids[first:])
    log_probabilities = torch.log_softmax(logits, -1)
    picked = log_probabilities.gather(1, wanted[:, None]).sum()
    return float(picked), bool((logits.argmax(-1) == wanted).all())


def main() -> None:
    """Answer for the pairs on standard input with the checkpoint that is the first argument."""
    checkpoint = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    told = []
    with torch.inference_mode():
        for context, continuation in json.load(sys.stdin):
            # As lm-eval cuts them: spaces at the border belong to the continuation.
            kept = context.rstrip()
            first = len(tokenizer(kept)["input_ids"])
            ids = tokenizer(context + continuation)["input_ids"]
            told.append(likelihood(model, ids, first))
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
