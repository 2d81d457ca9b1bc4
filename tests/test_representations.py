"""What a console shows of denoisers and rewards: one short line with what matters, and no address."""

import tiny
import torch

from diffusers_fisher import (
    ClassifierReward,
    LinearReward,
    MeasurementReward,
    PipelineDenoiser,
    WeightedReward,
    embedded_checkpoint,
    gaussian_blur,
)


def test_a_denoiser_names_its_scheduler_its_scale_and_its_cost():
    pipe = tiny.one_channel()
    denoiser = PipelineDenoiser(pipe, prompt="a b")
    denoiser(torch.zeros(1, 1, 4, 4), 500)
    scheduler = type(pipe.scheduler).__name__
    start = f"<PipelineDenoiser: {pipe.scheduler.config.prediction_type}, {scheduler}, "
    assert repr(denoiser).startswith(start) and repr(denoiser).endswith("1 evaluations so far>")
    assert "guidance scale 3" in repr(PipelineDenoiser(pipe, guidance_scale=3.0, prompt="a b"))


def test_rewards_name_what_they_reward():
    reward = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target=["ankle boot", "bag"])
    assert repr(reward) == f"ClassifierReward({type(reward.model).__name__}, target=['ankle boot', 'bag'])"
    linear = LinearReward.left_minus_right(8, 8)
    assert repr(linear) == f"LinearReward(weights of shape {tuple(linear.weights.shape)})"
    mask = torch.zeros(8, 8)
    mask[:2] = 1
    measurement = MeasurementReward(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), mask)
    assert repr(measurement) == "MeasurementReward(target of shape (1, 3, 8, 8), 25% known)"
    blurred = MeasurementReward(torch.zeros(1, 3, 8, 8), operator=gaussian_blur(1.0))
    assert "100% known, operator=" in repr(blurred)
    assert repr(WeightedReward((0.5, linear))) == f"WeightedReward((0.5, {linear!r}))"
