"""The baselines of guidance, on two steps of tiny pipelines."""

import itertools
import json
import math

import guidance_baseline_methods as baselines
import guidance_baselines as benchmark
import pytest
import tiny
import torch
from guidance_problem import Source

from diffusers_fisher import LinearReward, fisher_pipeline

PROMPTS = ["a b", "c"]
REWARD = LinearReward(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5)))
PRICES = {"denoise": 1.0, "denoise backward": 3.0, "decode": 1.0, "decode backward": 3.0}
PRICES |= {f"student {kind}": price for kind, price in PRICES.items()}
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pipe():
    return tiny.quiet(fisher_pipeline(tiny.stable_diffusion()))


def task(pipe, **changes):
    return baselines.Task(pipe, REWARD, PROMPTS, NOISE, 2, 2.0, **{"prices": PRICES, "budget": 40.0, **changes})


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_sampler_is_the_pipelines_own(name):
    stock = tiny.quiet(tiny.stable_diffusion() if name == "sd" else tiny.stable_diffusion_3(texts=True))
    noise = NOISE if name == "sd" else torch.randn(2, stock.transformer.config.in_channels, 8, 8)
    counts = baselines.Counter()
    sampler = baselines.Sampler(stock, PROMPTS, 2.0, 3, counts)
    with torch.no_grad():
        images = sampler.images(noise)
    expected = stock(
        PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="pt", height=images.shape[-2],
        width=images.shape[-1],
    ).images  # fmt: skip
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)  # the run rounds its levels to float32
    assert counts == {"denoise": 6, "decode": 2}


def test_noise_that_is_added_has_the_variance_of_its_level(pipe):
    sampler = baselines.Sampler(pipe, PROMPTS, 2.0, 4, baselines.Counter())
    basis = torch.eye(4)[:, None]  # the clean sample, the noise, and two fresh noises, as axes
    for step in range(4):
        stochastic = sampler.move(basis[0], basis[1], step, basis[2])
        assert stochastic[0, 0] == pytest.approx(sampler.alphas[step + 1])
        assert float(stochastic[0, 1:].norm()) == pytest.approx(sampler.sigmas[step + 1], rel=1e-5)
        back = sampler.back(sampler.move(basis[0], basis[1], step), step, basis[3])
        assert back[0, 0] == pytest.approx(sampler.alphas[step])
        assert float(back[0, 1:].norm()) == pytest.approx(sampler.sigmas[step], rel=1e-5)


ONE_RUN = {"denoise": 4, "decode": 2}  # of two steps, for two prompts
COUNTS = {
    "best of N": ONE_RUN,
    "exact ascent": {"denoise backward": 4, "decode backward": 2},
    "DNO": {"denoise backward": 4, "decode backward": 2},
    "ReNO, student": {"student denoise backward": 2, "student decode backward": 2},
    "MPGD": {"decode backward": 4, **ONE_RUN},
    "DPS": {"denoise backward": 4, "decode backward": 4, "decode": 2},
    "FreeDoM": {"denoise backward": 6, "decode backward": 6, "decode": 2},  # the second step is repeated
    "FK steering": {"denoise": 32, "decode": 32},  # 8 particles, resampled once
    "guide, full runs": {"denoise": 18, "decode backward": 4, "decode": 2},  # 3 runs, and 3 products
    "guide, few steps": {"denoise": 28, "decode backward": 2, "decode": 4},  # 2 of 5 steps, a full one
}


@pytest.mark.parametrize("name", baselines.METHODS)
def test_every_method_gains_at_a_cost_that_is_counted(name, pipe):
    work = task(pipe, student=pipe)
    method = baselines.METHODS[name]
    strength = method.strengths[len(method.strengths) // 2]
    before = tiny.snapshot(pipe)
    count = 1 if method.yields_once else 4
    with torch.no_grad():
        rewards = []
        for images in itertools.islice(method.run(work, strength), count):
            rewards.append(REWARD(images, PROMPTS))
            if len(rewards) == 1:
                assert work.counts == COUNTS[name]
        unguided = REWARD(work.sampler().images(NOISE), PROMPTS)
    best = torch.stack(rewards).max(0).values
    assert images.shape == (2, 3, 16, 16)
    assert bool((best >= unguided - 1e-4).all()) and float((best - unguided).sum()) > 0
    assert before == tiny.snapshot(pipe)


def test_per_step_directions_are_those_of_the_papers(pipe):
    """The gradient of MPGD is at the predicted clean sample, and that of DPS and FreeDoM goes through the network."""
    work = task(pipe)
    sampler = work.sampler()
    with torch.enable_grad():
        leaf = NOISE.clone().requires_grad_()
        clean, noise = sampler.predict(leaf, 0)
        (through_network,) = torch.autograd.grad(REWARD(sampler.decode(clean), PROMPTS).sum(), leaf)
    moved, direction = baselines._step_and_direction(work, sampler, NOISE, 0)
    torch.testing.assert_close(
        direction, through_network / through_network.flatten(1).norm(dim=1)[:, None, None, None]
    )
    torch.testing.assert_close(moved, sampler.move(clean, noise, 0).detach())


def test_particles_are_resampled_by_their_weights():
    log_weights = torch.tensor([[0.0, 50.0], [math.log(3), 0.0], [-50.0, 0.0]]).repeat_interleave(100, 0)
    ancestors = baselines.resample(log_weights, torch.Generator().manual_seed(0))
    first, second = ancestors.T // 100
    assert float((first == 1).double().mean()) == pytest.approx(0.75, abs=0.09)  # 3.5 standard deviations
    assert not bool((first == 2).any()) and bool((second == 0).all())
    particles = torch.tensor([[10, 20], [11, 21], [12, 22]]).flatten()[:, None]  # three of each of two prompts
    chosen = baselines.choose(particles, torch.tensor([[2, 0], [1, 1]]))
    assert chosen.flatten().tolist() == [12, 20, 11, 21]


def test_rows_are_compared_sample_by_sample():
    reference = {"rewards": [[0, 0], [1, 2]], "held_out": [[0, 0], [5, 5]], "seconds": [1, 1], "costs": [1, 2]}
    mine = {"rewards": [[0, 4], [3, 1]], "held_out": [[0, 7], [4, 9]], "seconds": [2, 3], "costs": [1, 2]}
    evaluations = {"evaluations": {}}
    summary = benchmark.summarise([mine | evaluations], [reference | evaluations])
    assert (summary["reward"], summary["reward_difference"]) == (3.5, 2)  # the second sample's best is its first
    assert (summary["held_out"], summary["held_out_difference"]) == (5.5, 0.5)
    assert summary["held_out_difference_error"] == pytest.approx(1.5)  # differences -1 and 2
    assert (summary["seconds"], summary["cost"], summary["curve"]) == (5, 2, [2, 3.5])


@pytest.mark.slow
def test_tiny_comparison_computes_nothing_twice(tmp_path, monkeypatch, capsys):
    names = ("guide, few steps", "best of N", "DPS")
    monkeypatch.setattr(benchmark, "METHODS", {name: baselines.METHODS[name] for name in names})
    arguments = ["--tiny", "--records", str(tmp_path)]
    benchmark.main([*arguments, "--expect"])
    assert "hours" in capsys.readouterr().out
    assert len(list((tmp_path / "records").iterdir())) == 1  # the prices
    benchmark.main(arguments)
    monkeypatch.setattr(benchmark, "row", lambda *_: pytest.fail("computed twice"))
    monkeypatch.setattr(benchmark.row, "__name__", "row")
    comparison = benchmark.make_comparison(benchmark.TINY, Source(), 2, 2)
    cells = benchmark.Cells(tmp_path, benchmark.TINY, Source(), runs=2, search=2, with_student=False)
    result = benchmark.compare(comparison, cells)
    json.dumps(result, allow_nan=False)
    assert list(result["rewards"]) == ["another class", "left minus right", "inpainting"]
    for rows in result["rewards"].values():
        assert list(rows["methods"]) == list(names)
        assert rows["methods"][names[0]]["reward_difference"] == 0
        searched = rows["searched"]["DPS"]
        assert searched["best"] == float(max(list(searched)[:5], key=lambda strength: searched[strength]))
    figure = benchmark.picture(result)
    assert [axes.get_title() for axes in figure.axes[:3]] == list(result["rewards"])
