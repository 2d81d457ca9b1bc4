"""Local intrinsic dimensions: on manifolds of known dimension, and of images on the embedded checkpoint.

    python examples/benchmarks/intrinsic_dimension.py

Compares the dimensions of test images with the sizes of their PNG files, and finds other kinds of images by
likelihood, by dimension and by both. The network was trained on draws of the encoder's posterior, whose variances v
count for sum v/(v + s^2) dimensions on their own; the "excess" is the dimension without these. Needs Fashion-MNIST
(see examples/fashion_mnist.py). Writes intrinsic_dimension.json and docs/images/intrinsic_dimension*.png. Some ten
minutes on one core.
"""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from common import PICTURES, save
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from manifolds import CURVED, curved, on_subspace, subspaces
from PIL import Image
from scipy.stats import spearmanr

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    ExactFisher,
    FiniteDifferenceFisher,
    IntrinsicDimension,
    StableDiffusionFisherPipeline,
    backbone_of,
    dimension_plot,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.curvature import denoiser_intrinsic_dimension
from diffusers_fisher.files import save_figure
from diffusers_fisher.testing import OracleDenoiser

sys.path.insert(0, str(Path(__file__).parent.parent / "likelihood"))
sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist
from out_of_distribution import NOISE, auroc

SCHEDULERS = {
    "Stable Diffusion": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "flow matching": FlowMatchEulerDiscreteScheduler(),
}
LEVELS = [0.06, 0.1, 0.16, 0.26, 0.42, 0.68, 1.1, 1.8]
PLACE = 3  # of the level for other kinds of images, chosen before any figure of them was seen
EXCESS_PLACE = 5  # of the level for the pictures and the classes, whose excess is a half of the dimension or more
IMAGES, OTHERS, BATCH, STEPS = 500, 200, 50, 16


def closed_forms() -> list[dict[str, Any]]:
    """Returns a row per manifold and schedule: relative errors by exact traces, and errors by one direction."""
    laws = [(f"subspace of dimension {size}", subspaces(size), size, on_subspace(16, size)) for size in (1, 4, 16, 64)]
    laws += [(name, *curved(name)) for name in CURVED]
    union = subspaces(2, 24)
    laws += [
        ("union of dimensions 2 and 24: 2", union, 2, on_subspace(8, 2)),
        ("union of dimensions 2 and 24: 24", union, 24, on_subspace(8, 24, number=1)),
    ]
    rows = []
    for name, law, size, samples in laws:
        for schedule, scheduler in SCHEDULERS.items():
            denoiser = OracleDenoiser(law, scheduler)
            exact = denoiser_intrinsic_dimension(denoiser, samples, ExactFisher(law), num_probes=None)
            generator = torch.Generator().manual_seed(0)
            probes = denoiser_intrinsic_dimension(denoiser, samples, FiniteDifferenceFisher(), generator=generator)
            distances = (probes.value - size) / probes.standard_error
            rows.append({
                "law": name, "dimension": size, "schedule": schedule, "points": len(samples),
                "exact_mean": float(exact.value.mean()),
                "exact_worst_relative_error": float((exact.value / size - 1).abs().max()),
                "probe_mean": float(probes.value.mean()), "probe_standard_error": float(probes.standard_error.mean()),
                "within_3_standard_errors": float((distances.abs() <= 3).double().mean()),
                "root_mean_square_of_errors_over_stated": float(distances.square().mean().sqrt()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def in_batches(pipe, images: torch.Tensor, prompts: list[str], **options) -> list[IntrinsicDimension]:
    return [
        pipe.intrinsic_dimension(images[start : start + BATCH], prompts[start : start + BATCH], **options)
        for start in range(0, len(images), BATCH)
    ]


def curves(pipe, images: torch.Tensor, prompts: list[str], levels: list[float]) -> torch.Tensor:
    """Returns the dimensions of images at noise levels, (levels, N)."""
    return torch.cat([out.curve for out in in_batches(pipe, images, prompts, noise_to_signal=levels)], 1)


@torch.no_grad()
def encoder_dimension(pipe, images: torch.Tensor) -> torch.Tensor:
    """Returns the dimension of the encoder's posterior alone at `LEVELS`, (levels, N)."""
    _, deviation = backbone_of(pipe).encode(2 * images - 1)
    variance = deviation.double().square().flatten(1)
    return torch.stack([(variance / (variance + level**2)).sum(1) for level in LEVELS])


def png_bytes(images: torch.Tensor) -> torch.Tensor:
    """Returns the sizes of the PNG files of images (N, 1, H, W) uint8, (N,)."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, format="png", optimize=True)
        sizes.append(file.tell())
    return torch.tensor(sizes, dtype=torch.float64)


def rank_correlation(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Returns Spearman's correlation of (N,) and (N,), and its standard error by 500 resamplings of the pairs."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(500):
        rows = torch.randint(len(left), (len(left),), generator=generator)
        draws.append(float(spearmanr(left[rows], right[rows]).statistic))
    return {
        "correlation": float(spearmanr(left, right).statistic),
        "standard_error": float(torch.tensor(draws, dtype=torch.float64).std()),
    }


def complexity(pipe, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Returns correlations of dimensions with sizes of PNG files, by level, and means by class. Draws the extremes."""
    prompts = [embedded_prompt(int(label)) for label in labels]
    rgb = images.expand(-1, 3, -1, -1).float() / 255
    dimension, encoder, size = curves(pipe, rgb, prompts, LEVELS), encoder_dimension(pipe, rgb), png_bytes(images)
    excess = dimension - encoder
    values = excess[EXCESS_PLACE]
    draw_extremes(images, values)
    draw_curves(pipe, rgb, prompts, [int(values.argmin()), int(values.argmax())])
    levels = [
        {
            "noise_to_signal": level, "dimension": float(whole.mean()), "deviation_over_images": float(whole.std()),
            "encoder_dimension": float(noise.mean()), "png_bytes": rank_correlation(whole, size),
            "png_bytes_within_classes": rank_correlation(within(whole, labels), within(size, labels)),
            "encoder": rank_correlation(whole, noise), "excess_with_png_bytes": rank_correlation(rest, size),
            "excess_with_png_bytes_within_classes": rank_correlation(within(rest, labels), within(size, labels)),
        }
        for level, whole, noise, rest in zip(LEVELS, dimension, encoder, excess, strict=True)
    ]  # fmt: skip
    by_class = {}
    for label, name in enumerate(EMBEDDED_CLASSES):
        own = labels == label
        by_class[name] = {
            "dimension": float(dimension[EXCESS_PLACE, own].mean()), "excess": float(values[own].mean()),
            "standard_error": float(values[own].std() / own.sum() ** 0.5), "png_bytes": float(size[own].mean()),
        }  # fmt: skip
    default = in_batches(pipe, rgb[:BATCH], prompts[:BATCH])[0]
    return {
        "images": len(images), "dims": default.dims, "levels": levels, "by_class": by_class,
        "class_noise_to_signal": LEVELS[EXCESS_PLACE],
        "plateau": {
            "images": BATCH, "found": int(default.has_plateau.sum()), "dimension": float(default.value.mean()),
            "highest_noise_to_signal": float(default.plateau[:, 1].max()),
        },
        "trace_model": trace_model_error(pipe, rgb[:16], prompts[:16], dimension[:, :16]),
    }  # fmt: skip


def within(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns (N,) values minus the mean of their class."""
    means = torch.stack([values[labels == label].mean() for label in range(10)])
    return values - means[labels]


def trace_model_error(pipe, images: torch.Tensor, prompts: list[str], dimension: torch.Tensor) -> dict[str, Any]:
    """Returns the root mean square error of the trace model's dimensions (levels, N), and the stated one."""
    differences = pipe.intrinsic_dimension(
        images, prompts, noise_to_signal=LEVELS, estimator=FiniteDifferenceFisher(), num_probes=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    gap = (dimension - differences.curve).square().mean(1) - differences.curve_error.square().mean(1)
    stated = pipe.intrinsic_dimension(images[:1], prompts[:1], noise_to_signal=LEVELS).curve_error[:, 0]
    return {
        "images": len(images), "noise_to_signal": LEVELS,
        "root_mean_square_error": gap.clamp_min(0).sqrt().tolist(), "stated": stated.tolist(),
    }  # fmt: skip


def image_sets(count: int) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Returns by name the images (count, 3, 32, 32) in [0, 1] of every set and their prompts."""
    generator = torch.Generator().manual_seed(0)
    train, train_labels = fashion_mnist.load("train")
    test, test_labels = fashion_mnist.load("test")
    images = test[:count].float() / 255
    noise = torch.randn(images.shape, generator=generator)
    shuffles = torch.rand(count, 1024, generator=generator).argsort(1)
    prompts = [embedded_prompt(int(label)) for label in test_labels[:count]]
    sets = {
        "test images": images,
        "blank": torch.rand(count, 1, 1, 1, generator=generator).expand_as(images),
        "inverted": 1 - images,
        "noise": torch.rand(images.shape, generator=generator),
        "shuffled": images.flatten(1).gather(1, shuffles).view_as(images),
        "data plus noise": (images + NOISE * noise).clamp(0, 1),
    }
    result = {name: (grey.expand(-1, 3, -1, -1), prompts) for name, grey in sets.items()}
    own = [embedded_prompt(int(label)) for label in train_labels[:count]]
    return {"training images": (train[:count].expand(-1, 3, -1, -1).float() / 255, own), **result}


def other_images(pipe, count: int) -> dict[str, Any]:
    """Returns AUROC of finding other kinds of images among test images. All scores are set up on training images."""
    table = {}
    for name, (images, prompts) in image_sets(count).items():
        dimension, bits = curves(pipe, images, prompts, [LEVELS[PLACE]])[0], []
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            out = pipe.log_likelihood(images[part], prompts[part], num_inference_steps=STEPS, trace_checks=0)
            bits.append(out.bits_per_dim)
        table[name] = torch.stack([torch.cat(bits), dimension], 1)
        print(name, table[name].mean(0).tolist(), flush=True)
    training = table["training images"]
    mean, inverse = training.mean(0), torch.linalg.inv(torch.cov(training.T))
    scaled = {name: (values - mean) / training.std(0) for name, values in table.items()}
    scores = {
        "likelihood": {name: values[:, 0] for name, values in table.items()},
        "likelihood, distance": {name: values[:, 0].abs() for name, values in scaled.items()},
        "dimension, distance": {name: values[:, 1].abs() for name, values in scaled.items()},
        "both, distance": {
            name: torch.einsum("bi,ij,bj->b", values - mean, inverse, values - mean) for name, values in table.items()
        },
    }
    others = [name for name in table if name not in ("test images", "training images")]
    result: dict[str, Any] = {}
    for score, by_set in scores.items():
        cells = {name: auroc(by_set["test images"], by_set[name]) for name in others}
        result[score] = {name: {"auroc": area, "standard_error": error} for name, (area, error) in cells.items()}
    return {
        "images": count, "steps": STEPS, "noise_to_signal": LEVELS[PLACE], "auroc": result,
        "means": {
            name: {"bits_per_dim": float(values[:, 0].mean()), "dimension": float(values[:, 1].mean())}
            for name, values in table.items()
        },
    }  # fmt: skip


def draw_extremes(images: torch.Tensor, values: torch.Tensor, count: int = 10) -> None:
    """Draws the images of lowest and of highest excess."""
    from matplotlib.figure import Figure

    order = values.argsort()
    figure = Figure(figsize=(count * 0.9, 2.6), layout="constrained")
    cells = figure.subplots(2, count)
    for row, places in zip(cells, (order[:count], order[-count:].flip(0)), strict=True):
        for axes, place in zip(row, places.tolist(), strict=True):
            axes.imshow(images[place, 0].numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{float(values[place]):.0f}", fontsize=8)
    save_figure(figure, PICTURES / "intrinsic_dimension.png")


def draw_curves(pipe, images: torch.Tensor, prompts: list[str], rows: list[int]) -> None:
    """Draws the dimensions of two images by noise level."""
    outputs = {
        name: pipe.intrinsic_dimension(images[[row]], [prompts[row]], noise_to_signal=torch.logspace(-1.5, 0.5, 25))
        for name, row in zip(("simplest image", "most complex image"), rows, strict=True)
    }
    save_figure(dimension_plot(outputs), PICTURES / "intrinsic_dimension_by_level.png")


def main() -> None:
    rows = closed_forms()
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = (tensor[:IMAGES] for tensor in fashion_mnist.load("test"))
    result = {
        "closed_forms": rows,
        "complexity": complexity(pipe, images, labels),
        "other_images": other_images(pipe, OTHERS),
    }
    save("intrinsic_dimension", result)


if __name__ == "__main__":
    main()
