"""`SieveConfig`: every setting of a pruning run, with its default and its rule. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from . import rules
from .combinations import check_combinations
from .files import load_settings, push_settings, read_settings, save_settings
from .heal import HealConfig
from .tune import TuneConfig
from .validate import check_known, check_patterns, check_task_weights, drop_removed, parse_bytes, parse_seconds


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


@dataclass(frozen=True, kw_only=True)
class SieveConfig:
    r"""Settings of one pruning run.

    Exactly one of `tolerance` and `pruning_ratio` must be set. The settings from `projection` on are advanced: their
    defaults suit almost every run.

    Args:
        tolerance (`float`, *optional*):
            Largest acceptable drop in the metric, in absolute points (0.02 = two points). Finds the smallest model that
            stays within it on the selection split.
        pruning_ratio (`float`, *optional*):
            Fraction of the target parameters to remove, above 0 and below 1. Skips the search.
        latency_target (`float`, *optional*):
            Latency budget of the target layers for one row, as in decoding, relative to the dense layers: above 0 and
            below 1. Layers are timed at several ranks on the model's device. Applies in addition to `tolerance` or
            `pruning_ratio`; requires `allocation="energy"`. Default: no latency budget.
        confidence (`float`):
            One-sided confidence that the drop stays within `tolerance`, from 0.5 up to below 1. 0.5 compares the means.
        allocation (`str`):
            How ranks are chosen: `"energy"` (minimizes the predicted loss under the budget), `"uniform"` (keeps the
            same fraction of every matrix) or `"genetic"` (searches the ranks with scores on the task).
        label_source (`str`):
            Gold answers for calibration, if the loss uses them: `"data"` (the task's), `"model"` (the dense model's
            most likely answers) or `"sampled"` (sampled from the dense model, to estimate the Fisher information of
            everything it may write). Tasks without answers require `"model"` or `"sampled"`; they are scored against
            the dense model's most likely answers.
        target_modules (`tuple[str, ...]`, *optional*):
            `fnmatch` patterns of the linear layers to prune. Default: every linear layer of the transformer blocks.
        exclude_modules (`tuple[str, ...]`):
            `fnmatch` patterns of linear layers to keep dense.
        batch_size (`int`):
            Rows per forward pass. An example has one row, in which labels of several tokens follow the prompt as a
            tree and count as further rows by their tokens; models that do not take that have one row per label.
        memory_limit (`int` or `str`, *optional*):
            Memory for the model and all intermediate results, such as `"24GB"` or `"700MB"`; accelerator memory if the
            run uses one. If the run needs more, only one transformer block is in memory at a time and the rest stays on
            disk. Python and its libraries do not count. Default: no limit.
        seed (`int`):
            Random seed.
        vocabulary (`str`):
            `"whole"` (keeps every token) or `"task"`: tokenizer, embeddings and head keep the tokens of the calibration
            examples (and, without a `tolerance`, of the selection examples), the special tokens and the tokens needed
            to encode any text. Other words are split into smaller tokens. With a `tolerance`, more tokens stay until
            this alone costs at most half of it on the selection split.
        time_limit (`float` or `str`, *optional*):
            Time after which no further size is tried, in seconds or as text such as `"90s"`, `"12min"` or `"2h"`: the
            result is then the smallest size accepted so far. What comes before and after, such as tuning, moments and
            the scores on the test split, takes as long as without it. Default: no limit.
        heal ([`HealConfig`][optimum_sieve.config.heal.HealConfig], `dict` or `str`, *optional*):
            Settings of healing, or a mapping of some: the run prunes to falling sizes, trains the factors shortly at
            each one and goes on from the trained factors. `"auto"` heals with the default settings wherever the whole
            model is in memory; `None` trains nothing.
        tune ([`TuneConfig`][optimum_sieve.config.tune.TuneConfig], `dict` or `str`, *optional*):
            Settings of tuning, or a mapping of some: a short training of the dense model on the gold answers before it
            is pruned. `"auto"` tunes with the default settings if the data has gold answers and the run heals, and
            keeps the tuned model if it is better on the selection split; `None` prunes the model as it came.
        reference (`str`):
            Model that `tolerance` is measured from: `"dense"` (as it came) or `"tuned"` (after tuning).
        projection (`str`):
            How a matrix is factored: `"joint"` (from inputs and output gradients), `"activation"` (from inputs alone;
            minimizes \(\lVert WX - W'X \rVert\)), `"svd"` (from the weight alone) or `"learned"` (adapters trained with
            Adam, the LLM-Sieve paper's method).
        storage (`str`):
            Format of the factors: `"pivoted"` (fewest parameters) or `"factors"` (two plain low-rank matrices).
        loss (`str`):
            Loss whose gradients calibration collects: `"fisher"` (the model's own distribution over the task's
            candidate texts, or over the vocabulary at each token of a generated answer; ignores which answer is
            correct), `"labels"` (cross-entropy of the gold candidate in that distribution) or `"answer"` (likelihood of
            the gold answer among all texts). Tasks without candidates use `"answer"` for `"labels"`.
        fisher_temperature (`float`):
            Divides the candidates' scores in `loss="fisher"`, above 0. A model that was tuned on the calibration
            examples is sure of their answers, and at 1 the few examples that it doubts would decide alone.
        rounds (`int`):
            Calibration rounds. The first runs on the dense model, later ones on the partly pruned model, while the
            predicted loss increase stays negligible. `"svd"` and `"learned"` always use one round.
        weighting (`str`):
            Token weights in the joint moments after the first round: `"norms"` (by the norms of inputs and gradients,
            as in the first round), `"likelihood"` (by Mahalanobis distance under the previous moments) or `"balanced"`
            (geometric mean of both).
        rank_multiple (`int`):
            Ranks are multiples of this number.
        damping (`float`):
            Added to the diagonal of each moment matrix, as a fraction of its mean diagonal.
        written_prompts (`int`, *optional*):
            Prompts that the dense model writes in the style of the calibration prompts, as unlabelled examples of
            calibration and healing. Default: as many as make 512, for tasks with fewer than 200; 0 writes none. Only
            decoders write, none for rows with choices of their own, and none if nothing reads them
            (`projection="svd"` and `heal=None`).
        task_weights (`tuple[float, ...]`, *optional*):
            Relative task weights in calibration and healing, in the order of the tasks. `tolerance` applies to every
            task, whatever its weight. Default: equal weights.
        vocabulary_size (`int`, *optional*):
            Minimum number of tokens with `vocabulary="task"`; the tokenizer's first tokens fill it up, those of the
            task's characters before others. Default: only the tokens needed.
        label_offsets (`str`):
            `"prior"` adds an offset to the log-likelihood of each label of the pruned model, which moves the labels to
            the shares of the calibration split's gold answers; they are stored with the model. `"none"` adds nothing.
        search_steps (`int`):
            Bisection steps on the kept fraction, unless `allocation="genetic"`. Each step scores the selection split
            once.
        search_preset (`str`):
            Genetic search: `"fast"` (starts from the energy allocation and drops weak candidates early) or `"paper"`
            (LLM-Sieve's plain algorithm, for comparison).
        population_size (`int`, *optional*):
            Candidates per generation of the genetic search. Default: set by `search_preset`.
        generations (`int`, *optional*):
            Maximum number of generations of the genetic search. Default: set by `search_preset`.
        search_fraction (`float`):
            Fraction of the selection split on which the genetic search scores candidates; the rest confirms the result.

    Raises:
        ValueError: If a value breaks its rule; the message names the setting, the rule and the value.

    Example:

    ```python
    >>> SieveConfig(pruning_ratio=0.5).projection
    'joint'

    ```
    """

    tolerance: float | None = None
    pruning_ratio: float | None = None
    latency_target: float | None = None
    confidence: float = 0.9
    allocation: rules.Allocation = "energy"
    label_source: rules.LabelSource = "data"
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    batch_size: int = 16
    memory_limit: str | int | None = None
    seed: int = 0
    vocabulary: rules.Vocabulary = "whole"
    time_limit: str | float | None = None
    heal: HealConfig | Literal["auto"] | None = "auto"
    tune: TuneConfig | Literal["auto"] | None = "auto"
    reference: rules.Reference = "dense"
    projection: rules.Projection = "joint"
    storage: rules.Storage = "pivoted"
    loss: rules.Loss = "fisher"
    fisher_temperature: float = 4.0
    rounds: int = 2
    weighting: rules.Weighting = "balanced"
    rank_multiple: int = 8
    damping: float = 1e-4
    written_prompts: int | None = None
    task_weights: tuple[float, ...] | None = None
    vocabulary_size: int | None = None
    label_offsets: rules.LabelOffsets = "prior"
    search_steps: int = 6
    search_preset: rules.SearchPreset = "fast"
    population_size: int | None = None
    generations: int | None = None
    search_fraction: float = 0.25

    # Settings that the command line shows only with `--help-all`.
    ADVANCED: ClassVar[tuple[str, ...]] = (
        *("projection", "storage", "loss", "fisher_temperature", "rounds", "weighting", "rank_multiple", "damping"),
        *("written_prompts", "task_weights", "vocabulary_size", "label_offsets", "search_steps"),
        *("search_preset", "population_size", "generations", "search_fraction"),
    )

    def __post_init__(self) -> None:
        for name, kind in (("heal", HealConfig), ("tune", TuneConfig)):
            if isinstance(given := getattr(self, name), dict):
                object.__setattr__(self, name, kind.from_dict(given))
        object.__setattr__(self, "target_modules", check_patterns("target_modules", self.target_modules, True))
        object.__setattr__(self, "exclude_modules", check_patterns("exclude_modules", self.exclude_modules, False))
        object.__setattr__(self, "task_weights", check_task_weights(self.task_weights))
        rules.check_rules(self)
        object.__setattr__(self, "memory_limit", parse_bytes("memory_limit", self.memory_limit))
        object.__setattr__(self, "time_limit", parse_seconds("time_limit", self.time_limit))
        check_combinations(self)

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` as a number of bytes."""
        return parse_bytes("memory_limit", self.memory_limit)

    @property
    def seconds(self) -> float | None:
        """`time_limit` in seconds."""
        return parse_seconds("time_limit", self.time_limit)

    @property
    def num_rounds(self) -> int:
        """Calibration rounds that are run: `rounds`, or one if the projection allows no more."""
        return self.rounds if self.projection in ("joint", "activation") else 1

    @property
    def compares(self) -> bool:
        """Whether sizes are compared on the selection split; a search that is not healed does so by itself."""
        return self.tolerance is not None and (self.allocation != "genetic" or self.heal is not None)

    @property
    def healed_sizes(self) -> list[float]:
        """Kept fractions that are healed for the `pruning_ratio`, the last one; empty without either."""
        if self.pruning_ratio is None or not isinstance(self.heal, HealConfig):
            return []
        kept = 1 - self.pruning_ratio
        # A search finds ranks, and adapters are learned, for one size.
        at_once = self.allocation == "genetic" or self.projection == "learned"
        return [kept] if at_once else self.heal.sizes_to(kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, sorted by name."""
        values = dataclasses.asdict(self)
        values["heal"] = self.heal.to_dict() if isinstance(self.heal, HealConfig) else self.heal
        values["tune"] = self.tune.to_dict() if isinstance(self.tune, TuneConfig) else self.tune
        return {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in sorted(values)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SieveConfig:
        """Make a configuration from `to_dict`'s output. Settings of earlier versions that were removed are dropped.

        Raises:
            ValueError: If a key is unknown (the message names the closest known one) or a value breaks its rule.
        """
        values = drop_removed(values, rules.REMOVED)
        check_known(list(values), [field.name for field in dataclasses.fields(cls)], "SieveConfig")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> SieveConfig:
        """Read settings from a YAML or JSON file; `overrides` take precedence over the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a mapping of known settings.
        """
        values = read_settings(Path(path), "SieveConfig")
        return cls.from_dict({**values, **overrides})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None, **overrides: Any) -> SieveConfig:
        """Load the settings of a directory or Hub repository: `sieve_config.json`, or those a model was pruned with.

        Args:
            name_or_path (`str | Path`): The directory, or the Hub id.
            revision (`str`, *optional*): Revision on the Hub.
            overrides: Settings that take precedence.

        Raises:
            ValueError: If there are no settings, or they break a rule.
            OSError: If the repository cannot be read.
        """
        return cls.from_dict({**load_settings(str(name_or_path), revision, "SieveConfig"), **overrides})

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `sieve_config.json` to a directory, which is made if it does not exist; return the file.

        Raises:
            OSError: If the directory cannot be written.
        """
        return save_settings(self.to_dict(), Path(save_directory))

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload `sieve_config.json` to a repository, which is created if it does not exist.

        Args:
            repo_id (`str`): Such as `"user/name"`.
            options: `revision`, `commit_message`, `create_pr` and `token` of `HfApi.upload_file`, and `private` for a
                new repository.

        Raises:
            HfHubHTTPError: If the Hub refuses; an `OSError`.
        """
        return push_settings(self.to_dict(), repo_id, **options)
