"""Time a matrix's factors, and the other ways to get them: an SVD of the weighted matrix, float32, fewer directions.

    python benchmarks/factorization.py
    python benchmarks/factorization.py --shapes 4096x4096 14336x4096 --device cuda

Random weights, inputs and gradients whose variances fall as a power of the direction's number, four times as many
tokens as the larger side. `factorize` takes one symmetric eigendecomposition of the smaller side, in float64. `SVD` is
that of L_G^T W L_C, roots and ways back included. `float32` is the eigendecomposition alone beside that in float64,
and how wrong the predicted loss of a truncation to half and to 7/8 of the rank is then. `quarter` is a randomized SVD
(`torch.svd_lowrank`) of a quarter of the rank, and what it loses more than the best of that rank. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, TypeVar

import torch
from results.measure import machine_name

from optimum_sieve.factorization import factorize
from optimum_sieve.moments import accumulate_moments, empty_moments, watches_outputs


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ValueT = TypeVar("ValueT")
DAMPING = 1e-4
HEADER = (
    "| out x in | factorize | SVD | / factorize | energies differ by | float32 / float64 | half | 7/8 "
    "| quarter / factorize | loses |\n| --- |" + " ---: |" * 9
)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "576x1536", "2048x2048"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decay", type=float, default=1.0, help="exponent of the variances")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each shape."""
    options = parse_arguments(words)
    print(f"{machine_name(torch.device(options.device))}, {torch.get_num_threads()} threads\n\n{HEADER}")
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        print(measure(rows, columns, options), flush=True)


def measure(rows: int, columns: int, options: argparse.Namespace) -> str:
    """Factor one matrix in every way; return its row."""
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) / columns**0.5).to(options.device)
    tokens = 4 * max(rows, columns)
    x, g = (correlated(tokens, size, options.decay).to(options.device) for size in (columns, rows))
    moments = empty_moments(weight, projection="joint")
    accumulate_moments(moments, weight, x, g, on_outputs=watches_outputs(weight, "joint"), scaling=1 / tokens)
    basis, own = timed(lambda: factorize(weight, moments, damping=DAMPING), options.rounds)
    weighted, squares, direct = weigh_and_decompose(weight, x, g, options.rounds)
    share, expected = basis.energy / basis.energy.sum(), squares / squares.sum()
    apart = float((share - expected).abs().max() / expected.max())
    gram = weighted @ weighted.T if rows <= columns else weighted.T @ weighted
    _, double = timed(lambda: torch.linalg.eigh(gram), options.rounds)
    (values, _), single = timed(lambda: torch.linalg.eigh(gram.float()), options.rounds)
    errors = [tail_error(values.double().flip(0).clamp_min(0), squares, part) for part in (1 / 2, 7 / 8)]
    rank = min(rows, columns) // 4
    (left, _, _), fewer = timed(lambda: torch.svd_lowrank(weighted, q=rank, niter=2), options.rounds)
    lost = squares.sum() - (left.T @ weighted).square().sum()
    cells = [f"{rows} x {columns}", f"{1e3 * own:,.0f} ms", f"{1e3 * direct:,.0f} ms", f"{direct / own:.1f}"]
    cells += [f"{apart:.0e}", f"{single / double:.2f}", *(f"{error:.0e}" for error in errors)]
    cells += [f"{fewer / own:.2f}", f"{float(lost / squares[rank:].sum() - 1):+.1%}"]
    return f"| {' | '.join(cells)} |"


def correlated(tokens: int, size: int, decay: float) -> torch.Tensor:
    """Return random rows (tokens, size) whose principal variances fall as a power."""
    turn = torch.linalg.qr(torch.randn(size, size))[0]
    return torch.randn(tokens, size) * torch.arange(1, size + 1) ** (-decay / 2) @ turn


def weigh_and_decompose(
    weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return L_G^T W L_C, the squares of its singular values, descending, and the time of factors by its SVD."""
    weight, x, g = weight.double(), x.double(), g.double()
    x_square, g_square = x.square().sum(1), g.square().sum(1)
    of_inputs, of_outputs = (x * g_square[:, None]).T @ x, (g * x_square[:, None]).T @ g

    def decompose() -> tuple[torch.Tensor, torch.Tensor]:
        of_input, of_output = (
            torch.linalg.cholesky(own + torch.diag_embed(DAMPING * own.diagonal().mean().expand(len(own))))
            for own in (of_inputs, of_outputs)
        )
        weighted = of_output.T @ weight @ of_input
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        torch.linalg.solve_triangular(of_output.T, left * values, upper=True)
        torch.linalg.solve_triangular(of_input.T, right.T, upper=True)
        return weighted, values.square()

    (weighted, squares), seconds = timed(decompose, rounds)
    return weighted, squares, seconds


def tail_error(found: torch.Tensor, expected: torch.Tensor, part: float) -> float:
    """Return the relative error of the predicted loss of a truncation to a part of the rank."""
    rank = round(part * len(expected))
    return abs(float(found[rank:].sum() / expected[rank:].sum()) - 1)


def timed(run: Callable[[], ValueT], rounds: int) -> tuple[ValueT, float]:
    """Return what a function returns and its median seconds; the first call warms up."""
    result, seconds = run(), []
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


if __name__ == "__main__":
    main()
