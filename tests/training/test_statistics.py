"""Statistics of the denoiser's features, with which a trace model standardises the features."""

import tiny
import torch
import trace_runs

from diffusers_fisher import StableDiffusionFisherPipeline
from diffusers_fisher.models.encoders import FEATURE_LEVELS
from diffusers_fisher.noise import log_noise_to_signal_range
from diffusers_fisher.training.pieces import Piece
from diffusers_fisher.training.samples import SampleSpace
from diffusers_fisher.training.statistics import fit_features
from diffusers_fisher.training.trace_config import make_trace_model
from diffusers_fisher.training.trace_losses import TraceDraw, noised_state


def test_features_have_mean_zero_and_deviation_one_on_training_data(tmp_path):
    """The noise is new. The level is one of the statistics: a random network's features jump between levels."""
    config = trace_runs.config_of(tmp_path, model={"features": True})
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    space = SampleSpace(pipe, latents=False)
    pixels = torch.rand(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    captions = ["a b"] * len(pixels)
    clean, denoiser = space.pack(pixels), space.denoiser(captions, pixels)
    levels = torch.linspace(*log_noise_to_signal_range(pipe.scheduler), FEATURE_LEVELS, dtype=torch.float64)
    level = levels[20].expand(len(clean))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    features = noised_state(denoiser, clean, TraceDraw(level, noise)).features
    model = make_trace_model(config, pipe, tuple(clean.shape[1:]), feature_channels=features.shape[1])
    pieces = [Piece(pixels[start : start + 64], captions[:64], []) for start in (0, 64)]
    fit_features(model, config, pieces, space)
    standardised_features = model.summaries.statistics.standardised(features, level)
    # 128 samples on both sides: a mean to 1/sqrt(64) = 0.12, a deviation to 9%; four times that over 16 channels.
    assert float(standardised_features.mean(0).abs().max()) < 0.5
    assert bool(((standardised_features.std(0) > 0.7) & (standardised_features.std(0) < 1.4)).all())
    second_model = make_trace_model(config, pipe, tuple(clean.shape[1:]), feature_channels=features.shape[1])
    fit_features(second_model, config, pieces, space)
    assert torch.equal(second_model.summaries.statistics.mean, model.summaries.statistics.mean)
    assert torch.equal(model.summaries.statistics.log_noise, levels.float())
