"""Random products measure the asymmetry of a matrix."""

import pytest
import torch

from diffusers_fisher.checks.jacobian import _asymmetry


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_asymmetry_is_that_of_the_whole_matrix(share):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 40, 40, generator=generator, dtype=torch.float64)
    matrix = (left + left.T) / 2 + share * (right - right.T) / 2
    vectors = torch.randn(60, 3, 40, generator=generator, dtype=torch.float64)
    expected = float((matrix - matrix.T).norm() / matrix.norm())
    assert _asymmetry(vectors, vectors @ matrix.T) == pytest.approx(expected, rel=0.05, abs=1e-12)
