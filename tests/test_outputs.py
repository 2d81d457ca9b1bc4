"""Outputs as plain values, as tables and as figures: on real outputs of tiny pipelines."""

import json
import math

import pandas
import pytest
import tiny
import torch

from diffusers_fisher import GuidanceOutput, guide, intrinsic_dimension, likelihood_bound, log_likelihood, memorisation


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel()


@pytest.fixture(scope="module")
def likelihood(pipe):
    latents = torch.randn(2, 1, 4, 4, generator=seed(0))
    return log_likelihood(pipe, latents=latents, num_inference_steps=12, generator=seed(0))


def test_a_likelihood_is_plain_values_of_its_fields(likelihood):
    values = json.loads(json.dumps(likelihood.to_dict(), allow_nan=False))
    assert values["log_prob"] == likelihood.log_prob.tolist()
    assert values["bits_per_dim"] == likelihood.bits_per_dim.tolist()
    assert values["dims"] == 16 and values["status"] is None
    assert torch.tensor(values["final_latents"]).shape == likelihood.final_latents.shape


def test_a_likelihood_is_a_table_with_one_row_per_image(likelihood):
    table = likelihood.to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 2
    assert table["bits_per_dim"].tolist() == likelihood.bits_per_dim.tolist()
    assert "status" not in table and "noise_to_signal" not in table


def test_numbers_that_are_not_finite_are_none(likelihood):
    values = {**likelihood.__dict__, "trace_error": torch.tensor([math.inf, 0.5])}
    assert type(likelihood)(**values).to_dict()["trace_error"] == [None, 0.5]


def test_a_likelihood_and_a_dimension_draw_themselves(pipe, likelihood):
    label = likelihood.plot(index=1).axes[0].get_legend().get_texts()[0].get_text()
    assert f"{float(likelihood.bits_per_dim[1]):.3f}" in label
    latents = torch.randn(2, 1, 4, 4, generator=seed(0))
    dimension = intrinsic_dimension(pipe, latents=latents, generator=seed(0))
    assert dimension.to_pandas()["value"].tolist() == dimension.value.tolist()
    assert len(dimension.plot(1).axes[0].lines) == 1


def test_bounds_and_memorisation_are_tables(pipe):
    latents = torch.randn(2, 1, 4, 4, generator=seed(0))
    bound = likelihood_bound(pipe, latents=latents, num_inference_steps=4, num_draws=2, generator=seed(0))
    assert bound.to_pandas()["bits_per_dim"].tolist() == bound.bits_per_dim.tolist()
    found = memorisation(pipe, ["a", "b"], num_draws=2, generator=seed(0), height=8, width=8)
    assert list(found.to_pandas()) == ["score_difference", "score_error", "trace_difference", "trace_error"]
    without = memorisation(pipe, ["a", "b"], num_draws=2, num_probes=0, generator=seed(0), height=8, width=8)
    assert list(without.to_pandas()) == ["score_difference", "score_error"]


def test_a_guidance_is_a_table_by_run_and_sample():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    out = GuidanceOutput(
        images=[object(), object()], rewards=rewards, best_rewards=rewards.max(0).values, latents=torch.zeros(2, 1),
        gradient_norms=torch.ones(1, 2), seconds=torch.ones(2), num_denoiser_calls=4, whiteness=rewards / 10,
        held_out_rewards=torch.empty(0, 2),
    )  # fmt: skip
    table = out.to_pandas()
    assert table.to_dict("list") == {
        "run": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "reward": [1.0, 2.0, 3.0, 1.0],
        "whiteness": (rewards / 10).flatten().tolist(),
    }  # fmt: skip
    assert "images" not in out.to_dict() and out.to_dict()["rewards"] == rewards.tolist()
    assert [axes.get_ylabel() for axes in out.plot().axes] == ["reward"]
    assert out.plot().axes[0].lines[-1].get_ydata().tolist() == [1.5, 2.0]


def test_a_guidance_with_a_held_out_reward_draws_both():
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    out = guide(pipe, "a b", brightness, held_out_reward=brightness, num_guidance_steps=1, num_inference_steps=2)
    assert [axes.get_ylabel() for axes in out.plot().axes] == ["reward", "held_out_reward"]
    assert json.dumps(out.to_dict(), allow_nan=False)
