"""The model type `sieve`: the files saved with the weights, and the conversion of a factorized model.

In: a transformers model with `FactorizedLinear` layers, or a saved directory. Out: a model of type `sieve`.
`modeling_sieve` is the entry point of remote code. It is saved with the weights, together with the modules that it
reaches by relative imports: `layers`, `empty_layers`, `experts`, `fingerprint`, `layout`, `loading_checks`,
`tensor_parallel` and `vllm_rules`. These import nothing else of the package. `conversion.sieve_model` turns a
factorized model into one that can be saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .conversion import sieve_model
    from .layers import FactorizedLinear
    from .layout import lay_out_for_generation
    from .modeling_sieve import read_rank_pattern

__all__ = ["FactorizedLinear", "lay_out_for_generation", "read_rank_pattern", "sieve_model"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "conversion": ["sieve_model"],
        "layers": ["FactorizedLinear"],
        "layout": ["lay_out_for_generation"],
        "modeling_sieve": ["read_rank_pattern"],
    },
)
