"""`dealt_probes` deals the random directions to the levels by each sample's own variance."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_fisher import AutodiffFisher, InputError, compare_checkpoints, compare_likelihood, embedded_checkpoint
from diffusers_fisher.fisher import ExactFisher
from diffusers_fisher.likelihood.dealing import dealt_counts
from diffusers_fisher.likelihood.problem import OdeProblem
from likelihood.test_more_probes import DATA, DENOISER, NATS, SAMPLES, likelihood

SEEDS = 30


def scatter(**options):
    """Returns log-likelihoods (seeds, B) and their stated standard errors."""
    outputs = [likelihood(generator=torch.Generator().manual_seed(seed), **options) for seed in range(SEEDS)]
    return torch.stack([out.log_prob for out in outputs]), torch.stack([out.standard_error for out in outputs])


def test_counts_are_the_best_ones_and_add_up():
    weights = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    flat = torch.ones(7, 2, dtype=torch.float64)
    assert dealt_counts(flat, weights, 1).tolist() == [[1, 1]] * 7
    counts = dealt_counts(flat, weights, 8)
    assert counts.sum(0).tolist() == [56, 56]
    assert counts[:, 0].tolist() == [7, 7, 7, 14, 7, 7, 7]  # in proportion to the weights
    peaked = torch.full((21, 1), 1e-9, dtype=torch.float64)
    peaked[8:13] = 1.0
    counts = dealt_counts(peaked, torch.ones(21, dtype=torch.float64), 3)[:, 0]
    assert int(counts.sum()) == 63 and int(counts.min()) == 1
    assert bool((counts[:5] == 1).all()) and int(counts[9:12].min()) >= 5
    assert dealt_counts(-flat, weights, 2).sum(0).tolist() == [14, 14]  # estimates may be below 0


def test_a_levels_own_estimate_does_not_decide_about_it():
    variance = torch.ones(9, 1, dtype=torch.float64)
    surprise = variance.clone()
    surprise[4] = 100.0
    weights = torch.ones(9, dtype=torch.float64)
    before, after = (dealt_counts(values, weights, 4)[4] for values in (variance, surprise))
    assert int(after) <= int(before)


def test_dealt_directions_scatter_less_at_equal_cost_and_the_error_is_honest():
    truth = likelihood(estimator=ExactFisher(DATA.distribution), num_probes=None).log_prob
    even, _ = scatter(num_probes=3)
    dealt, stated = scatter(num_probes=3, dealt_probes=True)
    spread = dealt.std(0).square().mean().sqrt() / even.std(0).square().mean().sqrt()
    assert float(spread) < 0.95  # 180 numbers each: the ratio has an error of about 0.08, and was 0.77 with 360
    # Unbiased: the mean over the seeds, within four of its errors, and 1e-3 bits/dim for the differences' own step.
    assert bool(((dealt.mean(0) - truth).abs() < 4 * dealt.std(0) / SEEDS**0.5 + 1e-3 * NATS).all())
    covered = ((dealt - truth).abs() < stated).double().mean()
    assert 0.57 < float(covered) < 0.79  # 68% with three errors of 0.035 over 180 numbers


def test_one_sample_alone_gets_the_same_directions_and_calls_are_counted():
    together, alone = (likelihood(samples, num_probes=2, dealt_probes=True) for samples in (SAMPLES, SAMPLES[2:3]))
    assert abs(float(alone.log_prob - together.log_prob[2])) < 1e-3 * NATS  # differences of float32 outputs
    assert alone.num_denoiser_calls == 17 * 3
    assert together.trace.endswith("2 probes per level on average")
    assert torch.allclose(together.trace_by_level.mean(1).sum(0), together.trace_log_prob)


def test_no_graph_is_kept_and_back_propagation_gives_nearly_the_same(monkeypatch):
    kept = []
    evaluate = OdeProblem.evaluate

    def noting(self, *arguments):
        node = evaluate(self, *arguments)
        kept.append(node.state)
        return node

    monkeypatch.setattr(OdeProblem, "evaluate", noting)
    by_differences, by_graph = (
        likelihood(num_probes=2, dealt_probes=True, estimator=estimator)
        for estimator in (None, AutodiffFisher(DENOISER))
    )
    assert len(kept) == 34 and not any(state.model_output.requires_grad for state in kept)
    assert bool(((by_differences.log_prob - by_graph.log_prob).abs() < 2e-3 * NATS).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_probes": 1}, "`num_probes` is 1. Pass `num_probes=2` or more"),
        ({"num_probes": None}, "`num_probes` is None"),
        ({"num_probes": 2, "fixed_probes": True}, "the same ones at all levels"),
    ],
)
def test_nothing_to_deal_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        likelihood(dealt_probes=True, **options)


def test_comparisons_need_shared_directions():
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(InputError, match="a comparison needs shared ones"):
        compare_likelihood(pipe, latents=latents, method="ode", dealt_probes=True)
    with pytest.raises(InputError, match="a comparison needs shared ones"):
        compare_checkpoints([pipe, pipe], latents=latents, dealt_probes=True)
