"""How good an embedded checkpoint is: reconstruction, classification and variety of its samples.

    python examples/benchmarks/embedded_checkpoint.py
    python examples/benchmarks/embedded_checkpoint.py --checkpoint outputs/snapshot --samples-only --guidance-scales 2

Needs Fashion-MNIST (Debian's dataset-fashion-mnist). Writes embedded_checkpoint.json, unless a folder is named. About
ten minutes on two cores; a Stable Diffusion 3 takes longer, for the stock call appends 256 empty tokens.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import save
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from tqdm.auto import tqdm

from diffusers_fisher import ClassifierReward, embedded_checkpoint, embedded_prompt
from diffusers_fisher.files import read_json

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist
from embedded_training import folder_size

Pipeline = StableDiffusionPipeline | StableDiffusion3Pipeline
CENTRE = (slice(None), slice(None), slice(2, -2), slice(2, -2))


@torch.no_grad()
def reconstruction(pipe: Pipeline, classifier: ClassifierReward, images, labels) -> dict[str, float]:
    """Returns the PSNR on the central 28x28 (data range 1) and how often reconstructions are classified right."""
    errors, right, right_real = [], 0, 0
    for batch, truth in tqdm(list(zip(images.split(250), labels.split(250), strict=True)), "reconstruct"):
        pixels = fashion_mnist.to_rgb(batch)
        outputs = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((((outputs - pixels) / 2)[CENTRE] ** 2).mean((1, 2, 3)))
        right += int((classifier.logits(outputs / 2 + 0.5).argmax(1) == truth).sum())
        right_real += int((classifier.logits(pixels / 2 + 0.5).argmax(1) == truth).sum())
    error = torch.cat(errors)
    return {
        "psnr_of_mean_error_db": float(-10 * error.mean().log10()),
        "mean_psnr_db": float(-10 * error.log10().mean()),
        "reconstructions_classified_right": right / len(images),
        "images_classified_right": right_real / len(images),
    }


def load_pipeline(folder: Path) -> Pipeline:
    """Loads the pipeline that the folder's index names."""
    name = read_json(folder / "model_index.json")["_class_name"]
    # diffusers requires these components of a Stable Diffusion 3, though the index has them as null.
    missing = {"text_encoder_3": None, "tokenizer_3": None} if name == StableDiffusion3Pipeline.__name__ else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **missing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Pipeline, guidance_scale: float, count: int) -> torch.Tensor:
    """Returns `count` images (10, count / 10, 3, 32, 32) in [0, 1], equally many of each class, by 25 steps."""
    generator = torch.Generator().manual_seed(0)
    classes = []
    for label in tqdm(range(10), f"guidance scale {guidance_scale}"):
        prompts = [embedded_prompt(label)] * (count // 10)
        arguments = {"num_inference_steps": 25, "guidance_scale": guidance_scale, "output_type": "pt"}
        classes.append(pipe(prompts, generator=generator, **arguments).images)
    return torch.stack(classes)


@torch.no_grad()
def generation(pipe, classifier: ClassifierReward, guidance_scale: float, count: int, real_spread) -> dict:
    """Returns how often samples are classified as prompted, and their spread per class relative to real images."""
    images = sample(pipe, guidance_scale, count)
    predictions = torch.stack([classifier.logits(group).argmax(1) for group in images])
    right = (predictions == torch.arange(10)[:, None]).float().mean(1)
    spread = torch.stack([group[CENTRE].mean(1).std(0).mean() for group in images])
    return {
        "count": count,
        "classified_as_prompted": float(right.mean()),
        "by_class": [round(float(value), 3) for value in right],
        "spread_relative_to_real": float(spread.mean() / real_spread.mean()),
        "spread_by_class": [round(float(value), 3) for value in spread / real_spread],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None, help="folder of another checkpoint than the embedded one")
    parser.add_argument("--data", default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--samples-only", action="store_true", help="leave the reconstructions out")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    arguments = parser.parse_args()
    folder = Path(arguments.checkpoint or embedded_checkpoint())
    pipe = load_pipeline(folder)
    network = pipe.transformer if isinstance(pipe, StableDiffusion3Pipeline) else pipe.unet
    owner = folder if (folder / "classifier").is_dir() else Path(embedded_checkpoint())
    classifier = ClassifierReward.from_pretrained(owner / "classifier", target=0)
    images, labels = fashion_mnist.load("test", arguments.data)
    centre = (images.float() / 255)[CENTRE][:, 0]
    real_spread = torch.stack([centre[labels == label].std(0).mean() for label in range(10)])
    result = {
        "unet_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": folder_size(folder),
        "reconstruction": None if arguments.samples_only else reconstruction(pipe, classifier, images, labels),
        "generation": {
            str(scale): generation(pipe, classifier, scale, arguments.count, real_spread)
            for scale in arguments.guidance_scales
        },
    }
    print(result)
    if arguments.checkpoint is None and not arguments.samples_only:
        save("embedded_checkpoint", result)


if __name__ == "__main__":
    main()
