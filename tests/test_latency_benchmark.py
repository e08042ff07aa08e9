"""`benchmarks/latency.py` prunes within the time that a row names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import toy
from benchmark_module import load_benchmark


if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_row_for_every_size_and_target(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_benchmark("latency")
    # Times of so small layers are chance.
    monkeypatch.setattr(module, "measure_latencies", lambda setting: {
        curve.name: curve.choices("factors", 8)[1] + 1.0
        for curve in setting.loss_curves(made)
    })  # fmt: skip
    made: dict[str, Any] = {}
    calibrate = module.calibrate
    monkeypatch.setattr(module, "calibrate", lambda *given: made.update(calibrate(*given)) or made)
    toy.make_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--task", str(toy.write_task(tmp_path)), "--storage", "factors"]
    module.main([*words, "--kept", "0.9", "0.6", "--targets", "0.4", "--rounds", "1", "--steps", "2"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 0")]
    assert [row[:2] for row in rows] == [["0.9", "none"], ["0.9", "0.4"], ["0.6", "none"], ["0.6", "0.4"]]
    for row in rows:
        parameters, time, measured, kl = map(float, row[2:])
        assert parameters <= float(row[0])
        assert time <= (float(row[1]) if row[1] != "none" else 1.0)
        assert measured > 0
        assert kl >= 0
    assert float(rows[1][5]) > float(rows[0][5])
