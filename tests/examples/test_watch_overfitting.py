"""The example of a training that is watched by held-out images, at a tiny size."""

import sys
from pathlib import Path

import fashion_mnist
import torch

from diffusers_fisher.files import read_table, write_json

sys.path.insert(0, str(Path(fashion_mnist.__file__).parent / "likelihood"))
import watch_overfitting


def test_tiny_run_prints_a_line_per_record_and_draws_them(tmp_path):
    lines = []
    torch.manual_seed(5)
    records = watch_overfitting.train(2, 1, 1, 2, report=lines.append, num_inference_steps=4)
    assert [record.step for record in records] == [0, 1, 2]
    assert lines == [str(record) for record in records]
    rows = watch_overfitting.figures(records)
    assert rows["training"]["change"][0] == 0 and rows["training"]["change"][2] != 0
    assert records[2].held_out.bits_per_dim.shape == (2,) and records[2].training.bits_per_dim.shape == (1,)
    watch_overfitting.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    rows["training"]["standard_error_of_change"] = [0.0] * 3  # one image has no scatter, and JSON no infinity
    write_json(tmp_path / "rows.json", rows)
    assert read_table(tmp_path / "rows.json")["steps"] == [0, 1, 2]
