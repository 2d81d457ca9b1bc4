"""Guides Stable Diffusion 1.5 by the LAION aesthetic predictor; the held-out reward is CLIP similarity to the prompt.

    python examples/guidance/aesthetic_stable_diffusion.py --head sac+logos+ava1-l14-linearMSE.pth \\
        --prompt "a cabin by a lake" --output outputs/aesthetic

The head is a file of 4 MB from github.com/christophschuhmann/improved-aesthetic-predictor; it is read as weights only.
On a GPU with 8 GB use `--dtype float16 --tiny-autoencoder madebyollin/taesd`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler

from diffusers_fisher import AestheticReward, StableDiffusionFisherPipeline, TextImageReward
from diffusers_fisher.files import check_writable
from diffusers_fisher.jobs.pages import Page, save_picture


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--head", type=Path, required=True, help="aesthetic head, .pth or .safetensors")
    result.add_argument("--prompt", nargs="+", default=["a cabin by a lake, oil painting"])
    result.add_argument("--checkpoint", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    result.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="the CLIP that the head was trained on"
    )
    result.add_argument(
        "--tiny-autoencoder", help="an autoencoder that decodes for the reward, faster and with less memory"
    )
    result.add_argument("--steps", type=int, default=25)
    result.add_argument("--guidance-steps", type=int, default=15)
    result.add_argument("--guidance-scale", type=float, default=7.5)
    result.add_argument("--step-size", type=float, default=0.1)
    result.add_argument("--size", type=int, help="height and width; the default is the checkpoint's own size")
    result.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--output", type=Path, default=Path("outputs/aesthetic"))
    return result


def guide(options: argparse.Namespace) -> Any:
    """Loads all networks and guides; returns a `GuidanceOutput` with tensors."""
    dtype = getattr(torch, options.dtype)
    reward = AestheticReward.from_pretrained(options.head, options.clip)
    similarity = TextImageReward.clip(path=options.clip)
    pipe = StableDiffusionFisherPipeline.from_pretrained(options.checkpoint, dtype=dtype).to(options.device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for part in (reward.model, reward.head, similarity.model):
        part.to(options.device)
    decoder = None
    if options.tiny_autoencoder:
        decoder = AutoencoderTiny.from_pretrained(options.tiny_autoencoder, dtype=dtype).to(options.device)
    return pipe.guide(
        options.prompt, reward, held_out_reward=similarity, num_guidance_steps=options.guidance_steps,
        step_size=options.step_size, num_inference_steps=options.steps, guidance_scale=options.guidance_scale,
        height=options.size, width=options.size, decoder=decoder, checkpoint_decoder=True, output_type="pt",
        generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip


def write(options: argparse.Namespace, out: Any) -> None:
    """Writes pictures before and after guidance, and a page with the curves."""
    from matplotlib.figure import Figure

    page = Page("Aesthetic guidance")
    for index, prompt in enumerate(options.prompt):
        page.heading(prompt)
        for name, images in (("before", out.initial_images), ("after", out.images)):
            save_picture(images[index], options.output / f"{index:03d}_{name}.png")
        before, after = float(out.rewards[0, index]), float(out.best_rewards[index])
        page.pictures([(out.initial_images[index], f"score {before:.2f}"), (out.images[index], f"score {after:.2f}")])
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, rows, label in zip(
        figure.subplots(1, 2), (out.rewards, out.held_out_rewards), ("aesthetic score", "CLIP cosine, held out"),
        strict=True,
    ):  # fmt: skip
        axes.plot(rows.numpy(), marker=".")
        axes.set(xlabel="run", ylabel=label)
    page.figure(figure, "Both by run. Where the held-out curve falls, the images exploit the score: stop there.")
    page.write(options.output / "index.html")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    check_writable(options.output)
    out = guide(options)
    write(options, out)
    print(f"{out.rewards[0].mean():.3f} to {out.best_rewards.mean():.3f}; {options.output / 'index.html'}")


if __name__ == "__main__":
    main()
