"""Register the model type `sieve` with transformers before anything of this package is imported.

torch calls `register` at the end of its own import, so that plain `AutoModelForCausalLM.from_pretrained` loads a pruned
model wherever this package is installed. The entry point (group `torch.backends`) is in `optimum_sieve_autoload.py`,
outside the package. This module uses the standard library alone and raises nothing, as an exception would break
`import torch`. It registers a stand-in for the configuration class; the real one is imported when a pruned model is
loaded.

`OPTIMUM_SIEVE_AUTOLOAD=0` in the environment turns it off. `import optimum_sieve.modeling.modeling_sieve` then
registers the model type.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec


logger = logging.getLogger(__name__)

_MODEL_TYPE = "sieve"
_MODULE = "optimum_sieve.modeling.modeling_sieve"
_AUTO_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the model type as soon as transformers' Auto classes exist; once, and never with an exception."""
    try:
        if os.environ.get("OPTIMUM_SIEVE_AUTOLOAD", "1") != "0":
            _watch()
    except Exception:
        logger.debug("The model type %r could not be registered.", _MODEL_TYPE, exc_info=True)


def _watch() -> None:
    module = sys.modules.get(_AUTO_MODULE)
    if module is None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif "AutoConfig" in vars(module):
        _register_stand_in(module)
    else:
        # transformers is importing torch from this module, which does not have its Auto classes yet.
        module.__class__ = _UnfinishedModule


class _Finder(MetaPathFinder):
    """Find the module of the Auto configuration with the other finders, and watch it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                # A module that is found need not be imported, so the finder stays until one is created.
                setattr(spec.loader, "create_module", lambda spec: _UnfinishedModule(spec.name))  # noqa: B010
                return spec
        return None


class _UnfinishedModule(ModuleType):
    """A module during its import. Once it has `AutoConfig`, register the model type and become an ordinary module."""

    def __getattribute__(self, name: str) -> Any:
        if "AutoConfig" in ModuleType.__getattribute__(self, "__dict__"):
            ModuleType.__setattr__(self, "__class__", ModuleType)
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
            _register_stand_in(self)
        return ModuleType.__getattribute__(self, name)


def _register_stand_in(module: Any) -> None:
    try:
        # If the classes are missing, transformers' own error names the remedy, `trust_remote_code=True`.
        if importlib.util.find_spec(_MODULE) and _MODEL_TYPE not in module.CONFIG_MAPPING:
            namespace = {"__module__": __name__, "model_type": _MODEL_TYPE, "from_dict": staticmethod(_from_dict)}
            stand_in = type("SieveModelConfig", (module.PreTrainedConfig,), namespace)
            module.AutoConfig.register(_MODEL_TYPE, stand_in, exist_ok=True)
    except Exception:
        logger.debug("The model type %r could not be registered.", _MODEL_TYPE, exc_info=True)


def _from_dict(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    from optimum_sieve.modeling.modeling_sieve import SieveModelConfig

    return SieveModelConfig.from_dict(config_dict, **kwargs)
