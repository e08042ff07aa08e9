r"""Divide rows into calibration, selection and test splits that share no prompt and no group."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from optimum_sieve._messages import listed, shown

from .data import NAMES, Data


if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from .templates.template import Row


_Item = TypeVar("_Item")


def divide(
    data: Data,
    rows: Mapping[str, list[Row]],
    *,
    prompt: Callable[[Row], Hashable],
    group: str | None,
    limit: Mapping[str, int],
    seed: int,
) -> dict[str, list[Row]]:
    """Assign shuffled rows to each split, at most `limit` each; shared sources are divided.

    Rows of a shared source with the same prompt or the same `group` stay together.

    Args:
        data ([`Data`]):
            Source of each split.
        rows (`Mapping[str, list[Row]]`):
            Rows of each source.
        prompt (`Callable[[Row], Hashable]`):
            Maps a row to its prompt, which must not occur in two splits.
        group (`str`, *optional*):
            Field whose values must not occur in two splits either.
        limit (`Mapping[str, int]`):
            Maximum number of rows per split.
        seed (`int`):
            Seed of the shuffles.

    Returns:
        `dict[str, list[Row]]`: Rows of each split in `data.sources`; no two splits share a prompt or group.

    Raises:
        ValueError: If a split is empty or too small for the standard error of its score, or separate sources share
            prompts or groups.
    """
    identities: dict[str, Callable[[Row], Hashable]] = {"prompt": prompt}
    if group is not None:
        identities[f"value of {group!r}"] = lambda row: _group(row, group)
    pools: dict[str, list[Row]] = {}
    for source, pool in rows.items():
        sharing = data.sharing(source)
        if len(sharing) == 1:
            pools[sharing[0]] = pool
        else:
            pools |= _cut(pool, {split: data.fractions[split] for split in sharing}, identities, seed)
    divided = {split: _shuffled(pools[split], [seed, NAMES.index(split)])[: limit.get(split)] for split in data.sources}
    for name, identity in identities.items():
        _refuse_overlap(divided, identity, name)
    _refuse_single_rows(divided, limit)
    return divided


def _shuffled(items: list[_Item], seed: int | list[int]) -> list[_Item]:
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def _cut(
    pool: list[Row], fractions: Mapping[str, float], identities: Mapping[str, Callable[[Row], Hashable]], seed: int
) -> dict[str, list[Row]]:
    """Deal whole components to the splits, largest first, each to the split that lacks most rows."""
    components = _components([[(name, identity(row)) for name, identity in identities.items()] for row in pool])
    lacking = {split: len(pool) * fraction / sum(fractions.values()) for split, fraction in fractions.items()}
    dealt: dict[str, list[Row]] = {split: [] for split in fractions}
    for component in sorted(_shuffled(components, seed), key=len, reverse=True):
        split = max(lacking, key=lambda split: lacking[split])
        dealt[split] += [pool[i] for i in component]
        lacking[split] -= len(component)
    for split, rows in dealt.items():
        if not rows:
            raise ValueError(
                f"`data` must have rows for every split, got none for {split}: the {len(pool)} rows of "
                f"{pool[0].source} form {len(components)} sets that must stay together (same "
                f"{' or '.join(identities)}). Add rows, or name separate sources."
            )
    return dealt


def _components(linked: list[list[Hashable]]) -> list[list[int]]:
    """Group rows that share a key, directly or through other rows (union-find); return lists of row indices."""
    parent = list(range(len(linked)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, keys in enumerate(linked):
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    components: dict[int, list[int]] = {}
    for i in range(len(linked)):
        components.setdefault(root(i), []).append(i)
    return list(components.values())


def _refuse_overlap(divided: Mapping[str, list[Row]], identity: Callable[[Row], Hashable], name: str) -> None:
    owners: dict[Hashable, tuple[str, Row]] = {}
    for split, rows in divided.items():
        shared = [(row, *owners[identity(row)]) for row in rows if identity(row) in owners]
        if shared:
            row, other, first = shared[0]
            count = sum(owner == other for _, owner, _ in shared)
            raise ValueError(
                f"`data` must have disjoint splits, got {count} rows of {split} whose {name} is in {other} too (the "
                f"first: {row.place} and {first.place}). Remove them from one split, or give both splits the same "
                "source, which is divided without overlap."
            )
        owners |= {identity(row): (split, row) for row in rows}


def _refuse_single_rows(divided: Mapping[str, list[Row]], limit: Mapping[str, int]) -> None:
    for split in ("selection", "test"):
        if split in divided and len(divided[split]) < 2:
            remedy = f"Add rows or raise `limit.{split}`." if limit.get(split) == 1 else "Add rows."
            raise ValueError(
                f"`data` must have at least 2 rows for {split}, to compute a standard error, got "
                f"{len(divided[split])}. {remedy}"
            )


def _group(row: Row, group: str) -> str:
    if group not in row.fields:
        raise ValueError(
            f"`group` must name a field of the data, got {shown(group)} in {row.place}. Its fields are: "
            f"{listed(row.fields)}."
        )
    if row.fields[group] is None:
        raise ValueError(
            f"`group` must name a field with a value in every row, got none for {shown(group)} in {row.place}."
        )
    return str(row.fields[group])
