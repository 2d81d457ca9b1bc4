"""The distillation on a few random images writes a folder for stock diffusers, and its formulas are LCMScheduler's."""

import sys

import pytest
import torch
import train_student as example
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

CONFIG = {
    "seed": 0, "mixed_precision": "no", "caption_dropout": 0.0, "guidance_scale": 2.0, "solver_steps": 10,
    "distillation": {
        "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 1,
        "ema_decay": 0.9, "save_every": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher_pipe():
    return example.load_teacher()


def test_stock_diffusers_samples_the_student_in_few_steps(data, tmp_path, monkeypatch, teacher_pipe):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": str(data), "output": str(tmp_path / "output")}))
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "argv", ["train_student.py", "--config", str(path)])
    example.main()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "output" / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, LCMScheduler)
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    images = pipe("a photo of a bag", generator=torch.Generator().manual_seed(0), **arguments).images
    assert images.shape == (1, 32, 32, 3) and images.std() > 0
    changed = [
        not torch.equal(own, other)
        for own, other in zip(pipe.unet.parameters(), teacher_pipe.unet.parameters(), strict=True)
    ]
    assert all(changed)


def test_the_consistency_function_is_that_of_the_scheduler(teacher_pipe):
    scheduler = LCMScheduler.from_config(teacher_pipe.scheduler.config)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x, epsilon = torch.randn(2, 1, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        step = scheduler.step(epsilon, t, x, generator=generator)
        ours = example.consistency(scheduler, epsilon, x, t[None])
        assert torch.allclose(ours, step.denoised, rtol=1e-4, atol=1e-4)


def test_the_teacher_takes_steps_of_guided_ddim(teacher_pipe):
    settings = example.Optimisation(**CONFIG["distillation"])
    config = example.Config(**{**CONFIG, "data": "", "output": "", "distillation": settings})
    teacher = example.Teacher(teacher_pipe, config)
    assert teacher.grid.tolist() == list(range(99, 1000, 100))
    generator = torch.Generator().manual_seed(0)
    x, embeds, empty = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (16, 128), (16, 128)))
    ours = teacher.step(x, torch.tensor([4]), embeds, empty)
    scheduler = DDIMScheduler.from_config(teacher_pipe.scheduler.config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        low, high = (teacher_pipe.unet(x, 499, each).sample for each in (empty, embeds))
    expected = scheduler.step(low + 2.0 * (high - low), 499, x).prev_sample
    assert torch.allclose(ours, expected, atol=1e-5)
