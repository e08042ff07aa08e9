"""The model, the task and cached passes over the calibration examples, for `benchmarks/moments.py`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moment_tokens import Found, Loss, Visitor, visit
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, evaluate
from optimum_sieve.inputs import input_format
from optimum_sieve.loading import load_model
from optimum_sieve.losses import calibration_loss
from optimum_sieve.scoring import input_device, make_batches
from optimum_sieve.setting import Setting, TaskSetting
from optimum_sieve.targets import find_targets, linear_weight
from optimum_sieve.workdir import WorkDir, content_key, model_fingerprint, unflatten


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from optimum_sieve.tasks import Example


class Passes:
    """A model, a task, and what visitors found in passes over its calibration examples, kept in the work directory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, task, gguf_file = choose_source(arguments.model, arguments.task)
        given = Task.from_file(task)
        spec = given.spec
        most = max(arguments.examples, *arguments.sizes)
        limit = {**spec.get("limit", {}), "calibration": most}
        self.task = Task.from_dict({**spec, "limit": limit}, Path(task).parent)
        self.model, self.tokenizer, _ = load_model(model, dtype="float32", gguf_file=gguf_file)
        self.examples = self.task.examples("calibration", self.tokenizer)
        if len(self.examples) < most:
            raise SystemExit(
                f"--examples and --sizes must be at most {len(self.examples)}, the rows of the calibration split, got "
                f"{most}. Name smaller ones."
            )
        self.test = self.task.examples("test", self.tokenizer)[: arguments.test]
        self.targets = find_targets(self.model)
        # Of the dense model, also while its layers are pruned.
        self.weights = {target.name: linear_weight(self.model.get_submodule(target.name)) for target in self.targets}
        task_setting = TaskSetting(
            name=self.task.name,
            metric=self.task.metric,
            # The first examples are the same whatever the limit.
            fingerprint=content_key(model=model_fingerprint(self.model), task=given.fingerprint()),
        )
        self.setting = Setting(
            model=self.model,
            tokenizer=self.tokenizer,
            config=SieveConfig(tolerance=0.0, rank_multiple=arguments.rank_multiple),
            tasks=(task_setting,),
            targets=self.targets,
            work=WorkDir(arguments.work_dir) if arguments.work_dir else WorkDir.temporary(),
            progress=False,
        )
        self.fisher, _ = calibration_loss("fisher", self.examples)

    def found(
        self,
        wanted: str,
        name: str,
        make_visitors: Callable[[], Mapping[str, Visitor]],
        start: int,
        stop: int,
        *,
        loss: Loss | None = None,
        layers: Sequence[str] = (),
        **key: object,
    ) -> Found:
        """Return what a visitor found in a pass over calibration examples `start` to `stop`, or once has found.

        Args:
            wanted (`str`): The visitor.
            name (`str`): The pass.
            make_visitors (`Callable`): Makes all visitors of the pass, by name.
            start (`int`): First example.
            stop (`int`): Behind the last one.
            loss (`Callable`, *optional*): What gradients are taken of; `None`: the Fisher root at the answer.
            layers (`Sequence[str]`): Layers watched; none: all.
            key (`object`): What else the findings depend on.
        """
        part = partial(self.setting.key, name=name, examples=[start, stop], layers=list(layers), **key)
        kept = self.setting.work.load("moments", part(visitor=wanted))
        if kept is not None:
            return unflatten(kept)
        begin = time.perf_counter()
        visitors = make_visitors()
        self._look(visitors.values(), self.examples[start:stop], loss or self.fisher, layers or list(self.weights))
        print(f"<!-- {name}, {stop - start} examples: {time.perf_counter() - begin:.0f} s -->", flush=True)
        for own, visitor in visitors.items():
            layered = visitor.found()
            flat = {f"{layer}|{field}": tensor for layer in layered for field, tensor in layered[layer].items()}
            self.setting.work.save("moments", part(visitor=own), flat)
        return visitors[wanted].found()

    def _look(
        self, visitors: Iterable[Visitor], examples: Sequence[Example], loss: Loss, layers: Sequence[str]
    ) -> None:
        device, size = input_device(self.model), self.setting.config.batch_size
        batches = make_batches(examples, self.tokenizer, batch_size=size, inputs=input_format(self.model))
        weights = {layer: self.weights[layer] for layer in layers}
        visit(self.model, weights, (batch.to(device) for batch in batches), loss, list(visitors))

    def score(self, hold: Callable[[], AbstractContextManager[object]], **key: object) -> Evaluation:
        """Score the model in the context that `hold` makes on the test examples, or take the score that is kept."""
        assert self.setting.work.path is not None
        name = self.setting.key("rank_multiple", test=len(self.test), **key)
        path = self.setting.work.path / f"evaluation-{name}.safetensors"
        if path.exists():
            return Evaluation.load(path)
        with hold():
            found = evaluate(
                self.model, self.test, self.tokenizer, metric=self.task.metric, batch_size=32, progress=False
            )
        found.save(path)
        return found
