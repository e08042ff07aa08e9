"""A shared prefix computed once gives the scores of whole prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY_SIZE, make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve.evaluation.batches import Batch, make_batches
from optimum_sieve.evaluation.likelihoods import candidate_scores
from optimum_sieve.evaluation.prefix import LEAST_TOKENS, shared_prefix
from optimum_sieve.evaluation.trees.probe import takes_cache
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.tasks import Example


INSTRUCTIONS = "Number: 1 Parity: odd " * 6


def make_rows(seed: int, rows: int, length: int, shared: int) -> Batch:
    """Make random rows that share their first tokens; one candidate of two is scored at the end of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY_SIZE, (rows, length), generator=generator)
    ids[:, :shared] = torch.arange(shared) % 60 + 3
    mask = torch.ones_like(ids)
    # The last row is shorter, padded on the right.
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    lengths = mask.sum(dim=1)
    sites = torch.stack([torch.arange(rows), lengths - 1], dim=1)
    reads = torch.tensor([[row, token, 2 * row + place] for row in range(rows) for place, token in enumerate((4, 9))])
    return Batch(ids, mask, sites, reads, torch.ones(rows, 2, dtype=torch.bool), tuple(range(rows)))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
def test_scores_are_those_of_whole_rows(architecture):
    model = make_tiny_model(architecture)
    batch = make_rows(seed=0, rows=4, length=26, shared=18)
    examples = [Example(prompt="", answer="a", candidates=("a", "b"), target=0)] * 4
    assert shared_prefix([batch]) == 18
    plain = candidate_scores(model, [batch], examples, lambda count: None)
    once = candidate_scores(model, [batch], examples, lambda count: None, prefix=18)
    np.testing.assert_allclose(once, plain, rtol=1e-4, atol=1e-4)


def test_prefix_ends_before_what_is_needed_and_pays():
    assert shared_prefix([make_rows(0, 3, 26, 20), make_rows(1, 3, 24, 20)]) == 20
    assert shared_prefix([make_rows(0, 3, 26, LEAST_TOKENS - 1)]) == 0
    # Rows that are the same throughout: the last position is still computed.
    batch = make_rows(0, 3, 26, 26)
    assert shared_prefix([batch]) == int(batch.sites[:, 1].min())


def test_a_scorer_computes_a_shared_prefix_once(tmp_path):
    task = load_task(tmp_path, parity_rows(160), prompt=INSTRUCTIONS + "Number: {{ text }} Parity:")
    examples = task.examples("selection", make_tokenizer())[:20]
    whole = make_batches(examples, make_tokenizer(), batch_size=5)
    lengths = []
    model = make_model()
    # Whether the model takes a cache is tried before.
    assert takes_cache(model, longest=max(batch.input_ids.shape[1] for batch in whole))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with LiveRanks(model, {}) as live:
        scorer = CandidateScorer(live, examples, [10, 20], make_tokenizer(), metric="accuracy", batch_size=5)
        *_, outcome = scorer.slices({})
    assert outcome.kl == pytest.approx(0, abs=1e-9)
    shared = shared_prefix(whole)
    assert shared >= LEAST_TOKENS
    # Two slices, scored for the dense model and for the candidate: a row of the prefix, then two batches without it.
    assert [tuple(shape) for shape in lengths[:1]] == [(1, shared)]
    assert len(lengths) == 12
    assert sum(rows * width for rows, width in lengths) < 0.5 * sum(2 * batch.input_ids.numel() for batch in whole)
