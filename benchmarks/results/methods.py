"""The methods of the results table, and the presets, which say how much of it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimum_sieve import HealConfig, SieveConfig

from .suite import SUITE


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOLERANCES = (0.01, 0.02, 0.05)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of pruning.

    Args:
        name (`str`): Name on the command line.
        title (`str`): Name in the table.
        settings (`dict[str, Any]`): Settings of `SieveConfig`.
        healed (`bool`): Whether every size is healed.
        written (`bool`): Whether the method differs from another one on written answers alone.
        note (`str`): Explanation above the table.
    """

    name: str
    title: str
    settings: dict[str, Any]
    healed: bool = False
    written: bool = False
    note: str = ""

    @property
    def by_ratio(self) -> bool:
        """Whether factors are trained for one size, so that each size of a bisection is a run of its own."""
        return bool(self.settings["projection"] == "learned")


def _layerwise(projection: str) -> dict[str, Any]:
    return {"projection": projection, "allocation": "uniform", "storage": "factors", "rounds": 1}


def _joint(allocation: str, **more: str) -> dict[str, Any]:
    # The weighting is explicit, so that a cell's key changes with the default.
    return {"projection": "joint", "allocation": allocation, "weighting": SieveConfig.weighting, **more}


METHODS = tuple(
    Method(name=name, title=title, settings=settings, note=note, healed=name.endswith("healed"),
           written=name.endswith("answer"))
    for name, title, settings, note in (
        ("svd", "svd, uniform", _layerwise("svd"), "the weight alone"),
        ("activation", "activation, uniform", _layerwise("activation"),
         "a whitened SVD, the idea of SVD-LLM, as this package implements it"),
        ("learned", "learned, uniform", _layerwise("learned"),
         "LLM-Sieve's adapters, trained for each size as the paper describes"),
        ("joint-uniform", "joint, uniform", _joint("uniform"), ""),
        ("joint-energy", "joint, energy", _joint("energy"), "the defaults"),
        ("joint-energy-norms", "joint, energy, norms", _joint("energy", weighting="norms"),
         '`weighting="norms"`: the second round weights tokens as the first does'),
        ("joint-energy-answer", "joint, energy, answers alone", _joint("energy", loss="answer"),
         "written answers calibrated on the likelihood of the gold answers"),
        ("joint-genetic", "joint, genetic", _joint("genetic"), "the search"),
        ("activation-healed", "activation, uniform, healed", _layerwise("activation"), ""),
        ("joint-uniform-healed", "joint, uniform, healed", _joint("uniform"), ""),
        ("joint-energy-healed", "joint, energy, healed", _joint("energy"),
         "the figures here are of a version before crossed prompts and adapters on the factors; for the default "
         "command now see [Measurements](measurements.md#the-default-command-on-other-rows)"),
        ("joint-genetic-healed", "joint, genetic, healed", _joint("genetic"), ""),
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Which cells are measured, and on how many rows.

    Args:
        name (`str`): Name on the command line.
        limits (`dict[str, dict[str, int]]`): Rows of each split, by job; `"sibling"`: of each sibling data set.
        cells (`dict[str, dict[str, Sequence[float]]]`): Tolerances, by job and method.
        search_steps (`int`): Steps of the bisection on the size.
        ratio_steps (`int`): The same where each size is a run of its own.
        heal (`dict[str, dict[str, Any]]`): Settings of `HealConfig`, by job.
        genetic (`dict[str, dict[str, Any]]`): Settings of the genetic search, by job.
        speed (`dict[str, int]`): `new_tokens` and `rounds` of the timing.
    """

    name: str
    limits: Mapping[str, Mapping[str, int]]
    cells: Mapping[str, Mapping[str, Sequence[float]]]
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
            settings["heal"] = HealConfig.from_dict(dict(self.heal.get(job, {}))).to_dict()
        if method.by_ratio:
            settings["search_steps"] = self.ratio_steps
        return settings


PRESETS = {name: Preset(name=name, **values) for name, values in SUITE["presets"].items()}
