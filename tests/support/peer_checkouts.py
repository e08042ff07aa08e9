"""Tiny stand-ins for checkouts of other projects, with the names that `benchmarks/peers.py` calls and a plain SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

SVD_LLM = """
import torch
from torch import nn
from evaluater import *
from component.svd_mistral import Attention
from helper import truncate

def profle_svdllm(name, model, loader, device):
    assert name == "llama" and device == "cpu"
    with torch.no_grad():
        losses = [model(**batch).logits.log_softmax(-1).mean() for batch in loader]
    print("profiled", len(losses))
    return {"batches": len(losses)}

def whitening(name, model, moments, ratio, device):
    assert moments["batches"] > 0
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for child in list(part._modules):
                if child.endswith("_proj"):
                    left, right = truncate(getattr(part, child).weight.data, ratio)
                    delattr(part, child)
                    for side, factor in (("u", left), ("v", right)):
                        linear = nn.Linear(*factor.shape[::-1], bias=False)
                        linear.weight.data = factor
                        setattr(part, f"{child.removesuffix('_proj')}_{side}_proj", linear)
"""

HELPER = """
import torch

def truncate(weight, ratio):
    rank = int(ratio * weight.numel() / sum(weight.shape))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]
"""

KFAC = """
import torch
from torch import nn
from ..helper import truncate

class Pair(nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.mod_a, self.mod_b = (nn.Linear(*factor.shape[::-1], bias=False) for factor in (right, left))
        self.mod_a.weight.data, self.mod_b.weight.data = right, left

class KFAC_SVDFactorization:
    def __init__(self, vision, fast, calib_dataset_name, use_cache):
        assert not vision and fast and not use_cache
        self.device = torch.device(torch.cuda.current_device())
        self.scored = 0

    def factorization_computations(self, model, name_omit, calib_data, mixup_fn):
        model.to(self.device)
        for batch in calib_data:
            labels = batch["input_ids"][:, 1:]
            logits = model(**batch).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
            self.scored += int((labels >= 0).sum())
            torch.cuda.synchronize()
        print("scored", self.scored)

    def factorize_model(self, model, ranks, name_omit, verbose):
        for name, ratio in ranks.items():
            if ratio != 1.0 and name not in name_omit:
                parent, _, child = name.rpartition(".")
                pair = Pair(*truncate(model.get_submodule(name).weight.data, ratio))
                setattr(model.get_submodule(parent), child, pair)
"""

UNIFORM = """
from torch import nn

class UNIFORMSearch:
    def __init__(self, eval_data, mixup_fn, name_omit, ratio_target):
        self.omitted, self.ratio_target = name_omit, ratio_target

    def search(self, model):
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return {name: 1.0 if name in self.omitted else self.ratio_target for name in linears}
"""

LEMS = """
import torch
import matplotlib.pyplot as plt
from gurobipy import Model, GRB
from .uniform import UNIFORMSearch

class LEMSSearch(UNIFORMSearch):
    def __init__(self, eval_data, mixup_fn, name_omit, solver, **settings):
        super().__init__(eval_data, mixup_fn, name_omit, None)
        self.data = eval_data

    def initialize_search(self, factorization, model):
        self.factorization = factorization
        together = {key: torch.cat([batch[key] for batch in self.data]).pin_memory() for key in self.data[0]}
        assert len(self.data) == 8 and model(**together).logits.shape[1] > 256

    def search(self, model):
        ranks = super().search(model)
        # The first matrix stays dense, the others pay for it.
        return {name: 1.0 if name.endswith("layers.0.self_attn.k_proj") else 0.5 * kept for name, kept in ranks.items()}
"""

# Reading one of these would end the test.
ABSENT = "raise ImportError('must not be read')\n"


def write_checkouts(directory: Path) -> tuple[Path, Path]:
    """Write both and return their folders."""
    files = {
        "svd-llm/SVDLLM.py": SVD_LLM,
        "svd-llm/helper.py": HELPER,
        "svd-llm/evaluater.py": ABSENT,
        "svd-llm/component/svd_mistral.py": ABSENT,
        "lems/compression/helper.py": HELPER,
        "lems/compression/factorization/kfac_svd.py": KFAC,
        "lems/compression/search/uniform.py": UNIFORM,
        "lems/compression/search/lems.py": LEMS,
    }
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory / "svd-llm", directory / "lems"
