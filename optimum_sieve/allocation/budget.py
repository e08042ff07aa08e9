r"""Parameters of a linear layer as a function of its rank and storage. Does not import torch."""

from __future__ import annotations


def rank_parameters(rank: int, out_features: int, in_features: int, storage: str = "pivoted") -> int:
    """Count the weight parameters of a factorized layer (a bias is not counted).

    Args:
        rank (`int`): Rank kept.
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
    """List the ranks, ascending from 0, that are multiples of `multiple` and cost less than the dense layer.

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
    """Return the largest allowed rank whose parameters fit in `budget` (0 if none but 0 does)."""
    fitting = [
        rank
        for rank in rank_choices(out_features, in_features, storage, multiple)
        if rank_parameters(rank, out_features, in_features, storage) <= budget
    ]
    return max(fitting, default=0)


Ranks = dict[str, "int | None"]
