from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import optimum_sieve


def test_all_is_sorted_and_complete():
    assert optimum_sieve.__all__ == sorted(optimum_sieve.__all__)
    assert set(optimum_sieve.__all__) == {name for names in optimum_sieve._MODULES.values() for name in names}
    assert set(optimum_sieve.__all__) <= set(dir(optimum_sieve))


@pytest.mark.parametrize("name", optimum_sieve.__all__)
def test_public_name_is_importable_and_documented(name):
    value = getattr(optimum_sieve, name)
    assert value.__module__.startswith("optimum_sieve.")
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        undocumented = [
            method
            for method, function in vars(value).items()
            if not method.startswith("_") and callable(getattr(value, method)) and not inspect.getdoc(function)
        ]
        assert undocumented == []


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'optimum_sieve' has no attribute 'SievePrune'"):
        optimum_sieve.SievePrune  # noqa: B018


def test_dir_lists_lazy_names():
    code = (
        "import sys, optimum_sieve.healing as healing; "
        "print(set(healing.__all__) <= set(dir(healing)), '__doc__' in dir(healing), 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "True", "False"]


def test_import_is_light():
    code = (
        "import sys, optimum_sieve; optimum_sieve.SieveConfig(tolerance=0.02); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_former_module_names_give_the_same_modules():
    code = (
        "import sys, optimum_sieve._lazy as lazy; from importlib import import_module as load; "
        "pairs = lazy.FORMER_MODULES.items(); "
        "print(all(load(f'optimum_sieve.{old}') is load(f'optimum_sieve.{new}') for old, new in pairs))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("allocation", "allocate"),
        ("calibration", "collect_moments"),
        ("evaluation", "evaluate"),
        ("export", "export_dense"),
        ("factorization", "factorize"),
        ("healing", "heal"),
        ("lora", "factor_targets"),
        ("lora", "whole_matrix"),
        ("plan", "PrunePlan"),
        ("search.study", "SearchStudy"),
        ("surgery", "truncated"),
        ("widening", "recompress"),
    ],
)
def test_documented_deep_imports(module, name):
    # A submodule of the same name would take the name's place once it is imported.
    value = getattr(importlib.import_module(f"optimum_sieve.{module}"), name)
    assert value.__name__ == name
    importlib.import_module(value.__module__)
    assert getattr(importlib.import_module(f"optimum_sieve.{module}"), name) is value
