r"""Count the parameters of a linear layer by rank and storage. Never imports torch."""

from __future__ import annotations


def rank_parameters(rank: int, out_features: int, in_features: int, storage: str = "pivoted") -> int:
    """Count the weight parameters of a factorized layer, without bias.

    Args:
        rank (`int`): Rank of the factors.
        out_features (`int`): Rows of the weight.
        in_features (`int`): Columns of the weight.
        storage (`str`): `"factors"`, `"pivoted"` or `"dense"`.

    Returns:
        `int`: `rank * (out + in)`, `rank * (out + in - rank)` or `out * in`.

    Example:

    ```python
    >>> [rank_parameters(4, 10, 6, storage) for storage in ("factors", "pivoted", "dense")]
    [64, 48, 60]

    ```
    """
    if storage == "dense":
        return out_features * in_features
    if storage == "factors":
        return rank * (out_features + in_features)
    if storage == "pivoted":
        return rank * (out_features + in_features - rank)
    raise ValueError(f"`storage` must be 'dense', 'factors' or 'pivoted', got {storage!r}.")


def rank_choices(out_features: int, in_features: int, storage: str = "pivoted", multiple: int = 8) -> list[int]:
    """List the multiples of `multiple`, ascending from 0, that have fewer parameters than the dense layer.

    Example:

    ```python
    >>> rank_choices(32, 24, storage="factors", multiple=4)
    [0, 4, 8, 12]

    ```
    """
    dense = out_features * in_features
    ranks = range(0, min(out_features, in_features) + 1, multiple)
    return [rank for rank in ranks if rank_parameters(rank, out_features, in_features, storage) < dense]


def largest_rank(budget: int, out_features: int, in_features: int, storage: str = "pivoted", multiple: int = 8) -> int:
    """Return the largest rank choice whose parameters fit in `budget`; at least 0."""
    fitting = [
        rank
        for rank in rank_choices(out_features, in_features, storage, multiple)
        if rank_parameters(rank, out_features, in_features, storage) <= budget
    ]
    return max(fitting, default=0)


# Rank by layer name; `None` = dense.
Ranks = dict[str, "int | None"]
