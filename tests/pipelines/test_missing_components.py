"""Components that were saved as None: diffusers wants them passed, the Fisher pipelines do not."""

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline

from diffusers_fisher import StableDiffusion3FisherPipeline
from diffusers_fisher.files import read_json

TEXT_PARTS = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]


@pytest.fixture
def folder(tmp_path):
    tiny.stable_diffusion_3().save_pretrained(tmp_path)
    return tmp_path


def test_diffusers_asks_for_components_that_the_index_has_as_null(folder):
    index = read_json(folder / "model_index.json")
    assert [index[name] for name in TEXT_PARTS] == [[None, None]] * 6
    with pytest.raises(ValueError, match=r"expected \[.*'text_encoder_3'.*\], but only"):
        StableDiffusion3Pipeline.from_pretrained(folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **dict.fromkeys(TEXT_PARTS))
    assert pipe.text_encoder_3 is None


def test_components_saved_as_none_need_not_be_passed(folder):
    pipe = StableDiffusion3FisherPipeline.from_pretrained(folder)
    assert [getattr(pipe, name) for name in TEXT_PARTS] == [None] * 6
    words = tiny.tokenizer()
    assert StableDiffusion3FisherPipeline.from_pretrained(folder, tokenizer=words).tokenizer is words
    expected = StableDiffusion3Pipeline.from_pretrained(folder, **dict.fromkeys(TEXT_PARTS)).transformer.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.transformer.state_dict().items())
