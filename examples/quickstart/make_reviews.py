"""Write rows to try the quickstart with: `python examples/quickstart/make_reviews.py > reviews.jsonl`.

The sentences are put together from parts, with negations and contrasts, so that no single word decides the label. They
are no substitute for real data: a figure measured on them says nothing about other reviews.
"""

from __future__ import annotations

import itertools
import json
import random


THINGS = ("camera", "kettle", "headset", "suitcase", "keyboard", "lamp", "charger", "backpack", "blender", "notebook")
GOOD = ("light", "reliable", "sturdy", "quiet", "easy to clean", "well made", "fast", "worth every penny")
BAD = ("flimsy", "noisy", "slow", "hard to open", "overpriced", "badly glued", "far too heavy", "dead after a week")
PRAISE = ("I would buy it again", "my sister ordered one too", "it has not let me down", "I use it every morning")
BLAME = ("I sent it back", "I want my money back", "it is in the bin by now", "I cannot recommend it")
PATTERNS = (
    "The {thing} is {same}, {end}.",
    "I expected it to be {other}, but this {thing} is {same}: {end}.",
    "This {thing} is anything but {other}, {end}.",
    "A bit {other} at first, yet after a month the {thing} turned out {same}, {end}.",
    "Others call the {thing} {other}; mine is {same}, {end}.",
)


def rows() -> list[dict[str, str]]:
    """Return all sentences with their labels, shuffled."""
    made = []
    for label, same, other, ends in (("positive", GOOD, BAD, PRAISE), ("negative", BAD, GOOD, BLAME)):
        for pattern, thing, own, foreign, end in itertools.product(PATTERNS, THINGS, same, other, ends):
            text = pattern.format(thing=thing, same=own, other=foreign, end=end)
            made.append({"text": text, "label": label})
    unique = list({row["text"]: row for row in made}.values())
    random.Random(0).shuffle(unique)
    return unique


if __name__ == "__main__":
    for row in rows()[:4000]:
        print(json.dumps(row))
