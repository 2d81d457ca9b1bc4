"""Draws class morphing and inpainting on the embedded checkpoint: pictures of the docs.

python examples/guidance/embedded_pictures.py            # writes docs/images/guidance_*.png
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from diffusers_fisher import (
    ClassifierReward,
    MeasurementReward,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    posterior_guidance,
)
from diffusers_fisher.files import check_writable, save_figure

PICTURES = Path(__file__).parents[2] / "docs" / "images"
SAMPLING: dict[str, Any] = {"guidance_scale": 2.0}
PAIRS = ((7, 9), (3, 0), (8, 5), (1, 6))  # from one class to another: sneaker to ankle boot, ...


def pipeline() -> Any:
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def morphing(pipe: Any, steps: int, iterations: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Returns the best images (4, 3, 32, 32) after each number of guidance steps toward another class."""
    prompts = [embedded_prompt(begin) for begin, _ in PAIRS]
    reward = ClassifierReward.from_pretrained(
        Path(embedded_checkpoint()) / "classifier", target=[end for _, end in PAIRS]
    )
    rows = {}
    for count in iterations:
        out = pipe.guide(
            prompts, reward, num_guidance_steps=count, num_inference_steps=steps, output_type="pt",
            generator=torch.Generator().manual_seed(3), **SAMPLING,
        )  # fmt: skip
        rows[f"{count} guidance steps"] = out.images
    return rows


def strip(pipe: Any, steps: int, iterations: int, count: int = 8) -> dict[str, torch.Tensor]:
    """Returns the first `count` sneakers of a seed, before and after guidance to ankle boots; none is left out."""
    reward = ClassifierReward.from_pretrained(Path(embedded_checkpoint()) / "classifier", target="ankle boot")
    out = pipe.guide(
        [embedded_prompt(7)] * count, reward, num_guidance_steps=iterations, num_inference_steps=steps,
        output_type="pt", generator=torch.Generator().manual_seed(0), **SAMPLING,
    )  # fmt: skip
    return {
        '"a photo of a sneaker"': out.initial_images,
        f"after {iterations} guidance steps to an ankle boot": out.images,
    }


def inpainting(pipe: Any, steps: int, iterations: int) -> dict[str, torch.Tensor]:
    """Returns real images whose lower half was filled in, through the whole run and step by step."""
    images, labels = embedded_test_images()
    classes = [7, 3, 8, 4]
    targets = torch.stack([images[labels == label][0] for label in classes])
    prompts = [embedded_prompt(label) for label in classes]
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    reward = MeasurementReward(targets, mask)
    seeded = torch.Generator().manual_seed(3)
    out = pipe.guide(
        prompts, reward, num_guidance_steps=iterations, num_inference_steps=steps, output_type="pt", generator=seeded,
        **SAMPLING,
    )  # fmt: skip
    with posterior_guidance(pipe, reward, strength=0.4) as guidance:
        stepwise = pipe(
            prompts, num_inference_steps=steps, output_type="pt", callback_on_step_end=guidance,
            generator=torch.Generator().manual_seed(3), **SAMPLING,
        ).images  # fmt: skip
    return {
        "known": torch.where(mask > 0, targets, 0.5),
        "without guidance": out.initial_images,
        f"initial noise, {iterations} guidance steps": out.images,
        "step by step, one run": stepwise,
        "the whole image": targets,
    }


def picture(rows: dict[str, torch.Tensor]) -> Figure:
    """Draws one row of images per entry."""
    width = 1.25 * max(len(images) for images in rows.values())
    figure = Figure(figsize=(width, 1.5 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(torch.cat(list(images), dim=-1).permute(1, 2, 0).clamp(0, 1))
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_axis_off()
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURES)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-steps", type=int, default=12)
    options = parser.parse_args(arguments)
    check_writable(options.output)
    pipe, max_steps = pipeline(), options.guidance_steps
    counts = tuple(sorted({0, max_steps // 4, max_steps // 2, max_steps}))
    save_figure(picture(strip(pipe, options.steps, max_steps)), options.output / "sneakers_to_boots.png")
    save_figure(picture(morphing(pipe, options.steps, counts)), options.output / "guidance_morphing.png")
    save_figure(picture(inpainting(pipe, options.steps, max_steps)), options.output / "guidance_inpainting.png")


if __name__ == "__main__":
    main()
