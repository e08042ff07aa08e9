"""`SieveConfig`: every setting of a pruning run, its default and its rule. Does not import torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .heal import HealConfig
from .validate import check_choice, check_float, check_integer, check_known, check_task_weights, parse_bytes


PROJECTIONS = ("svd", "activation", "joint", "learned")
ALLOCATIONS = ("uniform", "energy", "genetic")
STORAGES = ("factors", "pivoted")
SEARCH_PRESETS = ("fast", "paper")
LOSSES = ("fisher", "labels", "answer")
VOCABULARIES = ("whole", "task")
LABEL_SOURCES = ("data", "model", "sampled")
WEIGHTINGS = ("norms", "balanced", "likelihood")


@dataclass(frozen=True, kw_only=True)
class SieveConfig:
    r"""Settings of one pruning run.

    Exactly one of `tolerance` and `pruning_ratio` says when to stop.

    Args:
        tolerance (`float`, *optional*):
            Accuracy loss accepted, in absolute points of the task's metric (0.02 = two points). The fewest parameters
            whose score on the selection split stays within it are searched.
        pruning_ratio (`float`, *optional*):
            Fraction of the target linears' parameters to remove, above 0 and below 1. No search is made.
        latency_target (`float`, *optional*):
            Time that the target linears may take for one row, as in decoding, as a fraction of what the dense ones
            take: above 0 and below 1. Every shape is measured at several ranks where the model lies, and the ranks keep
            within this beside the number of parameters. With `allocation="energy"`. `None`: time does not count.
        projection (`str`):
            `"joint"` (inputs and output gradients), `"activation"` (inputs alone, the optimum of
            \(\lVert WX - W'X \rVert\)), `"svd"` (the weight alone) or `"learned"` (adapters trained by Adam).
        allocation (`str`):
            `"energy"` (least predicted loss under the budget), `"uniform"` (same kept fraction everywhere) or
            `"genetic"` (a level for every matrix, searched on the task itself).
        storage (`str`):
            `"pivoted"` (fewest parameters) or `"factors"`.
        loss (`str`):
            What the output gradients are taken of: `"fisher"` (the model's own distribution over the task's candidate
            texts, or over the vocabulary at each token of a written answer; which one is right does not count),
            `"labels"` (cross-entropy of the gold candidate in that distribution) or `"answer"` (likelihood of the gold
            answer among all texts). A task without candidates takes `"answer"` for `"labels"`.
        label_source (`str`):
            Whose answers calibration takes for gold, where the loss uses them: `"data"` (the task's), `"model"` (the
            dense model's likeliest) or `"sampled"` (drawn from the dense model, for the Fisher information of all it
            might write). A task without answers needs one of the latter two, and is scored against the dense model's
            likeliest answers.
        prompt_weight (`float`):
            Of written answers and `loss="fisher"`: how much the prompt's own next tokens count in calibration, all
            together, beside the answer's tokens. 0: not at all, which leaves the moments of short answers ill-defined.
        rounds (`int`):
            How often moments are taken: first on the dense model, then on the model pruned part of the way with the
            factors so far, as far as the loss is hardly predicted to rise. `"svd"` and `"learned"` always take one.
        weighting (`str`):
            How tokens count in the joint moments of the rounds after the first: `"norms"` (as large as they are, as in
            the first round), `"likelihood"` (as unusual as they are under the moments of the round before) or
            `"balanced"` (the geometric mean of the two).
        target_modules (`tuple[str, ...]`, *optional*):
            `fnmatch` patterns of the linears to prune. `None`: every linear of the transformer blocks.
        exclude_modules (`tuple[str, ...]`):
            `fnmatch` patterns of linears that stay dense.
        rank_multiple (`int`):
            Ranks are multiples of this number.
        damping (`float`):
            Added to the diagonal of each moment, as a fraction of its mean.
        confidence (`float`):
            One-sided confidence, from 0.5 up to below 1, with which the paired score difference must lie within
            `tolerance`. 0.5 compares the bare means.
        search_steps (`int`):
            Steps of the binary search on the kept fraction, where the allocation is not `"genetic"`; each is one scored
            pass over the selection split.
        search_preset (`str`):
            Settings of the genetic search: `"fast"` (seeded by the energy allocation, screened by predicted loss,
            candidates dropped early) or `"paper"` (LLM-Sieve's plain algorithm, for comparison).
        population_size (`int`, *optional*):
            Candidates scored in each generation of the genetic search. `None`: the preset's.
        generations (`int`, *optional*):
            Generations of the genetic search at most. `None`: the preset's.
        search_fraction (`float`):
            Part of the selection split the genetic search scores candidates on; the rest confirms the result.
        batch_size (`int`):
            Rows per forward pass. An example takes one, or one for each label of several tokens; it is never divided.
        memory_limit (`int` or `str`, *optional*):
            Bytes that the model and everything made of it may take, such as `"24GB"` or `"700MB"`; of an accelerator if
            it computes there. Where the whole run would take more, one block of the model is held at a time, and the
            rest lies on disk. Python and its libraries come on top. `None`: no limit.
        seed (`int`):
            Seed of everything random.
        task_weights (`tuple[float, ...]`, *optional*):
            Of several tasks, how much each counts in the moments and in healing, in the tasks' order: as if so large a
            part of all examples were of that task. Only their ratios matter. `None`: all the same. Each task is held to
            the `tolerance` whatever its weight.
        vocabulary (`str`):
            `"whole"` (every token stays) or `"task"`: the tokenizer, the embeddings and the head keep the tokens of the
            calibration examples (and, without a `tolerance`, of the selection examples), the special ones, and those
            that any text can be cut into. Other words are cut into smaller pieces.
        vocabulary_size (`int`, *optional*):
            With `vocabulary="task"`, number of tokens to fill up to, with the tokenizer's first ones, where the task
            needs fewer. `None`: none more than it needs.
        heal ([`HealConfig`][optimum_sieve.config.heal.HealConfig], *optional*):
            Settings of healing, a short training of the factors that follows pruning. `None`: the factors stay as they
            were found. With a `tolerance`, every size tried is healed.

    Raises:
        ValueError: If a value breaks its rule; the message names the argument, the rule and the value.

    Example:

    ```python
    >>> SieveConfig(pruning_ratio=0.5).projection
    'joint'

    ```
    """

    tolerance: float | None = None
    pruning_ratio: float | None = None
    latency_target: float | None = None
    projection: str = "joint"
    allocation: str = "energy"
    storage: str = "pivoted"
    loss: str = "fisher"
    label_source: str = "data"
    prompt_weight: float = 1.0
    rounds: int = 2
    weighting: str = "balanced"
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    rank_multiple: int = 8
    damping: float = 1e-4
    confidence: float = 0.9
    search_steps: int = 6
    search_preset: str = "fast"
    population_size: int | None = None
    generations: int | None = None
    search_fraction: float = 0.25
    batch_size: int = 16
    memory_limit: str | int | None = None
    seed: int = 0
    task_weights: tuple[float, ...] | None = None
    vocabulary: str = "whole"
    vocabulary_size: int | None = None
    heal: HealConfig | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "task_weights", check_task_weights(self.task_weights))
        if (self.tolerance is None) == (self.pruning_ratio is None):
            raise ValueError(
                "Exactly one of `tolerance` (accuracy loss accepted, such as 0.02) and `pruning_ratio` (fraction of "
                f"parameters removed, such as 0.5) must be set, got tolerance={self.tolerance} and "
                f"pruning_ratio={self.pruning_ratio}."
            )
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, (low, high, includes_low) in _FLOAT_RANGES.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_float(name, getattr(self, name), low, high, includes_low, _HINTS.get(name, ""))
        for name, low in _LEAST_INTEGERS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_integer(name, getattr(self, name), low)
        object.__setattr__(self, "memory_limit", parse_bytes("memory_limit", self.memory_limit))
        self._check_allocation()
        self._check_healing()
        if self.vocabulary_size is not None and self.vocabulary != "task":
            raise ValueError(
                f"`vocabulary_size` must go with vocabulary='task', got {self.vocabulary_size} and vocabulary="
                f"{self.vocabulary!r}. Set vocabulary='task'."
            )

    def _check_allocation(self) -> None:
        if self.latency_target is not None and self.allocation != "energy":
            raise ValueError(
                f"`latency_target` must go with allocation='energy', got {self.latency_target} and allocation="
                f"{self.allocation!r}. Set allocation='energy', or leave it out."
            )
        if self.projection == "learned" and (self.allocation != "uniform" or self.pruning_ratio is None):
            raise ValueError(
                "`projection='learned'` must go with allocation='uniform' and a `pruning_ratio`, got "
                f"allocation={self.allocation!r} and pruning_ratio={self.pruning_ratio}. An adapter is trained for one "
                "rank, so there is no curve to allocate or search on."
            )

    def _check_healing(self) -> None:
        if self.heal is None:
            return
        if not isinstance(self.heal, HealConfig):
            raise TypeError(f"`heal` must be a HealConfig or None, got {self.heal!r}.")
        if self.allocation == "genetic" and (self.tolerance is not None or self.heal.rounds > 1):
            raise ValueError(
                "`heal` with a `tolerance` or several rounds must go with allocation='energy' or 'uniform', got "
                "'genetic', whose search does not heal its candidates. Set a `pruning_ratio` and one round of healing."
            )
        if self.projection == "learned" and self.heal.rounds > 1:
            raise ValueError(
                f"`heal.rounds` must be 1 with projection='learned', got {self.heal.rounds}: adapters are trained for "
                "one size."
            )

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` as a number of bytes."""
        return parse_bytes("memory_limit", self.memory_limit)

    @property
    def num_rounds(self) -> int:
        """Rounds of moments that are taken: `rounds`, or one where the projection takes no more."""
        return self.rounds if self.projection in ("joint", "activation") else 1

    def search_count(self, num_examples: int) -> int:
        """Return how many of the selection split's examples the genetic search scores candidates on.

        Raises:
            ValueError: If fewer than two would be left to the search or to the confirmation.
        """
        count = round(num_examples * self.search_fraction)
        if not 2 <= count <= num_examples - 2:
            raise ValueError(
                "`search_fraction` must leave at least 2 selection examples to the search and 2 to the confirmation, "
                f"got {self.search_fraction} of {num_examples}. Add rows to the selection split."
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, sorted by name."""
        values = dataclasses.asdict(self)
        values["heal"] = None if self.heal is None else self.heal.to_dict()
        return {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in sorted(values)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SieveConfig:
        """Make a configuration from `to_dict`'s output.

        Raises:
            ValueError: If a key is unknown (the message names the closest known one) or a value breaks its rule.
        """
        check_known(list(values), [field.name for field in dataclasses.fields(cls)], "SieveConfig")
        if isinstance(values.get("heal"), dict):
            values = {**values, "heal": HealConfig.from_dict(values["heal"])}
        return cls(**values)

    def to_json_file(self, path: str | Path) -> None:
        """Write the settings to `path` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides: Any) -> SieveConfig:
        """Read settings written by `to_json_file`; `overrides` take the place of what the file says.

        Raises:
            ValueError: If the file is not a JSON object of known settings.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"`{path}` must be a JSON file of SieveConfig settings: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"`{path}` must hold a JSON object of SieveConfig settings, got {type(values).__name__}.")
        return cls.from_dict({**values, **overrides})


_CHOICES = {
    "projection": PROJECTIONS,
    "allocation": ALLOCATIONS,
    "storage": STORAGES,
    "loss": LOSSES,
    "label_source": LABEL_SOURCES,
    "weighting": WEIGHTINGS,
    "search_preset": SEARCH_PRESETS,
    "vocabulary": VOCABULARIES,
}
# name: (low, high, whether low itself is allowed); high itself never is.
_FLOAT_RANGES = {
    "tolerance": (0.0, 1.0, True),
    "pruning_ratio": (0.0, 1.0, False),
    "latency_target": (0.0, 1.0, False),
    "prompt_weight": (0.0, math.inf, True),
    "damping": (0.0, 1.0, True),
    "confidence": (0.5, 1.0, True),
    "search_fraction": (0.0, 1.0, False),
}
_LEAST_INTEGERS = {
    "rank_multiple": 1,
    "rounds": 1,
    "search_steps": 1,
    "population_size": 2,
    "generations": 1,
    "batch_size": 1,
    "seed": 0,
    "vocabulary_size": 1,
}
_OPTIONAL = ("tolerance", "pruning_ratio", "latency_target", "population_size", "generations", "vocabulary_size")
_HINTS = {"tolerance": " Points are fractions: two points are 0.02."}


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None and name == "target_modules":
        return None
    if isinstance(value, str) or not all(isinstance(pattern, str) and pattern for pattern in value or ()):
        raise TypeError(f"`{name}` must be a sequence of name patterns, got {value!r}. Write ('*.q_proj',) for one.")
    if name == "target_modules" and not value:
        raise ValueError("`target_modules` must name at least one pattern, got none. Leave it out for all linears.")
    return tuple(value or ())
