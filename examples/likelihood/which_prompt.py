"""Which of ten prompts fits an image? By log-likelihoods of the embedded checkpoint, on test images.

    python examples/likelihood/which_prompt.py --images 1000

All prompts of an image see the same noise, or with `--method likelihood` the same grid of noise levels. The network is
in bfloat16, which is faster and changes few choices. The example needs Fashion-MNIST (see examples/fashion_mnist.py).
Results are kept in --output, and a second run continues from them.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from diffusers_fisher import CoarseGridWarning, StableDiffusionFisherPipeline, embedded_checkpoint, embedded_prompt
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.guidance import ImageInput
from diffusers_fisher.jobs.identity import pipeline_digests
from diffusers_fisher.jobs.records import Records
from diffusers_fisher.seeds import step_generator

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

BATCH = 250
PROMPTS = [embedded_prompt(label) for label in range(10)]

Score = Callable[[Any, torch.Tensor, int, torch.Generator], torch.Tensor]
"""`score(pipe, latents, calls, generator)` -> (10, B), higher for the prompt that fits; `calls` per prompt."""


def likelihood(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Returns scores (10, B), higher for the prompt that fits."""
    options = {"num_inference_steps": calls - 1, "generator": generator}
    return _checked_log_prob(pipe.compare_likelihood(None, PROMPTS, latents=latents, method="ode", **options), calls)


def weighted_squared_error(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Returns scores (10, B), higher for the prompt that fits."""
    options = {"num_levels": calls, "generator": generator}
    return _checked_log_prob(
        pipe.compare_likelihood(None, PROMPTS, latents=latents, method="squared error", **options), calls
    )


def _checked_log_prob(table: Any, calls: int) -> torch.Tensor:
    if table.num_denoiser_calls != calls * len(PROMPTS):
        raise RuntimeError(f"{table.num_denoiser_calls} denoiser calls for {len(PROMPTS)} prompts, not {calls} each.")
    return table.log_prob


METHODS: dict[str, Score] = {"weighted squared error": weighted_squared_error, "likelihood": likelihood}


def choose_prompts(pipe: Any, name: str, score: Score, count: int, calls: int, folder: Path) -> list[int]:
    """Returns the label of the prompt that the method `score`, called `name`, chooses for every image."""
    images, _ = fashion_mnist.load("test")
    records = Records(folder / name.replace(" ", "_") / str(calls), {"batch": BATCH, **pipeline_digests(pipe)})
    labels: list[int] = []
    for start in tqdm(range(0, count, BATCH), f"{name}, {calls} calls"):
        key = f"{start:06d}"
        if key not in records.done():
            with torch.no_grad():
                latents = (
                    backbone_of(pipe)
                    .encode(fashion_mnist.to_rgb(images[start : start + BATCH]).to(pipe.vae.dtype))[0]
                    .float()
                )
            generator = step_generator(0, name, calls, start)
            records.write(key, {"chosen": score(pipe, latents, calls, generator).argmax(0).tolist()})
        labels += records.read(key)["chosen"]
    return labels[:count]


def accuracy(labels: list[int]) -> dict[str, Any]:
    """Returns the fraction of the images whose own prompt was chosen, with its standard error."""
    right = float((torch.tensor(labels) == fashion_mnist.load("test")[1][: len(labels)]).double().mean())
    return {
        "images": len(labels), "accuracy": right, "standard_error": (right * (1 - right) / len(labels)) ** 0.5,
        "image_classifier": classifier_accuracy(len(labels)),
    }  # fmt: skip


@torch.no_grad()
def classifier_accuracy(count: int) -> float:
    """Returns the accuracy of the image classifier that comes with the checkpoint."""
    path = Path(embedded_checkpoint()) / "classifier"
    model, image_input = AutoModelForImageClassification.from_pretrained(path).eval(), ImageInput.from_pretrained(path)
    images, labels = fashion_mnist.load("test")
    pixels = fashion_mnist.to_rgb(images[:count]) / 2 + 0.5
    predictions = torch.cat([model(pixel_values=image_input(piece)).logits.argmax(1) for piece in pixels.split(500)])
    return float((predictions == labels[:count]).double().mean())


def pipeline(name: str) -> Any:
    """Loads the embedded checkpoint for a method; only the ODE needs a trace."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    if name != "likelihood":
        pipe.trace_model = None  # so the records stay valid when the trace model changes
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default=next(iter(METHODS)))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=6, help="denoiser calls per prompt")
    parser.add_argument("--output", type=Path, default=Path("outputs/which_prompt"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are intended
    name = arguments.method
    labels = choose_prompts(pipeline(name), name, METHODS[name], arguments.images, arguments.calls, arguments.output)
    row = accuracy(labels)
    print(
        f"The method chooses the own prompt of {row['accuracy']:.1%} ± {row['standard_error']:.1%} of {row['images']} "
        f"images; the accuracy of an image classifier is {row['image_classifier']:.1%}"
    )


if __name__ == "__main__":
    main()
