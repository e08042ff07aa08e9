"""`benchmarks/stacked.py` stacks first factors and changes nothing else."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmark_module import load_benchmark
from torch import nn
from toy import make_model


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_one_product_for_all_linears_of_one_input(storage: str) -> None:
    module = load_benchmark("stacked")
    separate = module.make_pruned(make_model(hidden_size=64, intermediate_size=128), 0.5, storage).eval()
    stacked = module.stack(copy.deepcopy(separate))
    calls: dict[str, int] = {"separate": 0, "stacked": 0}
    for name, model in (("separate", separate), ("stacked", stacked)):
        for linear in [each for each in model.model.modules() if type(each) is nn.Linear]:
            linear.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    module.check(separate, stacked)
    blocks = len(separate.model.layers)
    assert calls == {"separate": 14 * blocks, "stacked": 11 * blocks}
    assert stacked.num_parameters() == separate.num_parameters()


def test_models_that_differ_are_not_timed() -> None:
    module = load_benchmark("stacked")
    separate = module.make_pruned(make_model(hidden_size=64, intermediate_size=128), 0.5, "factors").eval()
    stacked = module.stack(copy.deepcopy(separate))
    with torch.no_grad():
        stacked.model.layers[0].mlp.gate_proj.right.product.weight.mul_(2)
    with pytest.raises(RuntimeError, match="compute something else"):
        module.check(separate, stacked)


def test_a_row_for_every_step(tmp_path: Path, capsys: Any) -> None:
    make_model().config.save_pretrained(tmp_path)
    words = ["--config", str(tmp_path), "--kept", "0.5", "--prefill", "16", "--decode", "1"]
    load_benchmark("stacked").main([*words, "--steps", "2", "--rounds", "2", "--json", str(tmp_path / "rows")])
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["step"] for row in rows] == ["prefill 16", "decode 1"] * 2
    assert all(row["ratio"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n| 0.5 |") == 4
