"""The validation gives the same numbers in pieces of any size, and holds the graph of one piece at a time."""

import dataclasses
import weakref

import pytest
import tiny
import torch
import trace_runs

from diffusers_fisher import StableDiffusionFisherPipeline
from diffusers_fisher.training import trace_validation
from diffusers_fisher.training.pieces import Piece
from diffusers_fisher.training.samples import SampleSpace
from diffusers_fisher.training.trace_config import make_trace_model


@pytest.fixture
def validate_pieces(tmp_path):
    """Makes a function that validates an untrained model on five samples in pieces of a size."""
    base = trace_runs.config_of(tmp_path)
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    held_out = Piece(pixels, ["a b", "c", None, "d", "e"], [])

    def run(size):
        config = dataclasses.replace(base, optimisation=dataclasses.replace(base.optimisation, batch_size=size))
        space = SampleSpace(pipe, latents=False, piece_size=config.piece_size(1))
        model = make_trace_model(config, pipe, tuple(space.pack(pixels[:1]).shape[1:])).eval()
        return trace_validation.validate(model, space, held_out, config)

    return run


def test_pieces_of_any_size_give_the_same_numbers(validate_pieces):
    reference = validate_pieces(5)
    assert reference.model.shape == (3, 5) and reference.jacobian.std(1).min() > 0
    for size in (1, 2):
        parts = validate_pieces(size)
        for name in ("model", "jacobian", "squared_error"):  # batches of a float32 network round otherwise
            assert torch.allclose(getattr(parts, name), getattr(reference, name), rtol=1e-4, atol=1e-5), name


def test_the_graph_of_a_piece_is_freed_before_the_next_piece(validate_pieces, monkeypatch):
    noised_state, outputs = trace_validation.noised_state, []

    def noised_state_and_reference(*args, **kwargs):
        assert all(output() is None for output in outputs), "the graph of the piece before is still held"
        state = noised_state(*args, **kwargs)
        outputs.append(weakref.ref(state.model_output))
        return state

    monkeypatch.setattr(trace_validation, "noised_state", noised_state_and_reference)
    validate_pieces(2)
    assert len(outputs) == 9


def test_the_size_of_pieces_is_the_part_of_one_process(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"batch_size": 8, "gradient_accumulation": 2})
    assert [config.piece_size(count) for count in (1, 2, 4)] == [4, 2, 1]
