"""Train and merge LoRA adapters on pruned models. Needs PEFT; the main path does not import it.

In: a pruned model. Out: LoRA targets and layers (`layer`), or the model with an adapter merged into it (`merge`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .layer import factor_targets, lora_class, require_peft, whole_matrix
    from .merge import check_adapter, merge_adapter, save_merged

__all__ = [
    "check_adapter",
    "factor_targets",
    "lora_class",
    "merge_adapter",
    "require_peft",
    "save_merged",
    "whole_matrix",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "layer": ["factor_targets", "lora_class", "require_peft", "whole_matrix"],
        "merge": ["check_adapter", "merge_adapter", "save_merged"],
    },
)
