"""Which images are not like the training data? Three scores by the likelihood's own parts, on the embedded checkpoint.

    python examples/likelihood/out_of_distribution.py --images 500

The example compares test images and their prompts with the same images turned, inverted or noised, and with the prompt
of another class. The scores are likelihood (bits/dim, lower is likelier), typicality (distance of the bits/dim from
the mean of the training images), and trace features (distance of the trace by noise level and of the prior's part from
a Gaussian that is fitted to the training images). It needs Fashion-MNIST (see examples/fashion_mnist.py). Results are
kept in --output, and a second run continues from them.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata

from diffusers_fisher import StableDiffusionFisherPipeline, embedded_checkpoint, embedded_prompt
from diffusers_fisher.files import save_figure
from diffusers_fisher.jobs.identity import pipeline_digests
from diffusers_fisher.jobs.records import Records

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

BATCH = 50
STEPS = 24
NOISE = 0.1  # standard deviation, of pixels in [0, 1]
NORMAL, TRAINING = "test images", "training images"


def image_sets(count: int) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Returns by name the images (count, 3, 32, 32) in [0, 1] of every set and their prompts."""
    sets = {}
    for name, split in ((TRAINING, "train"), (NORMAL, "test")):
        images, labels = fashion_mnist.load(split)
        sets[name] = images[:count].expand(-1, 3, -1, -1).float() / 255, labels[:count].tolist()
    images, labels = sets[NORMAL]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape[0], 1, *images.shape[2:], generator=generator)
    other_labels = (torch.tensor(labels) + torch.randint(1, 10, (len(labels),), generator=generator)) % 10
    sets |= {
        "turned by 90 degrees": (images.rot90(1, (-2, -1)), labels),
        "inverted": (1 - images, labels),
        "noised": ((images + NOISE * noise).clamp(0, 1), labels),
        "another class's prompt": (images, other_labels.tolist()),
    }
    return {name: (images, [embedded_prompt(label) for label in labels]) for name, (images, labels) in sets.items()}


def evaluate(pipe: Any, count: int, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Returns bits/dim (count,) and features (count, levels + 1) of every set, and how they were computed."""
    setting = {"images": count, "steps": STEPS, "noise": NOISE, "trace_model": pipe.trace_model is not None}
    records = Records(folder, {**setting, **pipeline_digests(pipe)})
    bits: dict[str, list[float]] = {}
    features: dict[str, list[list[float]]] = {}
    for key, name, images, prompts in _batches(count):
        if key not in records.done():
            out = pipe.log_likelihood(
                images, prompts, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)
            )
            prior = out.prior_log_prob / (out.dims * math.log(2))
            rows = torch.cat([out.unexplained_noise_fraction.T, prior[:, None]], 1).tolist()
            records.write(key, {"bits_per_dim": out.bits_per_dim.tolist(), "features": rows, "trace": out.trace})
        row = records.read(key)
        bits.setdefault(name, []).extend(row["bits_per_dim"])
        features.setdefault(name, []).extend(row["features"])
        setting["trace"] = row["trace"]
    tables = [
        {name: torch.tensor(rows, dtype=torch.float64) for name, rows in each.items()} for each in (bits, features)
    ]
    return tables[0], tables[1], setting


def _batches(count: int) -> Iterator[tuple[str, str, torch.Tensor, list[str]]]:
    for number, (name, (images, prompts)) in enumerate(image_sets(count).items()):
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            yield f"{number}-{start:06d}", name, images[part], prompts[part]


def scores(bits: dict[str, torch.Tensor], features: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns by score and set the values (count,); higher is further from the training data."""
    mean = bits[TRAINING].mean()
    training_features = features[TRAINING]
    centre = training_features.mean(0)
    covariance = torch.cov(training_features.T)
    scale = covariance.diagonal().sqrt()  # r at the noise end hardly varies, so every feature is scaled
    correlation = covariance / scale.outer(scale) + 1e-3 * torch.eye(len(scale), dtype=torch.float64)
    inverse = torch.linalg.inv(correlation)
    result: dict[str, dict[str, torch.Tensor]] = {"likelihood": bits}
    result["typicality"] = {name: (values - mean).abs() for name, values in bits.items()}
    scaled_features = {name: (rows - centre) / scale for name, rows in features.items()}
    result["trace features"] = {
        name: torch.einsum("bi,ij,bj->b", x, inverse, x) for name, x in scaled_features.items()
    }
    return result


def auroc(normal: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Returns the probability that one of `other` scores above one of `normal`, and its standard error.

    The standard error is that of Hanley and McNeil (1982).
    """
    n, m = len(normal), len(other)
    ranks = rankdata(torch.cat([normal, other]).numpy())
    area = float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))
    pairs = (m - 1) * (area / (2 - area) - area**2) + (n - 1) * (2 * area**2 / (1 + area) - area**2)
    return area, math.sqrt(max(0.0, area * (1 - area) + pairs) / (n * m))


def run(count: int, folder: Path) -> dict[str, Any]:
    """Returns the results of the example, and writes its figure into `folder`."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    bits, features, setting = evaluate(pipe, count, folder)
    table: dict[str, Any] = {}
    for score, by_set in scores(bits, features).items():
        table[score] = {}
        for name, values in by_set.items():
            if name not in (NORMAL, TRAINING):
                area, error = auroc(by_set[NORMAL], values)
                table[score][name] = {"auroc": area, "standard_error": error}
    _draw(bits, folder / "out_of_distribution.png")
    means = {
        name: {"mean": float(values.mean()), "standard_deviation": float(values.std())}
        for name, values in bits.items()
    }
    return {**setting, "bits_per_dim": means, "auroc": table}


def _draw(bits: dict[str, torch.Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    edges = torch.histogram(torch.cat(list(bits.values())).float(), 60).bin_edges.numpy()
    for name, values in bits.items():
        if name != TRAINING:
            axes.hist(values.numpy(), bins=edges, histtype="step", linewidth=1.5, label=name)
    axes.set(xlabel="bits/dim of the latent (lower is likelier)", ylabel="images")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="number of images of every set")
    parser.add_argument("--output", type=Path, default=Path("outputs/out_of_distribution"))
    arguments = parser.parse_args()
    result = run(arguments.images, arguments.output)
    print(f"{'bits/dim':<28}{'mean':>10}{'deviation':>12}")
    for name, row in result["bits_per_dim"].items():
        print(f"{name:<28}{row['mean']:>10.3f}{row['standard_deviation']:>12.3f}")
    for score, by_set in result["auroc"].items():
        for name, row in by_set.items():
            print(f"AUROC by {score:<16}{name:<26}{row['auroc']:.3f} ± {row['standard_error']:.3f}")


if __name__ == "__main__":
    main()
