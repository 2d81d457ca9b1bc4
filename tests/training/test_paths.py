"""Paths are the points at which a likelihood evaluates the trace. They replace whole rows of a batch exactly."""

import pytest
import tiny
import torch

from diffusers_fisher import DirectFisher, NoiseLevel, StableDiffusionFisherPipeline
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.noise import expand
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training.paths import STEPS, Paths, follow_paths
from diffusers_fisher.training.pieces import Piece
from diffusers_fisher.training.samples import SampleSpace
from diffusers_fisher.training.trace_losses import draw_trace_batch


@pytest.fixture(scope="module")
def space():
    return SampleSpace(tiny.stable_diffusion(StableDiffusionFisherPipeline), latents=False)


@pytest.fixture(scope="module")
def paths(space):
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pieces = [Piece(pixels[:3], ["a b", "c", "d"], []), Piece(pixels[3:], ["e"], [])]
    return follow_paths(space, pieces, 0.0, 0.0, seed=0)


def test_points_are_the_states_at_which_a_likelihood_evaluates_the_trace(space, paths):
    states = []

    class Recorder(DirectFisher):
        def __call__(self, state, endpoint=None):
            states.append(state)
            return super().__call__(state)

    denoiser = space.denoiser(["a b", "c", "d"], torch.empty(3, 3, 16, 16))
    integrate_log_likelihood(denoiser, paths.clean[:3], Recorder(), Integration(STEPS[0], None))
    assert len(states) == STEPS[0] + 1
    for number, state in enumerate(states):
        rows = slice(3 * number, 3 * number + 3)
        assert paths.image[rows].tolist() == [0, 1, 2]
        level = NoiseLevel.from_log_noise_to_signal(paths.log_noise[rows])
        x = (
            expand(level.alpha, paths.clean[:3]) * paths.clean[:3]
            + expand(level.sigma, paths.clean[:3]) * paths.noise[rows]
        )
        # float32 networks round otherwise for rows that lie otherwise in memory, and the ODE carries this along.
        assert torch.allclose(x.float(), state.sample, rtol=1e-3, atol=1e-3)
    assert paths.noise[:3].abs().max() < 1e-5  # clean images have no noise; rounding, as above
    assert len(paths.image) == 3 * (STEPS[0] + 1) + STEPS[1] + 1 and paths.image[-1] == 3


def test_mixing_replaces_whole_rows(space, paths):
    count = 64
    draw = draw_trace_batch(space.pipe.scheduler, (4, 8, 8), count, 0, 0, mirrored=False, with_probes=True)
    samples, captions = torch.randn(count, 4, 8, 8), ["x"] * count
    mixture, clean, texts = paths.mix(draw, samples, captions, 0.5, step_generator(0), count, slice(None))
    is_caption = torch.tensor([text == "x" for text in texts])
    assert 16 < int(is_caption.sum()) < 48
    assert torch.equal(clean[is_caption], samples[is_caption]) and torch.equal(
        mixture.noise[is_caption], draw.noise[is_caption]
    )
    assert torch.equal(mixture.probes, draw.probes)
    for row in (~is_caption).nonzero()[:, 0].tolist():
        point = (paths.noise == mixture.noise[row]).flatten(1).all(1) & (paths.log_noise == mixture.log_noise[row])
        image = int(paths.image[point.nonzero()[0, 0]])
        # The first points of all images have no noise and the same level: each of their images is right.
        images = set(paths.image[point].tolist())
        assert any(torch.equal(clean[row], paths.clean[i]) and texts[row] == paths.captions[i] for i in images), image


def test_parts_of_a_batch_are_those_of_the_whole(space, paths):
    def mix(part):
        scheduler = space.pipe.scheduler
        draw = draw_trace_batch(scheduler, (4, 8, 8), 8, 0, 0, part, mirrored=False, with_probes=True)
        samples, captions = torch.zeros(8, 4, 8, 8)[part], ["x"] * len(range(8)[part])
        return paths.mix(draw, samples, captions, 0.5, step_generator(0), 8, part)

    batch, parts = mix(slice(0, 8)), [mix(slice(0, 3)), mix(slice(3, 8))]
    assert torch.equal(batch[0].noise, torch.cat([part[0].noise for part in parts]))
    assert torch.equal(batch[0].log_noise, torch.cat([part[0].log_noise for part in parts]))
    assert torch.equal(batch[1], torch.cat([part[1] for part in parts]))
    assert batch[2] == parts[0][2] + parts[1][2]


def test_fractions_of_zero_and_one_replace_no_row_and_every_row(space, paths):
    draw = draw_trace_batch(space.pipe.scheduler, (4, 8, 8), 8, 0, 0, mirrored=False)
    samples = torch.randn(8, 4, 8, 8)
    assert paths.mix(draw, samples, ["x"] * 8, 0.0, step_generator(0), 8, slice(None))[2] == ["x"] * 8
    assert "x" not in paths.mix(draw, samples, ["x"] * 8, 1.0, step_generator(0), 8, slice(None))[2]


def test_loading_restores_what_was_saved(paths, tmp_path):
    paths.save(tmp_path / "paths.safetensors")
    result = Paths.load(tmp_path / "paths.safetensors")
    assert result.captions == paths.captions
    for name in ("clean", "image", "noise", "log_noise"):
        assert torch.equal(getattr(result, name), getattr(paths, name))
