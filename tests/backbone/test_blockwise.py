"""A model that is run one block at a time gives what it gives as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import ARCHITECTURES, make_input_ids, make_tiny_model
from torch import nn
from toy import load_task, make_model, make_tokenizer

from optimum_sieve.backbone.blockwise import BlockRun, check_blocks, find_blocks
from optimum_sieve.backbone.hooks import Watch
from optimum_sieve.backbone.modes import frozen
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.collect import visit_tokens
from optimum_sieve.calibration.losses import calibration_loss
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.run.spool import Spool


if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return load_task(tmp_path_factory.mktemp("task")).examples("calibration", make_tokenizer())[:12]


def names_in(model: nn.Module, block: str) -> list[str]:
    return [target.name for target in find_targets(model) if target.name.startswith(f"{block}.")]


def whole(model: nn.Module, batches: Any, loss: Any) -> dict[str, list[torch.Tensor]]:
    """Return inputs and gradients of every linear, in one backward pass through the whole model."""
    found: dict[str, list[torch.Tensor]] = {target.name: [] for target in find_targets(model)}
    visit_tokens(model, list(found), batches, loss, lambda name, x, g: found[name].extend((x, g)))
    return found


def by_block(model: nn.Module, batches: Any, loss: Any, spool: Spool) -> dict[str, list[torch.Tensor]]:
    blocks = find_blocks(model)
    run = BlockRun(model, blocks, batches, loss, device=CPU, spool=spool)
    found: dict[str, list[torch.Tensor]] = {target.name: [] for target in find_targets(model)}
    with frozen(model):
        for place in range(len(blocks)):
            run.forward(place)
        run.start_backward()
        for place in reversed(range(len(blocks))):
            names = names_in(model, blocks[place])
            run.backward(place, Watch(model, names, lambda name, x, g: found[name].extend((x, g)), gradients=True))
    return found


def text_batches(examples: list[Any], model: nn.Module) -> Any:
    loss, by_candidate = calibration_loss("fisher", examples)
    return make_batches(examples, make_tokenizer(), batch_size=5, candidates=by_candidate), loss


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_tokens_and_gradients_are_those_of_the_whole_model(
    architecture: str, on_disk: bool, examples: list[Any], tmp_path: Path
) -> None:
    model = make_tiny_model(architecture, num_hidden_layers=3, vocab_size=len(make_tokenizer()))
    batches, loss = text_batches(examples, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = by_block(model, batches, loss, Spool(tmp_path if on_disk else None))
    expected = whole(model, batches, loss)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert len(tensors) == len(found[name]) == 2 * len(batches)
        for own, other in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    # Nothing is left behind.
    assert not list(tmp_path.iterdir())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_scores_are_those_of_the_whole_model(examples: list[Any]) -> None:
    model = make_model(num_hidden_layers=3).eval()
    batches = make_batches(examples, make_tokenizer(), batch_size=5)
    blocks = find_blocks(model)
    run = BlockRun(model, blocks, batches, log_likelihoods, device=CPU, spool=Spool())
    for place in range(len(blocks)):
        run.forward(place)
    with torch.no_grad():
        expected = [log_likelihoods(model, batch) for batch in batches]
    for own, other in zip(run.outputs(), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_inputs_are_shown_without_gradients(examples: list[Any]) -> None:
    model = make_model().eval()
    batches, loss = text_batches(examples, model)
    blocks = find_blocks(model)
    run = BlockRun(model, blocks, batches, loss, device=CPU, spool=Spool())
    found: list[tuple[str, torch.Tensor, None]] = []
    for place, block in enumerate(blocks):
        names = names_in(model, block)
        run.forward(place, Watch(model, names, lambda *call: found.append(call), gradients=False))
    expected = whole(model, batches, loss)
    for name, x, g in found:
        assert g is None
        assert any(torch.allclose(x, other, atol=1e-6) for other in expected[name][::2] if other.shape == x.shape)


class Deep(nn.Module):
    """A residual between the blocks, which no block sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.between = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x if self.between == 1.0 else self.between * x
        return x


def test_work_between_the_blocks_is_refused() -> None:
    model = Deep()
    x = torch.ones(2, 4)
    check_blocks(model, find_blocks(model), lambda: model(x))
    model.between = 2.0
    with pytest.raises(
        ValueError, match=r"which each block receives only the output of the block before it.*`layers\.1`"
    ):
        check_blocks(model, find_blocks(model), lambda: model(x))


def test_a_block_that_is_left_out_is_refused() -> None:
    model = Deep()
    with pytest.raises(ValueError, match=r"did not run `layers\.0`"):
        check_blocks(model, find_blocks(model), lambda: None)


def test_blocks_of_real_models_pass_the_check() -> None:
    for name in ARCHITECTURES:
        model = make_tiny_model(name)
        check_blocks(model, find_blocks(model), lambda model=model: model(make_input_ids()))


def test_an_encoder_decoder_has_no_one_sequence_of_blocks() -> None:
    model = nn.ModuleDict({"encoder": Deep(), "decoder": Deep()})
    with pytest.raises(ValueError, match=r"`memory_limit` must be for a model with one sequence of blocks, got .* 2"):
        find_blocks(model)


def test_a_loss_that_is_not_finite_is_refused(examples: list[Any]) -> None:
    model = make_model().eval()
    batches, _ = text_batches(examples, model)
    blocks = find_blocks(model)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return log_likelihoods(model, batch).sum() * float("nan")

    run = BlockRun(model, blocks, batches, loss, device=CPU, spool=Spool())
    for place in range(len(blocks)):
        run.forward(place)
    with pytest.raises(ValueError, match="The calibration loss must be finite, got nan"):
        run.start_backward()
