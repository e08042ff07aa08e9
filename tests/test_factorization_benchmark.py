"""`benchmarks/factorization.py` compares ways that find the same factors."""

from __future__ import annotations

import pytest
import torch
from benchmark_module import load_benchmark


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_both_decompositions_have_the_same_energies(shape: tuple[int, int]) -> None:
    module = load_benchmark("factorization")
    options = module.parse_arguments(["--rounds", "1", "--decay", "2"])
    cells = [cell.strip() for cell in module.measure(*shape, options).strip("|").split("|")]
    assert cells[0] == f"{shape[0]} x {shape[1]}"
    assert len(cells) == module.HEADER.splitlines()[0].count("|") - 1
    # The moments are summed in float32.
    assert float(cells[4]) < 1e-4
    assert float(cells[6]) < float(cells[7]) < 1
    assert 0 <= float(cells[9].strip("%")) < 30


def test_correlated_rows_have_the_variances_they_say() -> None:
    torch.manual_seed(0)
    rows = load_benchmark("factorization").correlated(20_000, 6, 2.0)
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    torch.testing.assert_close(values, torch.arange(1, 7) ** -2.0, rtol=0.05, atol=0)


def test_the_error_is_that_of_what_is_cut_off() -> None:
    module = load_benchmark("factorization")
    expected = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert module.tail_error(torch.tensor([0.0, 0.0, 2.0, 2.5]), expected, 0.5) == pytest.approx(0.5)
