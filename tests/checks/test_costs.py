"""The peak memory of an evaluation is that of the tensors that it makes, without the weights."""

import torch

from diffusers_fisher.checks.costs import _peak_memory


def test_the_peak_is_that_of_the_tensors_that_live_together():
    weight, x = torch.ones(1000, 1000), torch.ones(10, 1000)  # 4 MB, and 40 kB as each tensor below

    def evaluate():
        first = x @ weight.t()
        second = first + 1
        del first
        return second * 2

    with torch.no_grad():
        assert _peak_memory(evaluate, torch.device("cpu")) == 2 * 40_000
