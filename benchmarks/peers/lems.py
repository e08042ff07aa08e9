"""KFAC-SVD, whose whitening has the gradients' second moments too, with equal kept fractions or the ranks of LEMS."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .checkout import cpu_seconds, import_from, on_cpu
from .packs import cut_texts, pack_texts, reading_text_ids


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from .packs import Text

# A solver that needs a licence, and plots.
_ABSENT = ("gurobipy", "matplotlib", "matplotlib.pyplot")
_MODULES = tuple(f"compression.{name}" for name in ("factorization.kfac_svd", "search.uniform", "search.lems"))
# The project's configuration `kfac_lems`, but for the solver.
_SEARCH: dict[str, Any] = {
    "sensitivity_loss": "energy2_normal_klscaled",
    "measurements_points": "0.1",
    "crosslayer_term": "harmonicv2",
    "halpha": 0.0,
    "hgamma": 5.0,
    "enforce_rank_multiples_of": 8,
    "solver": "cbc",
}
# Its divergences leave out the first tokens of a sequence, and are of an eighth of the sequences at a time: with fewer
# than eight they would be zero.
_SKIPPED, _SEQUENCES = 256, 8


class Lems:
    """The factors of KFAC-SVD with or without the search of LEMS, by the code of a checkout.

    Args:
        folder (`Path`): The checkout.
        model (`torch.nn.Module`): The dense model; copied.
        texts (`Sequence[Text]`): The calibration texts.
        pack_length (`int`): Tokens of a sequence of the moments.
        targets (`Sequence[str]`): Names of the matrices.
        sensitivity_tokens (`int`): Tokens of the calibration texts at which the search compares distributions.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        texts: Sequence[Text],
        pack_length: int,
        targets: Sequence[str],
        sensitivity_tokens: int,
    ) -> None:
        self.kfac, self.uniform, self.lems = import_from(folder, _MODULES, _ABSENT)
        self.texts, self.pack_length, self.targets = texts, pack_length, targets
        self.sensitivity_tokens = sensitivity_tokens
        # Matrices whose names contain one of these stay dense.
        self.omitted = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in targets
        ]
        self.dense = model
        self.loss: str | None = None
        self.search: Any = None

    def factors(
        self, kept: float, *, loss: str, searched: bool
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
        """Return left and right factors of the matrices that are not kept dense, and the CPU seconds of their stages.

        Args:
            kept (`float`): Fraction of the matrices' parameters to keep.
            loss (`str`): `"text"`: of every token, as the project has it; `"answer"`: of the gold answers' tokens.
            searched (`bool`): Choose the ranks by LEMS.
        """
        with on_cpu():
            self._calibrate(loss)
            if searched:
                self._measure()
            start, model = cpu_seconds(), copy.deepcopy(self.dense)
            ranks = self._searched_ranks(kept) if searched else self._uniform(kept).search(model)
            between = cpu_seconds()
            self.factorization.factorize_model(model, ranks, name_omit=self.omitted, verbose=False)
        found = {}
        for name in self.targets:
            module: Any = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                found[name] = (module.mod_b.weight.detach(), module.mod_a.weight.detach())
        seconds = self.seconds | (self.search_seconds if searched else {})
        return found, {**seconds, "ranks": between - start, "factors": cpu_seconds() - between}

    def _calibrate(self, loss: str) -> None:
        """Collect the moments and factor every matrix, once for all sizes."""
        if loss == self.loss:
            return
        start, model = cpu_seconds(), copy.deepcopy(self.dense)
        settings = {"calib_dataset_name": "task", "use_cache": False}
        self.factorization = self.kfac.KFAC_SVDFactorization(vision=False, fast=True, **settings)
        packs = pack_texts(self.texts, self.pack_length, loss)
        with reading_text_ids(model):
            self.factorization.factorization_computations(
                model=model, name_omit=self.omitted, calib_data=packs, mixup_fn=None
            )
        self.loss, self.search = loss, None
        self.seconds = {"calibration": cpu_seconds() - start}

    def _uniform(self, kept: float) -> Any:
        return self.uniform.UNIFORMSearch(eval_data=None, mixup_fn=None, name_omit=self.omitted, ratio_target=kept)

    def _measure(self) -> None:
        """Measure the matrices' sensitivities, once for all sizes."""
        if self.search is not None:
            return
        start, self.searched = cpu_seconds(), copy.deepcopy(self.dense)
        length = _SKIPPED + -(-self.sensitivity_tokens // _SEQUENCES)
        data = cut_texts(self.texts, _SEQUENCES, length)
        self.search = self.lems.LEMSSearch(eval_data=data, mixup_fn=None, name_omit=self.omitted, **_SEARCH)
        self.search.initialize_search(self.factorization, self.searched)
        self.search_seconds = {"sensitivities": cpu_seconds() - start}

    def _searched_ranks(self, kept: float) -> dict[str, float]:
        """Search the ranks of a size."""
        self.search.ratio_target = kept
        found: dict[str, float] = self.search.search(self.searched)
        return found
