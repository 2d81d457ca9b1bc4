"""Does a trace model say when it is wrong? The checks of the embedded checkpoint's, on images of eight kinds.

    python examples/benchmarks/trace_check.py

64 samples of each kind are scored with the trace model, which is checked on every sample, and by 4 differences along
random directions at all levels (16 for test images), which stand for whole Jacobians with a known standard error. Both
follow the same path. The benchmark says how many samples the checks flag, and whether `trace_error` covers the
difference. --calibrate first calibrates the trace model on 128 other test images, and saves it in the checkpoint's
folder. The share of false alarms is that of 448 more test images, which need Fashion-MNIST (Debian's
dataset-fashion-mnist). The benchmark writes trace_check.json. It takes a quarter of an hour on two cores.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import save
from tqdm.auto import tqdm

from diffusers_fisher import (
    FiniteDifferenceFisher,
    StableDiffusionFisherPipeline,
    calibrate_trace_model,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

COUNT, PIECE = 64, 16
CALIBRATION = slice(5000, 5128)  # of the test split; the samples are made of its first 64 of all classes
OTHERS = slice(6000, 6448)  # more images of the test split, for the share of false alarms


def test_split(part: slice) -> tuple[torch.Tensor, list[str]]:
    """Returns some images of Fashion-MNIST's test split, and their prompts."""
    images, labels = fashion_mnist.load("test")
    pictures = images[part].float().expand(-1, 3, -1, -1) / 255
    return pictures, [embedded_prompt(label) for label in labels[part].tolist()]


def false_alarms(pipe: Any) -> float:
    """Returns the share of other test images that are flagged."""
    pictures, prompts = test_split(OTHERS)
    words = []
    for part in torch.arange(len(pictures)).split(PIECE):
        texts, generator = [prompts[row] for row in part.tolist()], torch.Generator().manual_seed(4)
        words += pipe.log_likelihood(pictures[part], texts, generator=generator).trace_check
    return words.count("disagrees") / len(words)


def calibrate(pipe: Any) -> None:
    """Calibrates the trace model, and writes it to the embedded checkpoint's folder."""
    pictures, prompts = test_split(CALIBRATION)
    generator = torch.Generator().manual_seed(0)
    pipe.trace_model.set_calibration(calibrate_trace_model(pipe, pictures, prompts, generator=generator))
    pipe.trace_model.save_pretrained(Path(embedded_checkpoint()) / "trace_model")


def kinds(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the samples of every kind, as the argument `images` or `latents` of a likelihood."""
    images, _ = embedded_test_images()
    images, generator = images[:COUNT], torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = torch.cat([backbone_of(pipe).samples_of(piece, None) for piece in images.split(PIECE)])
    order = torch.stack([torch.randperm(latents[0].numel(), generator=generator) for _ in latents])
    checkers = (torch.arange(32)[:, None] // 4 + torch.arange(32) // 4) % 2
    tints = torch.rand(len(images), 3, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return {
        "test images": {"images": images},
        "inverted": {"images": 1 - images},
        "10% noise": {"images": (images + 0.1 * noise).clamp(0, 1)},
        "one colour": {"images": tints.expand(images.shape)},
        "checkered": {"images": tints * checkers},
        "shuffled latents": {"latents": latents.flatten(1).gather(1, order).view(latents.shape)},
        "random latents": {"latents": torch.randn(latents.shape, generator=generator)},
        "latents times 3": {"latents": 3 * latents},
    }


def judge(pipe: Any, samples: dict[str, torch.Tensor], prompts: list[str], num_probes: int) -> dict[str, Any]:
    """Compares the trace model's likelihoods with those by many differences, all in bits/dim."""
    ((name, tensor),) = samples.items()
    rows = []
    for part in torch.arange(len(tensor)).split(PIECE):
        texts = [prompts[row] for row in part.tolist()]
        checked, truth = (
            pipe.log_likelihood(
                prompt=texts, **{name: tensor[part]}, generator=torch.Generator().manual_seed(seed), **options
            )
            for seed, options in ((2, {}), (3, {"estimator": FiniteDifferenceFisher(), "num_probes": num_probes}))
        )
        error = checked.to_bits(checked.trace_log_prob - truth.trace_log_prob)
        flags = torch.tensor([word == "disagrees" for word in checked.trace_check], dtype=torch.float64)
        rows.append(torch.stack([
            error, checked.to_bits(truth.standard_error), checked.to_bits(checked.trace_error),
            checked.to_bits(checked.trace_difference_error), flags,
        ]))  # fmt: skip
    error, truth_error, stated, check_error, flags = torch.cat(rows, dim=1)
    # The differences' own error is part of `error`: it is taken away from the mean square.
    true = (error.square().mean() - truth_error.square().mean()).clamp_min(0).sqrt()
    return {
        "samples": len(error), "probes": num_probes, "flagged": float(flags.mean()),
        "covered": float((error.abs() <= stated).double().mean()), "stated_median": float(stated.median()),
        "stated_over_true_median": float(stated.median() / error.abs().median()),
        "error_mean": float(error.mean()), "error_root_mean_square": float(true),
        "error_largest": float(error.abs().max()), "standard_error_of_error": float(truth_error.mean()),
        "standard_error_of_checks": float(check_error.mean()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--name", default="trace_check", help="name of the JSON file")
    arguments = parser.parse_args()
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    if arguments.calibrate:
        calibrate(pipe)
    _, labels = embedded_test_images()
    prompts = [embedded_prompt(int(label)) for label in labels[:COUNT]]
    calibration, rows = pipe.trace_model.config["calibration"], {}
    others = {"images": OTHERS.stop - OTHERS.start, "flagged": false_alarms(pipe)}
    for kind, samples in tqdm(kinds(pipe).items()):
        rows[kind] = judge(pipe, samples, prompts, 16 if kind == "test images" else 4)
        save(arguments.name, {"calibration": calibration, "others": others, "kinds": rows})


if __name__ == "__main__":
    main()
