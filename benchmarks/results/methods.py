"""The methods of the results table, and how much of it each preset measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimum_sieve import HealConfig, SieveConfig


if TYPE_CHECKING:
    from collections.abc import Mapping


TOLERANCES = (0.01, 0.02, 0.05)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of pruning.

    Args:
        name (`str`): Its name on the command line.
        title (`str`): Its name in the table.
        settings (`dict[str, Any]`): Of [`SieveConfig`][optimum_sieve.config.sieve.SieveConfig].
        healed (`bool`): Whether every size is healed.
        written (`bool`): Whether it is for tasks of written answers alone, the same as another for the rest.
        note (`str`): What a reader has to know of it.
    """

    name: str
    title: str
    settings: dict[str, Any]
    healed: bool = False
    written: bool = False
    note: str = ""

    @property
    def by_ratio(self) -> bool:
        """Whether factors are trained for one size, so that each size of a search is a run of its own."""
        return bool(self.settings["projection"] == "learned")

    @property
    def refusal(self) -> str | None:
        """Say why the package refuses the method; `None` where it does not."""
        searched = self.settings["allocation"] == "genetic"
        return "the genetic search does not heal its candidates" if searched and self.healed else None


def _layerwise(projection: str) -> dict[str, Any]:
    return {"projection": projection, "allocation": "uniform", "storage": "factors", "rounds": 1}


def _joint(allocation: str) -> dict[str, Any]:
    # Named, so that a cell's key changes with the default.
    return {"projection": "joint", "allocation": allocation, "weighting": SieveConfig.weighting}


METHODS = (
    Method(name="svd", title="svd, uniform", settings=_layerwise("svd"), note="the weight alone"),
    Method(
        name="activation",
        title="activation, uniform",
        settings=_layerwise("activation"),
        note="the whitened SVD that is the idea of SVD-LLM, in this code base",
    ),
    Method(
        name="learned",
        title="learned, uniform",
        settings=_layerwise("learned"),
        note="LLM-Sieve's adapters, trained as the paper words it, for each size anew",
    ),
    Method(name="joint-uniform", title="joint, uniform", settings=_joint("uniform")),
    Method(name="joint-energy", title="joint, energy", settings=_joint("energy"), note="the defaults"),
    Method(
        name="joint-energy-norms",
        title="joint, energy, norms",
        settings={**_joint("energy"), "weighting": "norms"},
        note='`weighting="norms"`: tokens of the second round count as in the first',
    ),
    Method(
        name="joint-energy-answer",
        title="joint, energy, answers alone",
        settings={**_joint("energy"), "loss": "answer"},
        written=True,
        note="written answers calibrated on the likelihood of the gold answers",
    ),
    Method(name="joint-genetic", title="joint, genetic", settings=_joint("genetic"), note="the search"),
    Method(
        name="activation-healed", title="activation, uniform, healed", settings=_layerwise("activation"), healed=True
    ),
    Method(name="joint-uniform-healed", title="joint, uniform, healed", settings=_joint("uniform"), healed=True),
    Method(name="joint-energy-healed", title="joint, energy, healed", settings=_joint("energy"), healed=True),
    Method(name="joint-genetic-healed", title="joint, genetic, healed", settings=_joint("genetic"), healed=True),
)

# Job -> method -> tolerances.
Cells = dict[str, dict[str, tuple[float, ...]]]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Which cells are measured, and on how much.

    Args:
        name (`str`): Its name on the command line.
        limits (`dict[str, dict[str, int]]`): Rows of each split, by job; `"sibling"`: of each sibling data set.
        cells (`Cells`): Tolerances that are measured, by job and method.
        search_steps (`int`): Steps of the bisection on the size: the size is found to `2 ** -search_steps`.
        ratio_steps (`int`): The same where each size is a run of its own.
        heal (`dict[str, dict[str, Any]]`): Of [`HealConfig`][optimum_sieve.config.heal.HealConfig], by job.
        genetic (`dict[str, dict[str, Any]]`): Settings of the genetic search, by job.
        speed (`dict[str, int]`): `new_tokens` and `rounds` of the timing.
    """

    name: str
    limits: Mapping[str, Mapping[str, int]]
    cells: Cells
    search_steps: int
    ratio_steps: int
    heal: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    genetic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed: Mapping[str, int] = field(default_factory=dict)

    def splits(self, job: str) -> dict[str, int]:
        """Return the rows of the job's own splits."""
        return {split: count for split, count in self.limits[job].items() if split != "sibling"}

    def sibling(self, job: str) -> dict[str, int]:
        """Return the limit of the job's sibling data, which have a test split alone."""
        return {"test": self.limits[job]["sibling"]}

    def config(self, job: str, method: Method, tolerance: float) -> dict[str, Any]:
        """Return the settings of a cell, as `SieveConfig` takes them."""
        settings = {**method.settings, "tolerance": tolerance, "search_steps": self.search_steps}
        if method.settings["allocation"] == "genetic":
            settings |= self.genetic.get(job, {})
        if method.healed:
            settings["heal"] = HealConfig(**self.heal.get(job, {})).to_dict()
        if method.by_ratio:
            settings["search_steps"] = self.ratio_steps
        return settings


_TWO, _ONE = (0.02, 0.05), (0.02,)
_UCI = ("uci-amazon", "uci-imdb", "uci-yelp")
_JOINT = ("joint-uniform", "joint-energy")
# What a task is reported by: the layer-wise baseline, every allocation, and healing.
_EACH = ("activation", *_JOINT, "joint-genetic", "joint-energy-healed")
_WRITTEN = ("squad", "nq")
# Tasks of long texts: an example costs ten times what a sentence does.
_LONG = ("pubmedqa", *_WRITTEN)
_SHORT_SEARCH = {"population_size": 8, "generations": 4}

SMALL = Preset(
    name="small",
    limits={
        "movie": {"calibration": 256, "selection": 500, "test": 500, "sibling": 300},
        "uci-amazon": {"calibration": 192, "selection": 400, "test": 300, "sibling": 300},
        "snips": {"calibration": 192, "selection": 400, "test": 400},
    },
    cells={
        "movie": {
            "activation": _TWO,
            "joint-uniform": _TWO,
            "joint-energy": TOLERANCES,
            "joint-genetic": _ONE,
            "joint-energy-healed": _ONE,
        },
        "uci-amazon": {"activation": _ONE, "joint-energy": _ONE},
        "snips": {"activation": _TWO, "joint-energy": _TWO},
    },
    search_steps=5,
    ratio_steps=3,
    heal={"movie": {"steps": 32, "eval_steps": 16}},
    genetic={"movie": _SHORT_SEARCH},
    speed={"new_tokens": 24, "rounds": 3},
)

# Each kind of task, by each method that it is reported by.
MEDIUM = Preset(
    name="medium",
    limits={
        "movie": {"calibration": 256, "selection": 1000, "test": 1000, "sibling": 600},
        "snips": SMALL.limits["snips"],
        **dict.fromkeys(_UCI, SMALL.limits["uci-amazon"]),
        "pubmedqa": {"calibration": 192, "selection": 100, "test": 500},
        "squad": {"calibration": 384, "selection": 400, "test": 280, "sibling": 300},
        "nq": {"calibration": 128, "selection": 350, "test": 400, "sibling": 200},
    },
    cells={
        **dict.fromkeys(_UCI, SMALL.cells["uci-amazon"]),
        **dict.fromkeys(("movie", "snips"), dict.fromkeys((*_EACH, "joint-energy-norms"), _TWO)),
        **dict.fromkeys(_LONG, dict.fromkeys(_EACH, _TWO)),
    },
    search_steps=SMALL.search_steps,
    ratio_steps=SMALL.ratio_steps,
    heal={job: {"steps": 32, "eval_steps": 16} for job in ("movie", "snips", *_LONG)},
    genetic={
        **dict.fromkeys(("movie", "snips"), _SHORT_SEARCH),
        **{job: {"population_size": 6, "generations": 3} for job in _LONG},
    },
    speed=SMALL.speed,
)

FULL = Preset(
    name="full",
    limits={
        "movie": {"calibration": 512, "selection": 1200, "test": 1500, "sibling": 1000},
        **{job: {"calibration": 256, "selection": 410, "test": 310, "sibling": 600} for job in _UCI},
        "snips": {"calibration": 512, "selection": 1000, "test": 695},
        "pubmedqa": {"calibration": 256, "selection": 100, "test": 500},
        "squad": {"calibration": 384, "selection": 450, "test": 280, "sibling": 600},
        "nq": {"calibration": 384, "selection": 700, "test": 600, "sibling": 298},
    },
    cells={
        "movie": {
            **dict.fromkeys(("svd", *_EACH, "joint-energy-norms"), TOLERANCES),
            "learned": _TWO,
            **dict.fromkeys(("activation-healed", "joint-uniform-healed"), _ONE),
        },
        **{job: dict.fromkeys(("activation", "joint-energy"), _TWO) for job in _UCI},
        "snips": {
            **dict.fromkeys(("svd", *_EACH, "joint-energy-norms"), TOLERANCES),
            **dict.fromkeys(("activation-healed", "joint-uniform-healed"), _ONE),
        },
        "pubmedqa": dict.fromkeys(_EACH, _TWO),
        **dict.fromkeys(_WRITTEN, dict.fromkeys((*_EACH, "joint-energy-norms", "joint-energy-answer"), _TWO)),
    },
    heal={job: {"steps": 32, "eval_steps": 16} for job in _LONG},
    search_steps=6,
    ratio_steps=3,
    speed={"new_tokens": 48, "rounds": 5},
)

PRESETS = {preset.name: preset for preset in (SMALL, MEDIUM, FULL)}
