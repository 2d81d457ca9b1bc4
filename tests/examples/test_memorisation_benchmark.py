"""The figures of the benchmark of memorisation scores on records whose answers are known."""

import memorisation as benchmark
import numpy
import pytest
import torch
from train_memorising import Prompt, half_mask


def record(values, kinds):
    row = {"calls": {benchmark.PROXY: 2}, "values": {benchmark.PROXY: values}}
    return {"kinds": kinds, "levels": {"5": row}}


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    kinds = ["whole", "whole", "half", "many", "many"]
    records = [record([[3.0, 1.0, 9.0, 2.0, 0.0], [3.0, 2.0, -9.0, 2.0, 0.0]], kinds)]
    single = benchmark.auroc(records, "5", benchmark.PROXY, 1, ("whole",))
    assert single["auroc"] == pytest.approx((3 / 4 + 3.5 / 4) / 2)  # a tie counts half
    assert single["evaluations"] == 2
    assert single["interval"][0] <= single["auroc"] <= single["interval"][1]
    both = benchmark.auroc(records, "5", benchmark.PROXY, 2, ("whole", "half"))
    assert both["evaluations"] == 4
    assert both["auroc"] == pytest.approx((2 + 1 + 0.5) / 6)  # means 3, 1.5 and 0 beside 2 and 0


def test_overlap_of_a_map_with_the_repeated_half():
    prompts = [Prompt("a", 0, "half", "left"), Prompt("b", 0, "whole"), Prompt("c", 0, "half", "top")]
    maps = torch.stack([half_mask(half).double() for half in ("left", "left", "left")])
    assert benchmark.overlaps(maps, prompts) == pytest.approx([1, 1 / 3])


def test_interval_of_a_mean():
    values = numpy.random.default_rng(1).normal(2.0, 1.0, 400)
    row = benchmark.mean_with_interval(values)
    assert row["mean"] == pytest.approx(values.mean())
    low, high = row["interval"]
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
