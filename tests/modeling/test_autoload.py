"""The package installed, and nothing of it imported: transformers knows pruned models all the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import logits, make_input_ids, make_pruned_model

from optimum_sieve import _autoload


if TYPE_CHECKING:
    from pathlib import Path

CHECK_REGISTERED = """
import sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "sieve" in CONFIG_MAPPING
assert not {"optimum_sieve.modeling.modeling_sieve", "optimum_sieve.modeling.layers"} & set(sys.modules)
assert [type(finder).__name__ for finder in sys.meta_path if "sieve" in type(finder).__module__] == ["_FormerModules"]
"""

LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from safetensors.torch import load_file
directory = sys.argv[1]
assert type(AutoConfig.from_pretrained(directory)).__name__ == "SieveLlamaConfig"
expected = load_file(f"{directory}/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(directory)
assert type(model).__name__ == "SieveLlamaForCausalLM"
assert (model(expected["input_ids"]).logits == expected["logits"]).all()
assert type(AutoModel.from_pretrained(directory)).__name__ == "SieveLlamaModel"
classifier = AutoModelForSequenceClassification.from_pretrained(directory)
assert type(classifier).__name__ == "SieveLlamaForSequenceClassification"
"""

REFUSE = """
import sys
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "sieve" not in CONFIG_MAPPING
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded")
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    model = make_pruned_model("llama")
    model.save_pretrained(directory)
    save_file({"input_ids": make_input_ids(), "logits": logits(model)}, directory / "expected.safetensors")
    return directory


def run(code: str, *arguments: Path, cwd: Path, **environment: str) -> None:
    """Run `code` in a fresh interpreter, away from the repository, where the installed package alone can be found."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_installed_package_declares_the_entry_point() -> None:
    found = [entry.value for entry in entry_points(group="torch.backends") if entry.name == "optimum_sieve"]
    # The second form is that of installations made before the hook had a file outside the package.
    assert found in (["optimum_sieve_autoload:register"], ["optimum_sieve._autoload:register"])


def test_plain_transformers_loads_a_pruned_model(directory: Path, tmp_path: Path) -> None:
    run(f"from transformers import AutoModelForCausalLM\n{CHECK_REGISTERED}\n{LOAD}", directory, cwd=tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import torch", id="torch first"),
        # transformers imports torch while this module is half done.
        pytest.param("from transformers import AutoConfig", id="configurations first"),
        pytest.param(
            "import importlib.util, torch\nimportlib.util.find_spec('transformers.models.auto.configuration_auto')",
            id="looked for, not imported",
        ),
    ],
)
def test_any_order_of_imports(imports: str, tmp_path: Path) -> None:
    run(imports + CHECK_REGISTERED, cwd=tmp_path)


@pytest.mark.parametrize("imports", ["import optimum_sieve", "import transformers.models.auto, optimum_sieve"])
def test_an_import_of_the_package_is_enough_without_the_entry_point(imports: str, tmp_path: Path) -> None:
    run(imports + CHECK_REGISTERED, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


@pytest.mark.parametrize("variable", ["OPTIMUM_SIEVE_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off(variable: str, directory: Path, tmp_path: Path) -> None:
    run(f"{REFUSE}\nimport optimum_sieve.modeling.modeling_sieve\n{LOAD}", directory, cwd=tmp_path, **{variable: "0"})


def test_the_package_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = """
import sys, optimum_sieve
assert "optimum_sieve._autoload" in sys.modules
assert not {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
"""
    run(code, cwd=tmp_path)


def test_registering_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    config = sys.modules["transformers.models.auto.configuration_auto"].CONFIG_MAPPING["sieve"]
    _autoload.register()
    _autoload.register()
    assert sys.meta_path == finders
    assert sys.modules["transformers.models.auto.configuration_auto"].CONFIG_MAPPING["sieve"] is config


def test_no_exception_reaches_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(_autoload, "_watch", fail)
    with caplog.at_level(logging.DEBUG, logger=_autoload.__name__):
        _autoload.register()
    assert [record.message for record in caplog.records] == ["The model type 'sieve' could not be registered."]


def test_no_exception_reaches_transformers(caplog: pytest.LogCaptureFixture) -> None:
    module = ModuleType("transformers.models.auto.configuration_auto")
    module.__class__ = _autoload._UnfinishedModule
    module.early = 1
    assert module.early == 1
    assert type(module) is _autoload._UnfinishedModule
    # Finished, but not as this package knows it.
    module.AutoConfig = torch.nn.Module
    with caplog.at_level(logging.DEBUG, logger=_autoload.__name__):
        assert module.early == 1
    assert type(module) is ModuleType
    assert [record.message for record in caplog.records] == ["The model type 'sieve' could not be registered."]
