"""Group encoded examples into batches of bounded size. Does not import torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.encoding import EncodedExample


# Predictions of a row that take little memory: with fewer, passes would be too small to run at full speed.
_FEW_PREDICTIONS = 32
# Padding that takes no longer than another pass, in tokens; of a large pass, as a share.
_LITTLE_PADDING, _PADDING_SHARE = 48, 0.125


def grouped(examples: Sequence[EncodedExample], batch_size: int) -> list[list[EncodedExample]]:
    """Group examples of similar length, longest first.

    A group of several examples has at most the tokens, padding included, and the predictions of `batch_size` rows, each
    as long as the group's longest text and with as many predictions as its longest candidate, or 32. Lengths in a
    group differ little, so that little of it is padding: the 16 examples of a training step are few, and random.
    """
    groups: list[list[EncodedExample]] = []
    size = _Size()
    for example in sorted(examples, key=lambda example: -example.length):
        joined = size.joined(_size(example))
        if not groups or example.alone or groups[-1][-1].alone or not joined.fits(batch_size):
            groups.append([])
            joined = _size(example)
        groups[-1].append(example)
        size = joined
    return groups


class _Size(NamedTuple):
    """Rows of a group, their length and tokens, length of its longest text, predictions, and those of a candidate."""

    rows: int = 0
    length: int = 0
    tokens: int = 0
    text_length: int = 0
    sites: int = 0
    reads: int = 0

    def joined(self, other: _Size) -> _Size:
        return _Size(
            rows=self.rows + other.rows,
            length=max(self.length, other.length),
            tokens=self.tokens + other.tokens,
            text_length=max(self.text_length, other.text_length),
            sites=self.sites + other.sites,
            reads=max(self.reads, other.reads),
        )

    def fits(self, batch_size: int) -> bool:
        padded, most = self.rows * self.length, batch_size * self.text_length
        return (
            padded <= most
            and padded - self.tokens <= max(_LITTLE_PADDING, _PADDING_SHARE * padded)
            and self.sites <= batch_size * max(self.reads, _FEW_PREDICTIONS)
        )


def _size(example: EncodedExample) -> _Size:
    sites = {(row, position) for row, position, _, _ in example.reads}
    reads = Counter(candidate for _, _, _, candidate in example.reads)
    # The padding inside an example cannot be avoided.
    rows, length = len(example.rows), example.length
    return _Size(rows, length, rows * length, example.text_length, len(sites), max(reads.values()))
