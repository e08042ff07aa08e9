"""SVD-LLM: whitening by the inputs' second moments, then a truncated SVD of each matrix, with equal kept fractions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .checkout import cpu_seconds, import_from, on_cpu
from .packs import pack_texts, reading_text_ids


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from .packs import Text

# They hold models that are not run here, evaluation and data sets, and need old versions of transformers.
_ABSENT = ("evaluater", "utils.data_utils", "component.svd_mistral", "component.svd_opt")
# By this name the code recognizes the architecture.
_KIND = "llama"


class SvdLlm:
    """The factors of SVD-LLM, by the code of a checkout.

    Args:
        folder (`Path`): The checkout.
        model (`torch.nn.Module`): The dense model, of Llama's modules; copied.
        texts (`Sequence[Text]`): The calibration texts.
        pack_length (`int`): Tokens of a sequence.
        targets (`Sequence[str]`): Names of the matrices.
    """

    def __init__(
        self, folder: Path, model: nn.Module, texts: Sequence[Text], pack_length: int, targets: Sequence[str]
    ) -> None:
        (self.code,) = import_from(folder, ["SVDLLM"], _ABSENT)
        self.model, self.targets = model, targets
        start, profiled = cpu_seconds(), copy.deepcopy(model)
        with on_cpu(), reading_text_ids(profiled):
            self.moments = self.code.profle_svdllm(_KIND, profiled, pack_texts(texts, pack_length, "text"), "cpu")
        self.seconds = {"calibration": cpu_seconds() - start}

    def factors(self, kept: float) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
        """Return left and right factors of every matrix by name, and the CPU seconds of their stages."""
        # The replaced layers are not run: their attention expects as many keys as queries.
        start, pruned = cpu_seconds(), copy.deepcopy(self.model)
        with on_cpu():
            self.code.whitening(_KIND, pruned, self.moments, kept, "cpu")
        found = {name: tuple(_weight(pruned, name, side) for side in "uv") for name in self.targets}
        return found, {**self.seconds, "factors": cpu_seconds() - start}


def _weight(model: nn.Module, name: str, side: str) -> torch.Tensor:
    """Return the left (`"u"`) or right (`"v"`) factor of `..._proj`."""
    module: Any = model.get_submodule(f"{name.removesuffix('_proj')}_{side}_proj")
    return module.weight.detach()
