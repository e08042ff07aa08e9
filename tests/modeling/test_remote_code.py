"""Where optimum-sieve is not installed, the code beside the weights loads a pruned model, if it is trusted."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from clean_environment import make_clean_environment
from safetensors.torch import save_file
from tiny_models import auto_class, logits, make_input_ids, make_pruned_model
from toy import make_model, make_tokenizer, parity_rows, task_spec, unhealed, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

import optimum_sieve
from optimum_sieve import SievePruner, Task


CODE = (
    "empty_layers.py",
    "experts.py",
    "fingerprint.py",
    "layers.py",
    "layout.py",
    "loading_checks.py",
    "modeling_sieve.py",
    "pipeline_scores.py",
    "pipeline_sieve.py",
    "tensor_parallel.py",
    "vllm_rules.py",
)
PACKAGE = Path(optimum_sieve.__file__).parent / "modeling"

SCRIPT = '''
"""Load `sys.argv[1:]` the ways a user would, in an environment without optimum-sieve; write what came of it."""

import importlib.util, json, pickle, sys
from importlib.metadata import entry_points
from pathlib import Path

found = {"installed": importlib.util.find_spec("optimum_sieve") is not None}
found["entry_points"] = [entry.value for entry in entry_points(group="torch.backends")]

import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

llama, phi3, task, base = map(Path, sys.argv[1:])
expected = {path: load_file(path / "expected.safetensors") for path in (llama, phi3)}

def refusal(load, path, **options):
    try:
        load(path, **options)
    except ValueError as error:
        return str(error)

def equal(model, path):
    return bool((model(expected[path]["input_ids"]).logits == expected[path]["logits"]).all())

loaders = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
found["untrusted"] = [refusal(loader.from_pretrained, llama) for loader in loaders]
found["distrusted"] = [refusal(loader.from_pretrained, llama, trust_remote_code=False) for loader in loaders]

models = {path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in (llama, phi3)}
found["equal"] = [equal(model, path) for path, model in models.items()]
found["classes"] = [f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}" for model in models.values()]
found["pickled"] = [type(pickle.loads(pickle.dumps(model))) is type(model) for model in models.values()]
found["generated"] = models[llama].generate(expected[llama]["input_ids"], max_new_tokens=4, do_sample=False).tolist()
found["others"] = [
    type(loader.from_pretrained(llama, trust_remote_code=True)).__name__
    for loader in (AutoConfig, AutoModel, AutoModelForSequenceClassification)
]
found["registered"] = "sieve" in CONFIG_MAPPING
found["untrusted_afterwards"] = [refusal(loader.from_pretrained, phi3) for loader in loaders]

for first, second in (("first", "second"), ("second", "third")):
    models[llama].save_pretrained(base / first)
    models[llama] = AutoModelForCausalLM.from_pretrained(base / first, trust_remote_code=True)
found["saved_again"] = equal(models[llama], llama)
AutoModelForSequenceClassification.from_pretrained(llama, trust_remote_code=True).save_pretrained(base / "classifier")
from transformers import pipeline

try:
    pipeline("sieve", model=str(task), device=-1)
except ValueError as error:
    found["pipeline_untrusted"] = str(error)
pipe = pipeline("sieve", model=str(task), device=-1, trust_remote_code=True)
found["pipeline"] = f"{type(pipe).__module__.partition('.')[0]}.{type(pipe).__name__}"
found["answers"] = pipe(["7 51 30", "8", "9 9"])
(base / "found.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("remote")
    for architecture in ("llama", "phi3"):
        model = make_pruned_model(architecture)
        model.save_pretrained(base / architecture)
        expected = {"input_ids": make_input_ids(), "logits": logits(model)}
        save_file(expected, base / architecture / "expected.safetensors")
    write_rows(base / "rows.jsonl", parity_rows(60))
    pruner = SievePruner(make_model(), make_tokenizer(), Task.from_dict(task_spec(), base), base_model="toy/base")
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, label_offsets="prior"), progress=False)
    pruner.save_pretrained(base / "task")
    return {name: base / name for name in ("llama", "phi3", "task", "saved")}


@pytest.fixture(scope="module")
def found(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found in a virtual environment without optimum-sieve."""
    root = tmp_path_factory.mktemp("environment")
    python = make_clean_environment(root)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", SCRIPT, *map(str, directories.values())],
        cwd=root,
        env={**clean, "HF_HOME": str(root / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads((directories["saved"] / "found.json").read_text())
    return answer


def test_the_environment_lacks_the_package(found: dict[str, Any]) -> None:
    assert not found["installed"]
    assert not [value for value in found["entry_points"] if "optimum_sieve" in value]


@pytest.mark.parametrize("when", ["untrusted", "distrusted", "untrusted_afterwards"])
def test_code_that_is_not_trusted_does_not_run(found: dict[str, Any], when: str) -> None:
    for message in found[when]:
        assert "contains custom code" in message
        assert "`trust_remote_code=True`" in message


def test_trusted_code_gives_the_same_logits(found: dict[str, Any]) -> None:
    assert found["equal"] == [True, True]
    assert found["classes"] == [
        "transformers_modules.SieveLlamaForCausalLM",
        "transformers_modules.SievePhi3ForCausalLM",
    ]
    assert found["others"] == ["SieveLlamaConfig", "SieveLlamaModel", "SieveLlamaForSequenceClassification"]


def test_trusted_code_generates_the_same_text(found: dict[str, Any], directories: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories["llama"])
    assert found["generated"] == model.generate(make_input_ids(), max_new_tokens=4, do_sample=False).tolist()


def test_trusted_models_can_be_pickled(found: dict[str, Any]) -> None:
    # Of remote models that prepare their own inputs for generation, as Phi3 does, transformers may make one more class.
    assert found["pickled"] == [True, True]


def test_the_pipeline_answers_without_the_package(found: dict[str, Any], directories: dict[str, Path]) -> None:
    assert "trust_remote_code=True" in found["pipeline_untrusted"]
    assert found["pipeline"] == "transformers_modules.SievePipeline"
    answers = pipeline("sieve", model=str(directories["task"]), device=-1)(["7 51 30", "8", "9 9"])
    for one, other in zip(found["answers"], answers, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_trusted_code_registers_nothing_for_other_models(found: dict[str, Any]) -> None:
    assert not found["registered"]


def test_saving_again_keeps_the_code(found: dict[str, Any], directories: dict[str, Path]) -> None:
    assert found["saved_again"]
    names = {"config.json", "generation_config.json", "model.safetensors", *CODE}
    for name in ("first", "second"):
        copy = directories["saved"] / name
        assert {path.name for path in copy.iterdir()} == names
        for file in CODE:
            assert (copy / file).read_bytes() == (PACKAGE / file).read_bytes()
        for file in ("config.json", "model.safetensors"):
            assert (copy / file).read_bytes() == (directories["llama"] / file).read_bytes()


def test_what_trusted_code_saved_loads_with_the_package(found: dict[str, Any], directories: dict[str, Path]) -> None:
    assert found["saved_again"]
    model = AutoModelForCausalLM.from_pretrained(directories["saved"] / "second")
    assert type(model).__module__ == "optimum_sieve.modeling.modeling_sieve"
    assert (logits(model) == logits(AutoModelForCausalLM.from_pretrained(directories["llama"]))).all()
    classifier = json.loads((directories["saved"] / "classifier" / "config.json").read_text())
    assert classifier["architectures"] == ["SieveLlamaForSequenceClassification"]


def test_the_package_takes_the_place_of_the_code(directories: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories["llama"], trust_remote_code=True)
    assert type(model).__module__ == "optimum_sieve.modeling.modeling_sieve"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_the_code_beside_the_weights(architecture: str, tmp_path: Path) -> None:
    make_pruned_model(architecture).save_pretrained(tmp_path)
    assert tuple(sorted(path.name for path in tmp_path.glob("*.py"))) == CODE
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    model = auto_class(architecture).from_pretrained(tmp_path)
    assert names["AutoConfig"] == "modeling_sieve.SieveModelConfig"
    assert names["AutoModel"].startswith("modeling_sieve.Sieve")
    assert names[auto_class(architecture).__name__] == f"modeling_sieve.{type(model).__name__}"


def test_a_configuration_alone_brings_the_code(directories: dict[str, Path], tmp_path: Path) -> None:
    AutoConfig.from_pretrained(directories["llama"]).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *CODE}


def test_code_is_no_longer_sought_where_a_model_came_from(directories: dict[str, Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(directories["llama"])
    expected = dict(config.auto_map)
    config.auto_map = {key: f"org/elsewhere--{name}" for key, name in expected.items()}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == expected


def test_an_uploaded_configuration_brings_the_code(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(directories["llama"])
    uploaded: list[tuple[str, dict[str, Any], set[str]]] = []

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> None:
        self.save_pretrained(tmp_path / "uploaded")
        uploaded.append((repo_id, options, {path.name for path in (tmp_path / "uploaded").iterdir()}))

    monkeypatch.setattr(type(config), "push_to_hub", push_to_hub)
    config.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    config.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/model")
    files = {"config.json", *CODE}
    assert uploaded == [("mine", {"private": True}, files), ("me/model", {}, files)]
