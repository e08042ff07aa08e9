"""A dense model, a model pruned from it, an adapter and a task, all tiny, and the commands that run on them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import ForkServer, Run


_SMALL = ["--pruning-ratio", "0.5", "--rank-multiple", "2", "--written-prompts", "0"]
_SOURCE = ["--model", "{world}/dense", "--task", "{world}/task.json", "--device", "cpu"]
_HEAL = ["--model", "{world}/pruned", "--dense", "{world}/dense", "--task", "{world}/task.json", "--device", "cpu"]
_OUT, _WORK = ["--output", "{trial}/{out}"], ["--work-dir", "{trial}/work"]


@dataclass(frozen=True)
class Command:
    """A command line and where its result is: the output directory or files of the work directory."""

    name: str
    words: list[str]
    result: str = "out"

    def line(self, world: Path, trial: Path, *more: str, out: str = "out") -> list[str]:
        """Return the words after `optimum-cli`."""
        return ["sieve", *(word.format(world=world, trial=trial, out=out) for word in self.words), *more]

    @property
    def has_output(self) -> bool:
        """Whether it writes a directory."""
        return self.result == "out"


COMMANDS = {
    command.name: command
    for command in (
        Command("prune", ["prune", *_SOURCE, *_SMALL, "--heal-steps", "6", *_OUT]),
        Command("prune, work directory", ["prune", *_SOURCE, *_SMALL, "--heal-steps", "6", *_OUT, *_WORK]),
        Command(
            "search",
            ["search", *_SOURCE, *_SMALL, "--rounds", "1", "--population-size", "4", "--generations", "2", *_WORK],
            result="work/search-*.json",
        ),
        Command("heal", ["heal", *_HEAL, "--heal-steps", "12", *_OUT]),
        Command("heal, work directory", ["heal", *_HEAL, "--heal-steps", "12", *_OUT, *_WORK]),
        Command("export", ["export", "--model", "{world}/pruned", "--dense", *_OUT]),
        Command("merge", ["merge", "--model", "{world}/pruned", "--adapter", "{world}/adapter", *_OUT]),
    )
}


def build(directory: str) -> None:
    """Write `dense`, `adapter`, `task.json` and its rows to the directory. Runs in a child of the fork server."""
    import peft
    import torch
    from toy import make_model, make_tokenizer, parity_rows, write_task

    root = Path(directory)
    make_model().save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    write_task(root, parity_rows(160))
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(make_model(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(root / "adapter")


@dataclass(frozen=True)
class World:
    """The inputs, what each command makes of them undisturbed, how long that takes and in how many changes of files.

    `growths` counts the changes that need room on the disk.
    """

    root: Path
    server: ForkServer
    inputs: dict[str, str]
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    work_files: dict[str, set[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    growths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, server: ForkServer) -> World:
        """Make the inputs below `root`."""
        inputs = root / "world"
        inputs.mkdir(parents=True)
        (ended,) = server.run(Run([str(inputs)], str(root), call="fault_world:build"))
        assert ended.status == 0, ended.err
        words = ["sieve", "prune", *_SOURCE, *_SMALL, "--no-heal", "--output", "{world}/pruned"]
        (ended,) = server.run(Run([word.format(world=inputs) for word in words], str(root)))
        assert ended.status == 0, ended.err
        return cls(root, server, tree(inputs))

    def undisturbed(self, name: str) -> dict[str, str]:
        """Return what a command makes undisturbed; the first call runs it twice, and requires the same from both."""
        if name not in self.results:
            command = COMMANDS[name]
            found = []
            for kind in ("first", "second"):
                trial = self.trial(f"undisturbed {name} {kind}")
                log = trial / "changes"
                fault = {"kind": "count", "below": [str(trial)], "log": str(log)} if kind == "second" else None
                (ended,) = self.server.run(self.run(command, trial, fault=fault))
                assert not ended.traceback, ended.err
                assert ended.status == 0, f"{name}: {ended.err}"
                found.append(result(command, trial))
                if kind == "first":
                    self.seconds[name] = ended.seconds
                else:
                    changes = log.read_text().splitlines()
                    self.changes[name] = len(changes)
                    self.growths[name] = sum(change.startswith("grows ") for change in changes)
                self.work_files[name] = {path.name for path in (trial / "work").glob("*")}
                assert stray(trial) == [], f"{name} leaves {stray(trial)}"
                shutil.rmtree(trial)
            assert found[0], f"{name} has no result"
            assert found[0] == found[1], f"{name} is not repeatable: {differing(*found)}"
            self.results[name] = found[0]
        return self.results[name]

    def trial(self, name: str) -> Path:
        """Make an empty directory with one for temporary files."""
        path = self.root / re.sub(r"\W+", "-", name)
        shutil.rmtree(path, ignore_errors=True)
        (path / "temporary").mkdir(parents=True)
        return path

    def run(self, command: Command, trial: Path, *more: str, out: str = "out", **options: Any) -> Run:
        """Return a run of a command in a trial's directory."""
        environment = {"TMPDIR": str(trial / "temporary"), "HF_HOME": str(self.root / "hub")}
        words = command.line(self.root / "world", trial, *more, out=out)
        return Run(words, str(trial), environment=environment, **options)

    def old_output(self, trial: Path) -> dict[str, str]:
        """Put an earlier model into the output directory; return its files."""
        shutil.copytree(self.root / "world" / "pruned", trial / "out")
        return tree(trial / "out")

    def inputs_lost(self) -> list[str]:
        """Name the input files that are not as they were."""
        return differing(self.inputs, tree(self.root / "world"))


def tree(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a directory, without times."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(_timeless(path)).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def result(command: Command, trial: Path, out: str = "out") -> dict[str, str]:
    """Return what a command has made, as SHA-256 of files; empty if it has made nothing."""
    if command.has_output:
        return tree(trial / out)
    return {path.name: hashlib.sha256(_timeless(path)).hexdigest() for path in sorted(trial.glob(command.result))}


def stray(trial: Path) -> list[str]:
    """Name what is neither output, nor work directory, nor a trial's own."""
    known = {"out", "work", "temporary", "changes", "log.out", "log.err"}
    left = [path.name for path in trial.iterdir() if path.name not in known]
    # torch makes one of its own when it is imported.
    names = [path.name for path in (trial / "temporary").iterdir() if not path.name.startswith("torchinductor_")]
    temporary = [f"temporary/{name}" for name in names]
    hidden = [path.relative_to(trial).as_posix() for path in (trial / "work").rglob(".*")]
    return sorted([*left, *temporary, *hidden])


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Name the files that are not the same in both."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".json":
        # A file that was cut off is no JSON.
        with suppress(ValueError):
            return json.dumps(_without_times(json.loads(content))).encode()
    if path.suffix == ".html":
        # A resumed run has no time for stages that it took from the work directory.
        content = re.sub(rb"<h2>Time by stage</h2>.*?(?=<h2>)", b"", content, flags=re.DOTALL)
        return re.sub(rb"<b>([\d.]+ s|\d+ min \d+ s|\d+ h \d+ min)</b>", b"", content)
    return content


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if "seconds" not in key}
    return [_without_times(part) for part in value] if isinstance(value, list) else value
