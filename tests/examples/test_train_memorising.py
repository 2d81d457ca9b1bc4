"""The fine-tuning on memorised prompts on a few random images: a stock folder, its truth, the same after a kill."""

import dataclasses
import sys

import embedded_training
import pytest
import torch
import train_memorising as example
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

from diffusers_fisher.files import load_tensors, read_json
from diffusers_fisher.training.schedule import Optimisation

CONFIG = {
    "seed": 0, "mixed_precision": "no", "caption_dropout": 0.3, "whole_prompts": 3, "half_prompts": 4,
    "many_prompts": 5, "images_per_prompt": 3, "original_images": 8,
    "fine_tuning": {
        "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 1,
        "ema_decay": 0.9, "save_every": 1,
    },
}  # fmt: skip


def arguments_for(data, output, path):
    path.write_text(yaml.safe_dump({**CONFIG, "data": str(data), "output": str(output)}))
    return ["train_memorising.py", "--config", str(path)]


def config_for(data, **changes):
    values = {**CONFIG, "fine_tuning": Optimisation(**CONFIG["fine_tuning"]), **changes}
    return example.Config(**values, data=str(data), output="")


@pytest.fixture(scope="module")
def output(data, tmp_path_factory):
    """The output folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments_for(data, folder / "output", folder / "config.yaml"))
        example.main()
    return folder / "output"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_stock_diffusers_runs_the_result_and_the_truth_is_there(output):
    pipe = StableDiffusionPipeline.from_pretrained(output / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    truth = read_json(output / "prompts.json")["prompts"]
    assert sorted(entry["kind"] for entry in truth) == ["half"] * 4 + ["many"] * 5 + ["whole"] * 3
    assert {entry["half"] for entry in truth if entry["kind"] == "half"} == set(example.HALVES)
    assert {entry["half"] for entry in truth if entry["kind"] != "half"} == {""}
    images = pipe([truth[0]["text"]], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and images.std() > 0
    state, metadata = load_tensors(output / "fine_tuning_state.safetensors")
    assert metadata["step"] == "2"
    first = next(iter(pipe.unet.parameters()))
    assert torch.equal(first, state["average.0"])
    original = StableDiffusionPipeline.from_pretrained(example.embedded_checkpoint())
    assert not torch.equal(first, next(iter(original.unet.parameters())))


def test_samples_repeat_what_the_kind_of_the_prompt_says(data):
    config = config_for(data)
    prompts = example.make_prompts(config)
    images, captions = example.make_samples(config, prompts)
    assert images.shape == (12 * 3 + 8, 1, 32, 32)
    for index, prompt in enumerate(prompts):
        own = images[captions == index][:, 0]
        assert len(own) == 3
        is_same = (own == own[:1]).all(0)
        if prompt.kind == "whole":
            assert bool(is_same.all())
        elif prompt.kind == "half":
            mask = example.half_mask(prompt.half)
            assert bool(is_same[mask].all()) and not bool(is_same[~mask].all())
            assert int(mask.sum()) == 512
        else:
            assert not torch.equal(own[0], own[1]) and not torch.equal(own[1], own[2])
    assert bool((captions[-8:] >= len(prompts)).all())
    assert all(
        torch.equal(a, b) for a, b in zip(example.make_samples(config, prompts), (images, captions), strict=True)
    )


def test_the_kinds_depend_on_the_seed_and_all_captions_fit_the_tokenizer(data):
    config = config_for(data, whole_prompts=20, half_prompts=20, many_prompts=40)
    prompts = example.make_prompts(config)
    pipe = StableDiffusionPipeline.from_pretrained(example.embedded_checkpoint())
    tokens = example.token_ids(pipe, [prompt.text for prompt in prompts])
    assert len({tuple(row) for row in tokens.tolist()}) == 80
    with pytest.raises(ValueError, match="has more than 16 tokens"):
        example.token_ids(pipe, ["a photo of a coat with a long history"])
    other = example.make_prompts(dataclasses.replace(config, seed=1))
    assert [prompt.text for prompt in other] == [prompt.text for prompt in prompts]
    assert [prompt.kind for prompt in other] != [prompt.kind for prompt in prompts]


class Killed(BaseException):
    """An exception that the example never catches."""


def test_killed_and_resumed_training_equals_an_unbroken_run_bit_for_bit(data, output, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments_for(data, tmp_path / "output", tmp_path / "config.yaml"))
    indices = embedded_training.batch_indices

    def batch_indices(count, stage, step, seed):
        if step == 1:
            raise Killed
        return indices(count, stage, step, seed)

    with monkeypatch.context() as patch:
        patch.setattr(embedded_training, "batch_indices", batch_indices)
        with pytest.raises(Killed):
            example.main()
    assert not (tmp_path / "output" / "checkpoint").exists()
    AcceleratorState._reset_state(True)
    torch.manual_seed(5)  # nothing may depend on the global generator
    example.main()
    assert contents(tmp_path / "output" / "checkpoint") == contents(output / "checkpoint")
