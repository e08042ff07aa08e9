"""Saved models that were damaged or altered, loaded in every way: an error, or the very same model."""

from __future__ import annotations

import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fault_world import COMMANDS, differing, result
from findings import DIFFERENT, LOST, OVER, TRACEBACK, Trial
from fork_server import Run


if TYPE_CHECKING:
    from collections.abc import Callable

    from fault_world import World
    from fork_server import Ended

BASES = ("factors", "pivoted", "mixed", "sharded", "half", "gpt2")
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
# Values that a person or a program could put into JSON.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, -1e308, 0.5, float("nan"), float("inf")),
    *("", "evil", "sieve", "llama", "\ud800", "../x", "x" * 5000, [], [1], {}, {"a": 1}, [[[[]]]], [None] * 50),
)


def build(directory: str) -> None:
    """Write a pruned model of each of `BASES`. Runs in a child of the fork server."""
    import torch
    from tiny_models import make_pruned_model, make_tiny_model
    from toy import VOCABULARY, make_tokenizer

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.modeling.fingerprint import DIGEST_KEY, weights_digest

    make_tiny_model("llama", vocab_size=len(VOCABULARY)).save_pretrained(Path(directory) / "dense")
    make_tokenizer().save_pretrained(Path(directory) / "dense")
    for name in BASES:
        architecture = "gpt2" if name == "gpt2" else "llama"
        storage = name if name in ("factors", "pivoted") else None
        model = make_pruned_model(architecture, storage=storage, vocab_size=len(VOCABULARY))
        model.config.sieve["settings"] = SieveConfig(pruning_ratio=0.5, heal=None, tune=None).to_dict()
        if name == "half":
            model = model.to(torch.bfloat16)
            # Saving drops the results of other weights, and casting made others.
            model.config.sieve["results"][DIGEST_KEY] = weights_digest(model)
        model.save_pretrained(Path(directory) / name, max_shard_size="10KB" if name == "sharded" else "5GB")
        make_tokenizer().save_pretrained(Path(directory) / name)


def load(directory: str, answer: str) -> None:
    """Load a model with each Auto class and write the bits of its outputs or the error. Runs in a child."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    found = {}
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            model = auto.from_pretrained(directory, dtype="auto").eval()
            with torch.no_grad():
                output = model(torch.arange(3, 19).reshape(2, 8))
            tensor = output.logits if "logits" in output else output.last_hidden_state
            found[auto.__name__] = ["bits", tensor.float().contiguous().numpy().tobytes().hex()]
        except Exception as error:
            found[auto.__name__] = ["error", f"{type(error).__name__}: {error}"]
    Path(answer).write_text(json.dumps(found))


@dataclass(frozen=True)
class Mutation:
    """A change of a saved model.

    Attributes:
        name: The kind in the table.
        change: Changes a directory and says what it did.
        noticed: Who must notice: `all`, also plain loading; our `commands`, which compare the weights with their
            digest; or `nobody`, as a valid setting of the base architecture is a user's to change.
    """

    name: str
    change: Callable[[Path, random.Random], str]
    noticed: Literal["all", "commands", "nobody"] = "all"


def mutation_trial(world: World, number: int) -> Trial:
    """Alter a saved model and load it with transformers and with our commands."""
    rng = random.Random(number)
    mutation = MUTATIONS[number % len(MUTATIONS)]
    base = world.root / "bases" / BASES[(number // len(MUTATIONS) + number) % len(BASES)]
    if not base.exists():
        base.parent.mkdir(exist_ok=True)
        (ended,) = world.server.run(Run([str(base.parent)], str(base.parent), call="mutation_trials:build"))
        assert ended.status == 0, ended.err
    place = world.trial(f"mutation {number}")
    model = place / "model"
    shutil.copytree(base, model)
    trial = Trial(f"altered {mutation.name}", "")
    trial.what = f"trial {number}, {base.name}: {mutation.change(model, rng)}"
    original, found = _load(world, trial, base, place), _load(world, trial, model, place)
    for auto, (kind, value) in found.items():
        if kind == "bits" and value != original[auto][1]:
            trial.unnoticed = mutation.noticed != "all"
            trial.require(trial.unnoticed, DIFFERENT, f"{auto} loads another model")
    _run_commands(world, trial, base, model, place, compared=mutation.noticed != "nobody")
    return trial


def work_file_trial(world: World, number: int) -> Trial:
    """Alter a file of the work directory after a run, and run again: an error that names it, or the same result."""
    rng = random.Random(number)
    command = COMMANDS[("prune, work directory", "heal, work directory", "search")[number % 3]]
    expected = world.undisturbed(command.name)
    place = world.trial(f"work file {number}")
    (ended,) = world.server.run(world.run(command, place))
    assert ended.status == 0, ended.err
    shutil.rmtree(place / "out", ignore_errors=True)
    path = rng.choice(sorted(path for path in (place / "work").iterdir() if path.suffix == ".safetensors"))
    if rng.random() < 0.7:
        what = _flip(path, rng, 0, 2**62)
    else:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        what = f"{path.name} cut to {path.stat().st_size} bytes"
    trial = Trial("altered work directory", f"trial {number}, {command.name}: {what}")
    (ended,) = world.server.run(world.run(command, place))
    trial.judge_end(ended, 0, 1)
    if ended.status == 0:
        found = result(command, place)
        trial.require(found == expected, DIFFERENT, f"another result: {differing(expected, found)}")
    else:
        trial.require(path.name in ended.error, DIFFERENT, f"the error does not name the file: {ended.error}")
    return trial


def _load(world: World, trial: Trial, model: Path, place: Path) -> dict[str, list[str]]:
    answer = place / "answer.json"
    answer.unlink(missing_ok=True)
    (ended,) = world.server.run(Run([str(model), str(answer)], str(place), call="mutation_trials:load"))
    trial.require(not ended.over_limit, OVER, f"loading took {ended.seconds:.0f} s")
    if not answer.exists():
        trial.add(TRACEBACK, f"loading ended the process with status {ended.status}: {ended.err[-800:]}")
        return {}
    found: dict[str, list[str]] = json.loads(answer.read_text())
    return found


def _run_commands(world: World, trial: Trial, base: Path, model: Path, place: Path, *, compared: bool) -> None:
    """Score, export and heal the altered model: one error, or what the original gives."""
    for name in _COMMANDS:
        if name == "heal" and base.name not in _HEALED:
            continue
        if (world.root, base, name) not in _known:
            out = world.trial(f"original {base.name} {name}") / "out"
            (ended,) = world.server.run(_command(world, name, base, out))
            assert ended.status == 0, f"{name} of {base.name}: {ended.err[-1500:]}"
            _known[world.root, base, name] = _written(out)
        out = place / name
        (ended,) = world.server.run(_command(world, name, model, out))
        _judge(trial, name, ended, _written(out), _known[world.root, base, name] if compared else None)


def _command(world: World, name: str, model: Path, out: Path) -> Run:
    words = [word.format(model=model, out=out, root=world.root) for word in _COMMANDS[name]]
    temporary = out.parent / "temporary"
    environment = {"TMPDIR": str(temporary), "HF_HOME": str(world.root / "hub")}
    return Run(["sieve", name, *words], str(out.parent), environment=environment)


# What the commands make of the original models.
_known: dict[tuple[Path, Path, str], Any] = {}
# Models whose dense model is at hand.
_HEALED = ("factors", "pivoted", "mixed", "sharded")


def _judge(trial: Trial, name: str, ended: Ended, found: Any, original: Any) -> None:
    trial.require(not ended.over_limit, OVER, f"{name}: {ended.seconds:.0f} s")
    trial.require(not ended.traceback, TRACEBACK, f"{name}: {ended.err[-1500:]}")
    if ended.status == 0:
        trial.require(original in (None, found), DIFFERENT, f"{name} gives something else")
    else:
        trial.require(ended.status == 1, DIFFERENT, f"{name}: exit status {ended.status}")
        trial.require(ended.error.startswith("error: "), TRACEBACK, f"{name}: no error line: {ended.err[-600:]}")
        trial.require(len(ended.error) < 2500, DIFFERENT, f"{name}: an error of {len(ended.error)} characters")
        trial.require(not found, LOST, f"{name}: a result in spite of an error")


_TASK = ["--task", "{root}/world/task.json", "--device", "cpu"]
_COMMANDS = {
    "evaluate": ["--model", "{model}", *_TASK, "--json", "{out}"],
    "export": ["--model", "{model}", "--dense", "--output", "{out}"],
    "heal": ["--model", "{model}", "--dense", "{root}/bases/dense", *_TASK, "--heal-steps", "2", "--output", "{out}"],
}


def _written(out: Path) -> Any:
    """Return what a command wrote, without times and sizes of files; empty if it wrote nothing."""
    if out.is_file():
        report = json.loads(out.read_text())
        return {key: report[key] for key in ("pruned", "dense", "count") if key in report}
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def _flip(path: Path, rng: random.Random, first: int, last: int) -> str:
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(first, min(last, len(content))), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def _weight_file(model: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(model.glob("*.safetensors")))


def _header_end(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def flip_header(model: Path, rng: random.Random) -> str:
    """Flip a bit of the header of a weight file."""
    path = _weight_file(model, rng)
    return _flip(path, rng, 0, _header_end(path))


def flip_data(model: Path, rng: random.Random) -> str:
    """Flip a bit of the values in a weight file."""
    path = _weight_file(model, rng)
    return _flip(path, rng, _header_end(path), 2**62)


def truncate(model: Path, rng: random.Random) -> str:
    """Cut a file off, or lengthen it."""
    path = rng.choice([_weight_file(model, rng), model / "config.json", model / "tokenizer.json"])
    content = path.read_bytes()
    if rng.random() < 0.2:
        path.write_bytes(content + bytes(rng.randrange(1, 100)))
        return f"{path.name} made longer"
    size = rng.randrange(len(content))
    path.write_bytes(content[:size])
    return f"{path.name} cut to {size} bytes"


def remove_file(model: Path, rng: random.Random) -> str:
    """Remove or empty a file, or put a directory in its place."""
    path = rng.choice(sorted(model.iterdir()))
    path.unlink()
    way = rng.choice(("removed", "emptied", "made a directory"))
    if way == "emptied":
        path.write_bytes(b"")
    elif way == "made a directory":
        path.mkdir()
    return f"{path.name} {way}"


def _rewrite(path: Path, change: Callable[[dict[str, Any]], str]) -> str:
    """Change the header of a weight file as JSON."""
    content, end = path.read_bytes(), _header_end(path)
    header = json.loads(content[8:end])
    what = change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[end:])
    return f"{path.name}: {what}"


def _tensors(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def swap_shape(model: Path, rng: random.Random) -> str:
    """Give a matrix another shape with as many values."""

    def change(header: dict[str, Any]) -> str:
        names = [name for name in _tensors(header) if len(set(header[name]["shape"])) > 1] or _tensors(header)
        name = rng.choice(names)
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape]]) if len(shape) < 2 else shape[::-1]
        return f"{name} {shape} -> {header[name]['shape']}"

    return _rewrite(_weight_file(model, rng), change)


def other_dtype(model: Path, rng: random.Random) -> str:
    """Call the values of a tensor by the name of another dtype of the same size."""

    def change(header: dict[str, Any]) -> str:
        name = rng.choice(_tensors(header))
        dtype = header[name]["dtype"]
        # Another floating-point type of the size is another value, as a flipped bit is.
        others = [other for other, size in _SIZES.items() if size == _SIZES[dtype] and "F" not in other]
        header[name]["dtype"] = rng.choice([other for other in others if other != dtype])
        return f"{name} {dtype} -> {header[name]['dtype']}"

    return _rewrite(_weight_file(model, rng), change)


def rename_tensor(model: Path, rng: random.Random) -> str:
    """Rename, remove or repeat a tensor."""

    def change(header: dict[str, Any]) -> str:
        name = rng.choice(_tensors(header))
        way = rng.choice(("renamed", "removed", "added"))
        other = rng.choice((name + "x", name.replace("layers.0", "layers.9"), "layers.0." + name, "model." + name))
        if way == "added":
            header[other] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        else:
            entry = header.pop(name)
            if way == "renamed":
                header[other] = entry
        return f"{name} {way} {other}"

    return _rewrite(_weight_file(model, rng), change)


def exchange_tensors(model: Path, rng: random.Random) -> str:
    """Exchange the values of two tensors of one shape, or read those of one as another floating-point type."""

    def change(header: dict[str, Any]) -> str:
        names = _tensors(header)
        pairs = [
            (one, other)
            for one in names
            for other in names
            if one < other and all(header[one][key] == header[other][key] for key in ("shape", "dtype"))
        ]
        half = [name for name in names if header[name]["dtype"] == "BF16"]
        if half and rng.random() < 0.5:
            name = rng.choice(half)
            header[name]["dtype"] = "F16"
            return f"{name} BF16 -> F16"
        if not pairs:
            return "nothing"
        one, other = rng.choice(pairs)
        header[one], header[other] = header[other], header[one]
        return f"{one} and {other} exchanged"

    return _rewrite(_weight_file(model, rng), change)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [inner for key, part in items for inner in _paths(part, (*path, key))]


def _alter(value: Any, rng: random.Random, within: tuple[Any, ...] = ()) -> str:
    path = rng.choice([path for path in _paths(value) if path[: len(within)] == within and path != within])
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    old = owner[path[-1]]
    if rng.random() < 0.15 and isinstance(owner, dict):
        del owner[path[-1]]
        return f"{path} removed"
    near = [old + 1, old - 1, old * 2, -old] if isinstance(old, int | float) and not isinstance(old, bool) else []
    new = rng.choice([*near, *near, *_VALUES])
    owner[path[-1]] = new
    return ascii(f"{path} {str(old)[:60]} -> {str(new)[:60]}")


def _alter_config(model: Path, rng: random.Random, within: tuple[Any, ...] = (), *, base: bool = False) -> str:
    path = model / "config.json"
    config = json.loads(path.read_text())
    block = config.pop("sieve") if base else None
    what = _alter(config, rng, within)
    if base:
        config["sieve"] = block
    path.write_text(json.dumps(config))
    return what


def alter_sieve_block(model: Path, rng: random.Random) -> str:
    """Change a value in the `sieve` block of config.json."""
    return _alter_config(model, rng, ("sieve",))


def alter_rank_pattern(model: Path, rng: random.Random) -> str:
    """Change a value in the rank pattern."""
    return _alter_config(model, rng, ("sieve", "rank_pattern"))


def alter_settings(model: Path, rng: random.Random) -> str:
    """Change a value of the base configuration."""
    return _alter_config(model, rng, base=True)


def alter_text(model: Path, rng: random.Random) -> str:
    """Flip a bit of a JSON file."""
    path = rng.choice(sorted(model.glob("*.json")))
    return _flip(path, rng, 0, 2**62)


def alter_row_order(model: Path, rng: random.Random) -> str:
    """Give two output rows of a pivoted layer the same row of the factors, or one that does not exist."""
    from safetensors.numpy import load_file, save_file

    paths = sorted(model.glob("*.safetensors"))
    for path in rng.sample(paths, len(paths)):
        tensors = load_file(path) if "BF16" not in path.read_bytes()[8 : _header_end(path)].decode() else {}
        names = sorted(name for name in tensors if name.endswith("row_order"))
        if names:
            name = rng.choice(names)
            order = tensors[name].copy()
            order[rng.randrange(len(order))] = rng.choice([order[0], order[-1], -1, len(order), 2**30])
            save_file({**tensors, name: order}, path, metadata={"format": "pt"})
            return f"{name} of {path.name}"
    return "nothing"


MUTATIONS = (
    Mutation("header, one bit", flip_header),
    Mutation("size of a file", truncate),
    Mutation("set of files", remove_file),
    Mutation("shape", swap_shape),
    Mutation("dtype", other_dtype),
    Mutation("tensor names", rename_tensor),
    Mutation("row order", alter_row_order),
    Mutation("`sieve` block", alter_sieve_block),
    Mutation("rank pattern", alter_rank_pattern),
    Mutation("text of a JSON file, one bit", alter_text, noticed="nobody"),
    Mutation("base configuration", alter_settings, noticed="nobody"),
    Mutation("weights, one bit", flip_data, noticed="commands"),
    Mutation("weights, exchanged or read as another type", exchange_tensors, noticed="commands"),
)
