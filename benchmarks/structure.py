"""Compare the removal of whole neurons and heads with low rank, alone and together, healed, at equal parameters.

    python benchmarks/structure.py                                           # three tasks: hours on two cores
    python benchmarks/structure.py --tasks movie --kept 0.25 --removed 0 1 --work-dir work --json rows.jsonl

The dense model is tuned with the default settings, and pruned to each kept fraction of the parameters of its blocks'
matrices. A part `--removed` of them goes by structure: 0 is ranks alone (`joint`, `energy`), 1 is structure alone, and
with other values the ranks do the rest. The neurons and groups of heads that are predicted to cost least per parameter
go first, and the last projection of what is left is fitted to its former output by least squares on the calibration
inputs. Large removals take several stages, each measured on what the one before has left. Every model is healed with
the default settings against the tuned model, for `--steps` at that one size, with adapters of all its matrices, factors
or dense. There are no label offsets, and the test split decides nothing.

Prints the score, paired differences to the dense model, the tuned one and ranks alone at this size and those before,
agreement with the tuned model and KL from it, the heads and neurons of each block, and the speed of all models so
far, which take turns. `--work-dir` keeps finished stages, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench import (
    HEALING,
    Adapters,
    Part,
    Trainer,
    allocate_ranks,
    append_json,
    apply_ranks,
    calibrate,
    choose_source,
    content_key,
    decode_speeds,
    describe,
    find_targets,
    machine_name,
    make_lessons,
    make_parser,
    prepare_run,
    score_stored,
    stored_layer,
    train_dense,
    training_only,
)
from defaults import add_task_options, read_tasks
from structure.units import (
    circuit,
    count_parameters,
    count_units,
    measure_units,
    projections,
    remove_units,
    set_weights,
)

from optimum_sieve import Evaluation, FactorizedLinear, HealConfig, SieveConfig, SievePruner, Task, TuneConfig, compare


if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

# Tokens of a prefill, and in the cache where multiply-adds are counted.
CONTEXT = 128
# Least part of the parameters that a stage of the removal keeps of what the one before has left.
STAGE = 0.7


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_task_options(parser, tasks=["movie", "uci-amazon", "snips"], rows=[256, 16, 600])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.25, 0.45])
    parser.add_argument("--removed", type=float, nargs="+", default=[0.0, 1.0, 0.15], help="part that structure takes")
    parser.add_argument("--steps", type=int, default=HealConfig.steps, help="healing steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, help="keeps finished stages")
    return parser.parse_args(words)


class Bench:
    """One task and its tuned model."""

    def __init__(self, arguments: argparse.Namespace, name: str, task: Task) -> None:
        model, gguf_file = arguments.model, None
        if model is None:
            model, _, gguf_file = choose_source(None, None)
        pruner = SievePruner.from_pretrained(model, task=task, dtype="float32", gguf_file=gguf_file)
        training: dict[str, Any] = {"heal": HealConfig(steps=arguments.steps), "tune": TuneConfig()}
        config = SieveConfig(tolerance=0.02, label_offsets="none", seed=arguments.seed, **training)
        work = None if arguments.work_dir is None else arguments.work_dir / f"{name}-{arguments.seed}"
        given = (pruner.model, pruner.tokenizer, pruner.tasks, config)
        run = prepare_run(*given, work_dir=work, study_storage=None, progress=False)
        self.arguments, self.name = arguments, name
        self.dense = self.score(run)
        adapters, _, key = train_dense(run)
        adapters.merge()
        self.run = replace(run, model_key=content_key(model=run.model_key, tuned=key))
        self.tuned = self.score(self.run)
        self.lessons, self.total = make_lessons(self.run), count_parameters(run.model)
        # Of ranks alone, all sizes so far: another size may take the same time.
        self.references, self.models = {"dense": self.dense, "tuned": self.tuned}, {"dense": self.run.model}
        text, row = describe(self.dense, self.tuned)
        print(f"{name}, {self.dense.count} test rows, dense {self.dense.score:.3f}; tuned: {text}", flush=True)
        self.write(dense=self.dense.score, dense_error=self.dense.standard_error, tuned=row)

    def score(self, run: Any, key: str | None = None) -> Evaluation:
        """Score a model on the test split, or read the evaluation from the work directory."""
        return score_stored(run, run.tasks[0], "test", label="model", pruned=key)

    def write(self, **row: Any) -> None:
        """Append a row to the JSON lines."""
        machine = {"machine": machine_name(), "load": os.getloadavg()[0]}
        append_json(self.arguments.json, {"task": self.name, "seed": self.arguments.seed, **row, **machine})

    def compare_size(self, kept: float) -> None:
        """Prune to a size in each way, score the models, and time them together with those of the sizes before."""
        for removed in self.arguments.removed:
            start = time.perf_counter()
            run = self.prune(kept, removed)
            found = self.score(run, run.model_key)
            if removed == 0:
                self.references[f"ranks at {kept:g}"] = found
            self.report(kept, removed, run, found, time.perf_counter() - start)
            self.models[f"kept {kept:g}, {removed:.0%} by structure"] = run.model
        decode, prefill = decode_speeds(self.models, self.run.tokenizer), prefill_seconds(self.models)
        for name in self.models:
            print(f"    {name}: {decode[name][0]:.1f} tokens/s (spread {decode[name][1]:.2f}), prefill of {CONTEXT} "
                  f"{1e3 * prefill[name]:.0f} ms", flush=True)  # fmt: skip
        self.write(kept=kept, decode=decode, prefill=prefill)

    def prune(self, kept: float, removed: float) -> Any:
        """Return the run of a pruned and healed model."""
        run = self.reduced(kept if removed == 1 else 1 - removed)
        if removed < 1:
            bases = calibrate(run)
            ranks = allocate_ranks(run, bases, kept * self.total / count_parameters(run.model))
            apply_ranks(run.model, bases, ranks, storage="factors")
        key = content_key(model=run.model_key, kept=kept, removed=removed, steps=run.config.heal.steps)
        self.heal(run, key)
        for name, layer in list(run.model.named_modules()):
            if isinstance(layer, FactorizedLinear):
                run.model.set_submodule(name, stored_layer(layer, run.config.storage))
        return replace(run, model_key=key)

    def reduced(self, size: float) -> Any:
        """Return the run of a copy of the model whose blocks keep a part of their parameters, by structure alone.

        The sizes of the command line are stops on one way, so that smaller ones go on from larger ones.
        """
        kept, removed = self.arguments.kept, self.arguments.removed
        stops = {1 - each for each in removed if each < 1} | (set(kept) if 1 in removed else set())
        run, before = replace(self.run, model=copy.deepcopy(self.run.model)), 1.0
        for stop in sorted((each for each in stops if size <= each < 1), reverse=True):
            stages = math.ceil(math.log(stop / before) / math.log(STAGE))
            for number in range(1, stages + 1):
                run = self.reduce(run, before * (stop / before) ** (number / stages))
            before = stop
        return run

    def reduce(self, run: Any, size: float) -> Any:
        """Take a stage of the removal, in place, or read it from the work directory; return the run of what is left."""
        key = content_key(before=run.model_key, size=size)
        stored = run.work.load("structure", key)
        if stored is None:
            remove_units(run.model, int(size * self.total), *measure_units(run))
            weights = {target.name: run.model.get_submodule(target.name).weight for target in find_targets(run.model)}
            run.work.save("structure", key, weights)
        else:
            for end in count_units(run.model):
                names = projections(run.model, end)
                set_weights(run.model, end, {name: stored[name] for name in names if name in stored})
        return replace(run, model_key=key, targets=find_targets(run.model))

    def heal(self, run: Any, key: str) -> None:
        """Train adapters of all matrices against the tuned model, and merge them."""
        config, model, seed = run.config.heal, run.model, run.config.seed
        names = [target.name for target in find_targets(model) if target.num_parameters]
        adapters = Adapters(model, names, config.adapter_rank, seed)
        parts = [
            Part(
                examples=lesson.examples, loss=partial(lesson.losses, gold_weight=config.gold_weight),
                by_candidate=lesson.teacher.by_candidate, weight=lesson.weight, copies=lesson.copies,
            )
            for lesson in self.lessons
        ]  # fmt: skip
        trainer = Trainer(
            HEALING, model, run.tokenizer, parts, adapters.parameters, config, rows_per_pass=config.rows_per_pass,
            seed=seed, work=run.work, key=content_key(pruned=key, settings=config.to_dict(), seed=seed),
        )  # fmt: skip
        if not trainer.load_result():
            with training_only(model, adapters.parameters, checkpointing=False), adapters.attached():
                trainer.train(progress=False)
        adapters.merge()

    def report(self, kept: float, removed: float, run: Any, found: Evaluation, seconds: float) -> None:
        """Print a model's row, and append it to the JSON lines."""
        against = {name: compare(reference, found) for name, reference in self.references.items()}
        differences = ", ".join(f"{x.mean:+.3f} +- {x.standard_error:.3f} to {name}" for name, x in against.items())
        units, parameters = circuit(run.model), count_parameters(run.model)
        # A pivoted layer has as many multiply-adds per token as parameters.
        multiply_adds = parameters + 2 * CONTEXT * sum(units["heads"]) * run.model.config.head_dim
        print(f"{self.name}, kept {kept:.2f}, {removed:.0%} by structure: score {found.score:.3f} +- "
              f"{found.standard_error:.3f}, {differences}, agreement {against['tuned'].agreement:.3f}, KL "
              f"{against['tuned'].kl:.4f}, {parameters:,} parameters, {multiply_adds:,} multiply-adds, {seconds:.0f} s"
              f"\n    heads {units['heads']}\n    neurons {units['neurons']}", flush=True)  # fmt: skip
        self.write(
            kept=kept, removed=removed, score=found.score, score_error=found.standard_error,
            against={name: each.to_dict() for name, each in against.items()}, parameters=parameters,
            multiply_adds=multiply_adds, seconds=seconds, steps=run.config.heal.steps, **units,
        )  # fmt: skip


def prefill_seconds(models: Mapping[str, Any], rounds: int = 8) -> dict[str, float]:
    """Return the median time of a forward pass of `CONTEXT` tokens of each model; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            ids = torch.arange(CONTEXT)[None] % model.config.vocab_size
            start = time.perf_counter()
            with torch.inference_mode():
                model(ids, use_cache=False, logits_to_keep=1)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Compare at every size of every task."""
    arguments = parse_arguments(words)
    for name, task in read_tasks(arguments, arguments.seed).items():
        bench = Bench(arguments, name, task)
        for kept in arguments.kept:
            bench.compare_size(kept)


if __name__ == "__main__":
    main()
