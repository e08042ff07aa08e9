"""Trees of tokens, the division of examples and the sizes of batches, against what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optimum_sieve.evaluation.encoding import EncodedExample
from optimum_sieve.evaluation.trees.groups import grouped
from optimum_sieve.evaluation.trees.tree import as_tree, divided, merge_prefixes, prompt_length, tree_tokens


def random_example(seed: int, *, prompt: int = 5, candidates: int = 9, index: int = 0) -> EncodedExample:
    """Encode random candidates of one to four tokens of three kinds, so that many begin alike."""
    rng = np.random.default_rng(seed)
    texts = {tuple(rng.integers(0, 3, rng.integers(1, 5)).tolist()) for _ in range(candidates)}
    start = rng.integers(3, 9, prompt).tolist()
    wholes = [start + list(text) for text in sorted(texts)]
    rows, owners = merge_prefixes([whole[:-1] for whole in wholes])
    reads = [
        (owner, position - 1, whole[position], candidate)
        for candidate, (owner, whole) in enumerate(zip(owners, wholes, strict=True))
        for position in range(prompt, len(whole))
    ]
    return EncodedExample(index, rows, reads, len(wholes), shadowed=False)


def text_at(example: EncodedExample, place: int) -> list[int]:
    """Return the tokens that the token at a place of a tree sees."""
    (tokens,) = example.rows
    ends = example.ends or [len(tokens)] * len(tokens)
    return [token for other, token in enumerate(tokens) if other <= place < ends[other]]


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_holds_every_beginning_once_and_reads_the_same(seed: int) -> None:
    example = random_example(seed)
    tree = as_tree(example)
    beginnings = {tuple(row[: end + 1]) for row in example.rows for end in range(len(row))}
    seen = [tuple(text_at(tree, place)) for place in range(len(tree.rows[0]))]
    assert len(seen) == len(set(seen)) == len(beginnings) == tree_tokens(example.rows)
    assert set(seen) == beginnings
    assert (tree.depths or list(range(len(seen)))) == [len(text) - 1 for text in seen]
    assert tree.text_length == example.length == max(map(len, seen))

    def read(encoded: EncodedExample, row: int, position: int) -> list[int]:
        return text_at(encoded, position) if encoded is tree else encoded.rows[row][: position + 1]

    for (row, position, token, candidate), before in zip(tree.reads, example.reads, strict=True):
        assert (token, candidate) == before[2:]
        assert read(tree, row, position) == read(example, *before[:2])


def test_an_example_of_one_row_stays_as_it_is() -> None:
    example = random_example(0, candidates=1)
    assert as_tree(example) is example
    assert divided(example, 1, trees=True) == divided(example, 1, trees=False) == [example]
    assert prompt_length(example) == 5


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_parts_hold_every_candidate_once_and_no_more_than_they_may(seed: int, batch_size: int, trees: bool) -> None:
    example = random_example(seed, candidates=30)
    parts = divided(example, batch_size, trees=trees)
    candidates = [{read[3] for read in part.reads} for part in parts]
    assert sorted(candidate for some in candidates for candidate in some) == list(range(example.num_candidates))
    assert {part.index for part in parts} == {example.index}
    texts = [(part.rows[row][: position + 1], *rest) for part in parts for row, position, *rest in part.reads]
    assert sorted(texts) == sorted((example.rows[row][: position + 1], *rest) for row, position, *rest in example.reads)
    for part in parts:
        tokens = len(as_tree(part).rows[0]) if trees else len(part.rows)
        assert tokens <= (batch_size * example.length if trees else batch_size)
    assert divided(example, 1000, trees=trees) == [example]


def test_a_large_tree_has_no_more_attention_scores_than_rows() -> None:
    example = random_example(0, prompt=600, candidates=60)
    more = [[*example.rows[0][:600], 10 + i, *range(20)] for i in range(100)]
    example = replace(example, rows=sorted(more, reverse=True), reads=[(i, 620, 3, i) for i in range(100)])
    parts = [as_tree(part) for part in divided(example, 16, trees=True)]
    lengths = [part.length for part in parts]
    assert len(parts) > 1
    assert max(lengths) ** 2 <= 16 * example.length**2
    # Half of what the tokens alone would allow.
    assert max(lengths) > 0.9 * 4 * example.length


def test_trees_with_a_long_prompt_are_divided_less_often_than_rows() -> None:
    example = random_example(0, prompt=40, candidates=60)
    assert len(divided(example, 2, trees=True)) < len(divided(example, 2, trees=False)) / 4


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_groups_are_within_the_tokens_and_predictions_of_rows(batch_size: int) -> None:
    examples = [as_tree(random_example(seed, prompt=2 + seed % 7, index=seed)) for seed in range(40)]
    groups = grouped(examples, batch_size)
    assert sorted(example.index for group in groups for example in group) == list(range(40))
    for group in groups:
        sites = sum(len({read[:2] for read in example.reads}) for example in group)
        longest = max(example.text_length for example in group)
        if len(group) > 1:
            assert len(group) * max(example.length for example in group) <= batch_size * longest
            assert sites <= batch_size * 32
    assert any(len(group) > 1 for group in groups) == (batch_size > 1)


def test_groups_of_long_prompts_are_within_the_predictions_of_rows() -> None:
    examples = [as_tree(random_example(seed, prompt=400, candidates=400, index=seed)) for seed in range(12)]
    groups = grouped(examples, 8)
    sites = [sum(len({read[:2] for read in example.reads}) for example in group) for group in groups]
    assert 8 * 32 / 2 < max(sites) <= 8 * 32
    # The tokens of one more would fit.
    assert all((len(group) + 1) * max(example.length for example in group) < 8 * 400 for group in groups)


def test_groups_of_one_row_each_are_filled_to_the_batch_size() -> None:
    examples = [EncodedExample(i, [[1] * (1 + i % 5)], [(0, i % 5, 3, 0)], 1, shadowed=False) for i in range(23)]
    groups = grouped(examples, 4)
    assert [len(group) for group in groups] == [4, 4, 4, 4, 4, 3]
    lengths = [example.length for group in groups for example in group]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([100, 50, 48, 45], [1, 3]),
        ([60, 58, 55, 50], [4]),
        # 48 tokens of padding take less than another pass does.
        ([30, 20, 12, 10], [4]),
        ([30, 20, 12, 9], [3, 1]),
        # Of a large pass, an eighth may be padding.
        ([800, 760, 750, 700], [4]),
        ([800, 400, 390], [1, 2]),
    ],
)
def test_lengths_in_a_group_differ_little(lengths: list[int], sizes: list[int]) -> None:
    examples = [
        EncodedExample(i, [[1] * length], [(0, length - 1, 3, 0)], 1, shadowed=False)
        for i, length in enumerate(lengths)
    ]
    assert [len(group) for group in grouped(examples, 16)] == sizes


def test_candidates_of_different_lengths_are_no_padding_between_examples() -> None:
    rows = [[1] * 90, [1] * 20]
    reads = [(row, len(tokens) - 1, 3, row) for row, tokens in enumerate(rows)]
    examples = [EncodedExample(i, rows, reads, 2, shadowed=False) for i in range(4)]
    assert [len(group) for group in grouped(examples, 8)] == [4]
