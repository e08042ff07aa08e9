r"""LoRA on pruned models: on the factors, which PEFT reaches by itself, or around whole factorized matrices.

Needs PEFT, which is imported when it is used.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery.factors import factors_of, is_plain, layer_like, row_norms


if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig
    from torch import nn

# Other initializations rewrite the dense weight, and a factorized matrix has none.
_INITIALIZATIONS = ("gaussian", "orthogonal")


def require_peft() -> Any:
    """Import PEFT.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("`peft` must be installed for adapters, got none. `pip install peft`.") from error
    return peft


def factor_targets(model: nn.Module) -> list[str]:
    """Name what LoRA can learn on in the blocks of a pruned model, for `LoraConfig(target_modules=...)`.

    These are the factors of factorized layers and the layers that stayed dense. Factors without elements are left out:
    those of layers of rank 0, and the `rest` of a pivoted layer of as many pivots as rows.

    Args:
        model (`torch.nn.Module`): The pruned model, quantized or not; of a dense one, its linear layers are named.

    Returns:
        `list[str]`: Whole module names, such as `"model.layers.0.self_attn.q_proj.right"`.

    Raises:
        ValueError: If the model has no linear layers in its blocks.
    """
    targets = find_targets(model)
    return [target.name for target in targets if model.get_submodule(target.name).weight.numel()]  # type: ignore[operator]


def whole_matrix(config: LoraConfig) -> LoraConfig:
    r"""Let a LoRA configuration reach whole factorized matrices by their names, such as `q_proj`.

    A factorized layer \(W'x\) named in `target_modules` then becomes \(W'x + s B A x\), as a dense one does. Merging
    keeps it factorized: its rank grows by that of the adapter. What PEFT writes does not say this, so an adapter of
    this kind, or one trained on the dense model, is loaded by

    ```python
    config = whole_matrix(LoraConfig.from_pretrained(adapter))
    PeftModel.from_pretrained(model, adapter, config=config)
    ```

    Args:
        config (`peft.LoraConfig`): Changed in place. LoRA, rsLoRA and DoRA are supported.

    Returns:
        `peft.LoraConfig`: The same object.

    Raises:
        ImportError: If PEFT is not installed.
        TypeError: If `config` is not for LoRA.
    """
    peft = require_peft()
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(
            f"`config` must be a `peft.LoraConfig`, got {type(config).__name__}. Other methods reach the factors "
            "alone, see `factor_targets`."
        )
    registered: LoraConfig = config
    registered._register_custom_module({FactorizedLinear: lora_class()})
    return registered


@functools.cache
def lora_class() -> Any:
    """Make `FactorizedLora`, PEFT's LoRA layer of a linear with what [`WholeMatrixMixin`] changes."""
    require_peft()
    from peft.tuners.lora import Linear

    namespace = {"__module__": __name__, "__doc__": "LoRA around a `FactorizedLinear`."}
    return type("FactorizedLora", (WholeMatrixMixin, Linear), namespace)


def __getattr__(name: str) -> Any:
    """Make the class on demand, for pickle."""
    if name == "FactorizedLora":
        return lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from peft.tuners.lora import Linear as _LoraBase
else:
    _LoraBase = object


class WholeMatrixMixin(_LoraBase):
    """What `FactorizedLora` adds to PEFT's LoRA layer of a linear: merging into factors, and out again exactly.

    The merged layer is a function of the layer before and of the adapters merged. That layer is kept meanwhile, so
    `unmerge` gives back the very same factors; `merge_and_unload` lets it go.
    """

    base_layer: FactorizedLinear

    def __init__(self, base_layer: FactorizedLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        # For weights that are held as (in, out), such as GPT-2's; those of a factorized matrix never are.
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # In a list, so that it is no submodule.
        self._before: list[FactorizedLinear] = []

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Variants that merge into factors."""
        return {key: variant for key, variant in super().lora_variants.items() if key in ((), ("use_dora",))}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: If its options need a dense weight, or the factors are quantized or have adapters themselves.
        """
        name, chosen = kwargs.get("target_name", ""), config.init_lora_weights
        if isinstance(chosen, str) and chosen not in _INITIALIZATIONS:
            raise ValueError(
                f"`init_lora_weights` must be a boolean, 'gaussian' or 'orthogonal' around a factorized matrix, got "
                f"{chosen!r} for {name!r}. Others rewrite a dense weight: use them on the factors, see "
                "`factor_targets`."
            )
        base = self._unmerged()
        if not is_plain(base):
            kinds = ", ".join(sorted({type(child).__name__ for child in (base.first, base.last)}))
            raise ValueError(
                f"`target_modules` must name layers of plain factors to put adapters around them, got {kinds} in "
                f"{name!r}. Put adapters on quantized factors themselves, see `factor_targets`."
            )
        if config.use_dora and not base.rank:
            raise ValueError(
                f"`use_dora` must be False around a layer of rank 0, whose rows have no length to scale, got True for "
                f"{name!r}. Name it in `exclude_modules`."
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the factors: the rank grows by theirs, up to `min(out_features, in_features)`.

        Args:
            safe_merge (`bool`): Whether an adapter that is not finite is refused.
            adapter_names (`list[str]`, *optional*): Adapters to merge; `None`: the active ones.

        Raises:
            ValueError: If factors are quantized, offloaded or carry adapters, or an adapter is broken.
            RuntimeError: If an adapter has a bias and the layer has none.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if safe_merge:
            self._check_finite(names)
        base = self._unmerged()
        merged = self._merged(base, [*self.merged_adapters, *names])
        self._before = [base]
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the layer that was there before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.base_layer.first.weight
        # The model may have moved meanwhile.
        self.base_layer = self._before.pop().to(weight.device, weight.dtype).train(self.training)
        self.merged_adapters.clear()

    def _unmerged(self) -> FactorizedLinear:
        before = getattr(self, "_before", None)
        return before[0] if before else self.base_layer

    @torch.no_grad()
    def _merged(self, base: FactorizedLinear, names: Sequence[str]) -> FactorizedLinear:
        """Make the layer that gives what `base` and the adapters give together."""
        own_left, own_right = factors_of(base)
        left, right, bias = own_left, own_right, base.bias
        for name in names:
            first: Any = self.lora_A[name]
            last: Any = self.lora_B[name]
            lora_left, lora_right = last.weight.to(left) * self.scaling[name], first.weight.to(right)
            left, right = torch.cat([left, lora_left], dim=1), torch.cat([right, lora_right])
            if name in self.lora_variant:
                # DoRA scales every row of what comes in to a length; by PEFT's rule the one it had is measured on the
                # layer without the other adapters.
                norms = row_norms(torch.cat([own_left, lora_left], dim=1), torch.cat([own_right, lora_right]))
                magnitude: Any = self.lora_magnitude_vector[name].weight
                left = left * (magnitude.to(norms) / norms).to(left)[:, None]
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(
                        "`lora_bias` must be False where the layer has no bias, got True. Train the adapter without."
                    )
                bias = bias + last.bias.to(bias) * self.scaling[name]
        return layer_like(base, left, right, bias)

    def _check_finite(self, names: Sequence[str]) -> None:
        for name in names:
            parts = [self.lora_A[name], self.lora_B[name]]
            parts += [self.lora_magnitude_vector[name]] if name in self.lora_magnitude_vector else []
            if not all(bool(torch.isfinite(tensor).all()) for part in parts for tensor in part.parameters()):
                raise ValueError(
                    f"`adapter_names` must name finite adapters, got NaN or infinity in {name!r}. It seems to be "
                    "broken: train it again."
                )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # Not by its weight, which is multiplied out at every access and is on the meta device where it cannot be.
        assert isinstance(base_layer, FactorizedLinear)
        found: tuple[Any, Any] = super()._get_base_layer_device_and_dtype(base_layer.first)  # type: ignore[no-untyped-call]
        return found
