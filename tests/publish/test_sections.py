"""Sections of a report that its page draws, against counts made by hand."""

from __future__ import annotations

from typing import Any

import model_kinds
import numpy as np
import pytest
from tiny_models import ARCHITECTURES, make_tiny_model
from toy import make_model

from optimum_sieve.backbone.sizes import bytes_by_part, matrix_sizes, tensor_bytes
from optimum_sieve.backbone.targets import Target
from optimum_sieve.evaluation.scores import Evaluation
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.publish.sections import answers_section, rank_section, spectra_section


def evaluation(predictions: list[int], texts: tuple[str, ...] = (), values: list[float] | None = None) -> Evaluation:
    targets = np.zeros(len(predictions), dtype=np.int64)
    found = np.array(predictions)
    return Evaluation(
        metric="accuracy", score=0.5, standard_error=0.1, majority_score=0.5, predictions=found, targets=targets,
        values=np.array(values if values is not None else found == targets, dtype=np.float64),
        log_probs=np.zeros((len(predictions), 2)), fingerprint="same", texts=texts,
    )  # fmt: skip


def test_experts_of_a_layer_are_averaged_and_gaps_stay_empty() -> None:
    section = rank_section(
        [
            ("model.layers.0.mlp.experts.0.up_proj", 4, 0.25),
            ("model.layers.0.mlp.experts.1.up_proj", 8, 0.5),
            ("model.layers.0.mlp.experts.2.up_proj", None, 1.0),
            ("model.layers.1.self_attn.q_proj", 2, 0.125),
            ("model.layers.1.mlp.experts.0.up_proj", None, 1.0),
        ]
    )
    assert section["layers"] == ["model.layers.0", "model.layers.1"]
    assert section["kinds"] == ["mlp.experts.*.up_proj", "self_attn.q_proj"]
    assert section["kept"] == [[0.5833, 1.0], [None, 0.125]]
    # Of the experts that have a rank.
    assert section["rank"] == [[6, -1], [None, 2]]


def test_spectra_are_the_median_of_what_is_left(rng: np.random.Generator) -> None:
    names = [f"layers.{number}.up" for number in range(3)]
    energies = {name: np.sort(rng.random(30))[::-1] for name in names}
    section = spectra_section({**energies, "layers.0.down": np.zeros(4)})
    assert section is not None
    assert section["kinds"] == ["up"]
    assert len(section["directions"]) == 31
    for at, left in zip(section["directions"], section["left"][0], strict=True):
        kept = at * 30
        whole = int(kept)
        shares = [
            1 - (e[:whole].sum() + (e[whole] * (kept - whole) if whole < 30 else 0.0)) / e.sum()
            for e in energies.values()
        ]
        assert left == pytest.approx(float(np.median(shares)), rel=0.01, abs=2e-4)
    assert section["left"][0][0] == 1.0
    assert spectra_section({"layers.0.up": np.zeros(4)}) is None


def test_answers_are_counted() -> None:
    before, pruned = evaluation([0, 0, 0, 1, 1]), evaluation([0, 1, 1, 0, 1])
    assert answers_section(before, pruned) == {"both_right": 1, "only_before": 2, "only_pruned": 1, "both_wrong": 1}
    assert answers_section(before, None) is None
    texts = ("a",) * 3
    written = evaluation([0] * 3, texts, [0.1, 0.5, 0.9]), evaluation([0] * 3, texts, [0.1, 0.4, 1.0])
    assert answers_section(*written) == {"equal": 1, "better": 1, "worse": 1}


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_of_the_parts_are_those_of_the_model(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    parts = bytes_by_part(model)
    rows = 4 * model.config.vocab_size * model.config.hidden_size
    assert parts["embeddings"] == rows
    assert parts["head"] == (0 if tied else rows)
    assert parts["blocks"] == 4 * sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert sum(parts.values()) == tensor_bytes(model)


@pytest.mark.parametrize("kind", [*sorted(ARCHITECTURES), "t5", "modernbert"])
def test_every_architecture_has_its_parts(kind: str) -> None:
    model: Any = make_tiny_model(kind) if kind in ARCHITECTURES else model_kinds.make_model(kind)
    parts = bytes_by_part(model)
    assert sum(parts.values()) == tensor_bytes(model)
    assert parts["embeddings"] > 0
    assert parts["blocks"] > parts["other"]


def test_matrices_have_the_fraction_that_is_left() -> None:
    model = make_model()
    name = "model.layers.0.mlp.up_proj"
    targets = [Target(name, 48, 32, False), Target("model.layers.1.mlp.up_proj", 48, 32, False)]
    model.set_submodule(name, FactorizedLinear(32, 48, 4, storage="factors", bias=False))
    assert matrix_sizes(model, targets) == [
        (name, 4, pytest.approx(4 * (48 + 32) / (48 * 32))),
        ("model.layers.1.mlp.up_proj", None, 1.0),
    ]
