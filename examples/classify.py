"""Use a pruned model with plain transformers: `python examples/classify.py MODEL LABEL LABEL ... < prompts.txt`.

Each input line is a prompt. The script prints the most likely label in front of it.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(path: str, *labels: str) -> None:
    """Label every line of the standard input. An installed optimum_sieve suffices; no import is needed."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for line in sys.stdin:
        prompt = line.rstrip("\n").replace("\\n", "\n")
        scores = {label: log_likelihood(model, tokenizer, prompt, f" {label}") for label in labels}
        print(f"{max(scores, key=scores.__getitem__)}\t{line.rstrip()}")


def log_likelihood(model: torch.nn.Module, tokenizer: object, prompt: str, continuation: str) -> float:
    """Return log p(continuation | prompt)."""
    context = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = tokenizer(prompt + continuation, return_tensors="pt").input_ids
    with torch.no_grad():
        log_probs = model(tokens).logits[0].log_softmax(dim=-1)
    positions = range(context.shape[1], tokens.shape[1])
    return sum(float(log_probs[position - 1, tokens[0, position]]) for position in positions)


if __name__ == "__main__":
    main(*sys.argv[1:])
