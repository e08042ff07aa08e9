"""Apply a pruned model to texts with plain transformers: `python examples/predict.py MODEL < texts.txt`.

Each input line is a text for the one field of the task's prompt. The script prints the answer in front of it.
"""

from __future__ import annotations

import sys

from transformers import pipeline


def main(path: str) -> None:
    """Answer every line of the standard input. An installed optimum_sieve suffices; no import is needed."""
    answer = pipeline("sieve", model=path)
    texts = [line.rstrip("\n") for line in sys.stdin]
    for text, found in zip(texts, answer(texts), strict=True):
        print(f"{found['prediction']}\t{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
