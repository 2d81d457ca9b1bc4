"""The likelihood studies resume only with records of the same pipeline."""

import sys
from pathlib import Path

import fashion_mnist
import pytest
import torch

from diffusers_fisher import (
    CoarseGridWarning,
    InputError,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_test_images,
)

sys.path.insert(0, str(Path(fashion_mnist.__file__).parent / "likelihood"))
import out_of_distribution
import sample_ranking
import which_prompt


def match_prompts(pipe, count, folder):
    return which_prompt.choose_prompts(pipe, "likelihood", which_prompt.likelihood, count, 4, folder)


@pytest.mark.filterwarnings(f"ignore::{CoarseGridWarning.__module__}.CoarseGridWarning")
@pytest.mark.parametrize(
    "study",
    [out_of_distribution.evaluate, sample_ranking.evaluate, match_prompts],
    ids=["out_of_distribution", "sample_ranking", "which_prompt"],
)
def test_records_of_another_trace_model_are_refused(monkeypatch, tmp_path, study):
    images, labels = embedded_test_images()
    dataset = (images[:1, :1] * 255).round().to(torch.uint8), labels[:1]
    monkeypatch.setattr(fashion_mnist, "load", lambda split: dataset)
    for module in (out_of_distribution, sample_ranking):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setitem(sample_ranking.SAMPLING, "num_inference_steps", 2)
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    first = study(pipe, 1, tmp_path)
    assert str(study(pipe, 1, tmp_path)) == str(first)
    with torch.no_grad():
        next(pipe.trace_model.parameters()).add_(1e-3)
    with pytest.raises(InputError, match="holds records of other settings: `weights` was"):
        study(pipe, 1, tmp_path)
