r"""LoRA on pruned models: on the factors, which PEFT supports as it is, or around whole factorized matrices.

Needs PEFT, which is imported on first use.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.adapters.merging import require_peft as require_peft
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery.factors import factors_of, is_plain, layer_like, row_norms


if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig
    from torch import nn

# Other initializations change the dense weight, which a factorized matrix does not have.
_INITIALIZATIONS = ("gaussian", "orthogonal")


def factor_targets(model: nn.Module) -> list[str]:
    """Return the layers in the blocks of a pruned model for `LoraConfig(target_modules=...)`.

    These are the factors of factorized layers and the layers that stayed dense. Factors without elements are left out:
    those of layers of rank 0, and the `rest` of a pivoted layer with as many pivots as rows.

    Args:
        model (`torch.nn.Module`): The pruned model, quantized or not; or a dense one. Adapters that it has, also as a
            `PeftModel`, do not change the names.

    Returns:
        `list[str]`: Full module names, such as `"model.layers.0.self_attn.q_proj.right"`.

    Raises:
        ValueError: If the model has no linear layers in its blocks.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # PEFT's layers keep what they adapt in `base_layer`, beside the adapters.
    wrappers = [f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer")]
    names = []
    for target in find_targets(base):
        inside = [prefix for prefix in wrappers if target.name.startswith(prefix)]
        kept = all(target.name.removeprefix(prefix).startswith("base_layer") for prefix in inside)
        if kept and base.get_submodule(target.name).weight.numel():
            names.append(target.name.replace(".base_layer", ""))
    return names


def whole_matrix(config: LoraConfig) -> LoraConfig:
    r"""Let a LoRA configuration target whole factorized matrices by their names, such as `q_proj`.

    A factorized layer \(W'x\) named in `target_modules` then becomes \(W'x + s B A x\), like a dense one. Merging keeps
    it factorized: its rank grows by that of the adapter. PEFT does not save this setting, so load an adapter of this
    kind, or one trained on the dense model, with

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
    """Make `FactorizedLora`: PEFT's LoRA layer of a linear with [`WholeMatrixMixin`]."""
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
    """Addition of `FactorizedLora` to PEFT's LoRA layer of a linear: merge into factors, and unmerge exactly.

    Merging keeps the original layer, so `unmerge` restores exactly the same factors; `merge_and_unload` drops it.
    """

    base_layer: FactorizedLinear

    def __init__(self, base_layer: FactorizedLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        # For weights of shape (in, out), such as GPT-2's; that of a factorized matrix is always (out, in).
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # In a list, so that it is not registered as a submodule.
        self._before: list[FactorizedLinear] = []

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Variants of LoRA that can be merged into factors."""
        return {key: variant for key, variant in super().lora_variants.items() if key in ((), ("use_dora",))}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: If its options need a dense weight, or the factors are quantized or have adapters of their own.
        """
        name, chosen = kwargs.get("target_name", ""), config.init_lora_weights
        if isinstance(chosen, str) and chosen not in _INITIALIZATIONS:
            raise ValueError(
                f"`init_lora_weights` must be a boolean, 'gaussian' or 'orthogonal' around a factorized matrix, got "
                f"{chosen!r} for {name!r}. Others change a dense weight: use them on the factors, see "
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
        """Merge adapters into the factors, which adds their ranks, up to `min(out_features, in_features)`.

        Args:
            safe_merge (`bool`): Whether to refuse an adapter that is not finite.
            adapter_names (`list[str]`, *optional*): Adapters to merge. Default: the active ones.

        Raises:
            ValueError: If factors are quantized, offloaded or have adapters, or an adapter is not finite.
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
        """Restore the layer from before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.base_layer.first.weight
        # The model may have been moved since.
        self.base_layer = self._before.pop().to(weight.device, weight.dtype).train(self.training)
        self.merged_adapters.clear()

    def _unmerged(self) -> FactorizedLinear:
        before = getattr(self, "_before", None)
        return before[0] if before else self.base_layer

    @torch.no_grad()
    def _merged(self, base: FactorizedLinear, names: Sequence[str]) -> FactorizedLinear:
        """Make the layer with the same output as `base` and the adapters together."""
        base_left, base_right = factors_of(base)
        left, right, bias = base_left, base_right, base.bias
        for name in names:
            first: Any = self.lora_A[name]
            last: Any = self.lora_B[name]
            lora_left, lora_right = last.weight.to(left) * self.scaling[name], first.weight.to(right)
            left, right = torch.cat([left, lora_left], dim=1), torch.cat([right, lora_right])
            if name in self.lora_variant:
                # DoRA scales each row of the layer with its adapters to a learned length. PEFT divides by the length
                # of the row with this adapter alone.
                norms = row_norms(torch.cat([base_left, lora_left], dim=1), torch.cat([base_right, lora_right]))
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
                    f"`adapter_names` must name finite adapters, got NaN or infinity in {name!r}. Train it again."
                )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # Its weight would be computed at every access, and is on the meta device if the factors are quantized.
        assert isinstance(base_layer, FactorizedLinear)
        pair: tuple[Any, Any] = super()._get_base_layer_device_and_dtype(base_layer.first)  # type: ignore[no-untyped-call]
        return pair
