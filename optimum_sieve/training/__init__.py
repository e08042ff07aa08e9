"""Short trainings that healing and tuning share: AdamW on named parameters, for a fixed number of steps.

In: parameters of a model, and examples with a loss (`loop.Part`). Out: trained parameters and figures (`Training`).
`loop.Trainer` is the training, which resumes from the work directory; `optimizer` holds parameters and AdamW's state,
`adapters` are LoRA adapters that are merged, `sampling` orders the examples, `steps` is the loop over the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .adapters import Adapters
    from .loop import Part, Trainer
    from .steps import Training

__all__ = ["Adapters", "Part", "Trainer", "Training"]

__getattr__, __dir__ = lazy_names(
    __name__, {"adapters": ["Adapters"], "loop": ["Part", "Trainer"], "steps": ["Training"]}
)
