"""Names, devices and types that cannot be loaded are refused at once, in one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_pruned_model, make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, task_spec, unhealed, write_rows
from transformers import AutoConfig

from optimum_sieve import HealConfig, SievePruner, evaluate
from optimum_sieve.backbone import sources
from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.loading import load_model, read_device, read_dtype
from optimum_sieve.backbone.sources import read_config, source_options
from optimum_sieve.export.dense import save_dense
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.plan.forecast import forecast


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with a toy model and a task file."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", parity_rows(60))
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    return tmp_path


DEVICES = ["nonsense", "", "meta", "cpu:x", "hpu", "x" * 5000, "cpu\ud800"]
if not torch.cuda.is_available():
    DEVICES.append("cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_this_machine_lacks(device: str) -> None:
    message = r"^`device` must be one that torch finds on this machine, 'cpu'.*, got '.*'\.$"
    with pytest.raises(ValueError, match=message) as caught:
        read_device(device)
    assert device[:50] in str(caught.value) or "ud800" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_device_by_name_index_or_object() -> None:
    assert read_device("cpu") == read_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("command", ["prune", "search", "evaluate", "heal"])
def test_every_command_refuses_the_device(
    command: str, directory: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    words: list[object] = ["--task", directory / "task.json", "--device", "warp"]
    if command == "heal":
        make_pruned_model("llama").save_pretrained(directory / "pruned")
        words += ["--model", directory / "pruned", "--dense", directory / "model", "--output", directory / "out"]
    else:
        words += ["--model", directory / "model"]
    if command in ("prune", "search"):
        words += ["--tolerance", "0.1", "--output" if command == "prune" else "--work-dir", directory / "out"]
    status, _, error = cli(command, *words)
    assert status == 1
    lines = error.splitlines()
    assert lines[-1].endswith("`device` must be one that torch finds on this machine, 'cpu', got 'warp'.") or (
        torch.accelerator.is_available() and "got 'warp'" in lines[-1]
    )
    assert "Traceback" not in error
    assert not (directory / "out" / "config.json").exists()


@pytest.mark.parametrize("dtype", ["evil", "int8", "float8_e4m3fn", "nn", "__doc__", 5, "x" * 5000, "\ud800"])
def test_a_type_that_models_do_not_compute_in(dtype: Any) -> None:
    message = r"^`dtype` must be a floating-point type such as 'bfloat16' or 'float32', got "
    with pytest.raises(ValueError, match=message) as caught:
        read_dtype(dtype)
    assert len(str(caught.value)) < 400


def test_plan_refuses_the_type_and_takes_that_of_the_checkpoint(
    directory: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = cli("plan", "--model", directory / "model", "--dtype", "evil")
    assert status == 1
    assert error.splitlines()[-1].endswith("floating-point type such as 'bfloat16' or 'float32', got 'evil'.")
    config = unhealed(pruning_ratio=0.5)
    options: dict[str, Any] = {"examples": 4, "tokens": 8, "hardware": "h100"}
    auto, single, half = (
        forecast(directory / "model", config, dtype=dtype, **options).plan.model_bytes
        for dtype in ("auto", "float32", "float16")
    )
    assert auto == single == 2 * half


NO_PATHS = ["./model", "../model", "/no/such/model", "~/model", "a/b/c", "C:\\model", "a b", "", "x" * 5000, "m\ud800"]


@pytest.mark.parametrize("name", [*NO_PATHS, "null\0character"])
def test_a_path_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # Nobody is asked.
    monkeypatch.setattr(sources, "get_hf_file_metadata", None)
    message = "^`model` must be a directory that exists or the id of a model on the Hub, got '"
    for load in (load_model, read_config):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            load(name)
        assert len(str(caught.value)) < 400


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with names of any bytes")
def test_a_name_that_the_card_cannot_show(directory: Path, tmp_path: Path) -> None:
    """File systems allow names of any bytes, which Python reads as lone surrogates."""
    odd = directory / os.fsdecode(b"model\xff")
    (directory / "model").rename(odd)
    with pytest.raises(ValueError, match=r"`model` must have a name of valid Unicode, .*, got '.*model\\udcff'"):
        load_model(odd)
    with pytest.raises(ValueError, match=r"`base_model` must have a name of valid Unicode, .*, got 'a\\ud800'"):
        SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, parity_rows(60)), base_model="a\ud800")


@pytest.mark.parametrize("name", ["model", "user/model", "--model", "5"])
def test_a_hub_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(url: str) -> None:
        asked.append(url)
        raise TimeoutError("no route")

    monkeypatch.setattr(sources, "get_hf_file_metadata", unreachable)
    with pytest.raises(
        (ConnectionError, FileNotFoundError), match=f"`model` must be a directory that exists.*'{name}'"
    ):
        load_model(name)
    assert len(asked) <= 1


def test_models_in_the_cache_are_loaded_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--user--model" / "snapshots").mkdir(parents=True)
    assert source_options("user/model") == {"local_files_only": True}


def test_one_question_to_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    """No file of any part is tried again and again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    code = """
import time
time.sleep = None  # A retry waits before it.
from optimum_sieve.backbone.loading import load_model
try:
    load_model("no-such-model")
except ConnectionError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": closed, "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "got 'no-such-model': it is no directory here, is not in the cache, and the Hub cannot be" in done.stdout
    assert "Retrying" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_nested_too_deep(name: str, directory: Path) -> None:
    (directory / "model" / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ValueError, match=r"`model` must have files of few levels, got one nested too deep in '"):
        load_model(directory / "model")


@pytest.mark.parametrize("value", [10**400, 10**9, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["num_labels", "num_hidden_layers"])
def test_counts_that_would_never_end(name: str, value: Any, directory: Path) -> None:
    path = directory / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    message = rf"`model` must have a `{name}` of [\d,]+ at most in config\.json, got (inf|nan|1000000000|an integer of)"
    with pytest.raises(ValueError, match=message):
        load_model(directory / "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("head_dim", value) for value in (0, 10**400, [1])),
        *(("dtype", value) for value in (float("inf"), [], "\ud800")),
        *(("pad_token_id", value) for value in (10**400, 10**5, "x")),
        *(("vocab_size", value) for value in (10**400, 2**63, 1.5, -1)),
        *(("rope_parameters", value) for value in ({"rope_theta": 10**400, "rope_type": "default"}, 5)),
    ],
)
def test_values_that_transformers_does_not_expect(name: str, value: Any, directory: Path) -> None:
    path = directory / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(
        ValueError, match=r"^`model` must be one that transformers can load, got an error for '"
    ) as caught:
        load_model(directory / "model")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), (0.0, float("inf"))])
def test_infinity_and_nan_in_a_configuration(value: Any, directory: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(directory / "model")
    config.time_step_limit = value
    model = make_model()
    key = model_key(model)
    model.config.time_step_limit = value
    assert model_key(model) == model_key(model) != key
    task = load_task(tmp_path, parity_rows(60))
    pruner = SievePruner(model, make_tokenizer(), task)
    pruner.prune(unhealed(pruning_ratio=0.5, rank_multiple=1, rounds=1), progress=False, work_dir=tmp_path / "work")
    loaded, _, _ = load_model(pruner.save_pretrained(tmp_path / "out"))
    assert str(loaded.config.time_step_limit).strip("[]()") == str(value).strip("[]()")


def peft_model() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], r=2))


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "peft": (peft_model, r"got PeftModel\. Merge its adapters with `merge_and_unload\(\)`, save the result"),
    "parallel": (lambda: torch.nn.DataParallel(make_model()), r"got DataParallel\. Pass its `module`\."),
    "compiled": (
        lambda: torch.compile(make_model(), backend="eager"),
        r"got OptimizedModule\. Pass the model that `torch\.compile`",
    ),
    "nothing": (lambda: None, r"got NoneType\. Load one with `AutoModelForCausalLM`\."),
    "tokenizer": (make_tokenizer, r"got \w+\. Load one with `AutoModelForCausalLM`\."),
}


# PEFT and torch.compile use old names of transformers and torch.
OLD_NAMES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@OLD_NAMES
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_a_model_is_no_model(kind: str, tmp_path: Path) -> None:
    make, got = WRAPPED[kind]
    task, tokenizer, model = load_task(tmp_path, parity_rows(60)), make_tokenizer(), make()
    examples = task.examples("test", tokenizer)
    calls: list[Callable[[], object]] = [lambda: save_dense(model, tokenizer, tmp_path / "out")]
    if kind != "peft":
        # Its adapter is merged.
        calls += [
            lambda: SievePruner(model, tokenizer, task),
            lambda: SievePruner.from_pretrained(model, tokenizer=tokenizer, task=task),
        ]
    if kind not in ("peft", "compiled"):
        # Those are evaluated as they are.
        calls.append(lambda: evaluate(model, examples, tokenizer, metric="accuracy", batch_size=8, progress=False))
    for call in calls:
        with pytest.raises(TypeError, match=f"^`model` must be a transformers model, {got}") as caught:
            call()
        assert len(str(caught.value)) < 200
    with pytest.raises(TypeError, match=r"^`model` must be the name of a directory or the id of a model, got \w+\.$"):
        heal_pruned(model, tmp_path, [task], HealConfig())
    assert not (tmp_path / "out").exists()


@OLD_NAMES
@pytest.mark.parametrize("kind", ["peft", "compiled"])
def test_a_wrapped_model_is_evaluated_as_it_is(kind: str, tmp_path: Path) -> None:
    tokenizer, options = make_tokenizer(), {"metric": "accuracy", "batch_size": 8, "progress": False}
    examples = load_task(tmp_path, parity_rows(60)).examples("test", tokenizer)
    torch.manual_seed(0)
    expected = evaluate(make_model(), examples, tokenizer, **options)
    assert evaluate(WRAPPED[kind][0](), examples, tokenizer, **options).score == expected.score


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(ValueError, match="`tokenizer` must be given with a loaded model, got None"):
        load_model(make_tiny_model("llama"))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_dense_model_without_a_tensor_is_refused(name: str, directory: Path) -> None:
    file = directory / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"`model` must have all weights .* without {name}\. Download"):
        load_model(directory / "model")


def test_weights_of_other_shapes_are_refused(directory: Path) -> None:
    path = directory / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(
        ValueError, match=r"`model` must have weights of the shapes that its config.json gives, got .*m"
    ):
        load_model(directory / "model")


def test_a_dense_model_with_fewer_layers_than_it_says_is_refused(directory: Path) -> None:
    path = directory / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ValueError, match=r"`model` must have all weights .*layers"):
        load_model(directory / "model")


@pytest.mark.parametrize("config", [None, {}, "0.5"])
def test_settings_of_another_type_are_refused(config: Any, directory: Path) -> None:
    pruner = SievePruner.from_pretrained(directory / "model", task=directory / "task.json")
    with pytest.raises(TypeError, match=rf"`config` must be a `SieveConfig`, got {type(config).__name__}"):
        pruner.prune(config)
