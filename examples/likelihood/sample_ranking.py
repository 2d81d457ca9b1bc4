"""Are the likelihoods of generated samples a measure of how well they were made? On the embedded checkpoint.

    python examples/likelihood/sample_ranking.py --samples 500

Samples of every class are ranked by log p(x|prompt), and by log p(x|prompt) - log p(x|empty prompt), which asks how
much better the prompt explains the sample than the empty prompt does. Both rankings are compared with an image
classifier's confidence in the prompted class. Results are kept in --output, and a second run continues from them.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.guidance import ClassifierReward
from diffusers_fisher.jobs.identity import pipeline_digests
from diffusers_fisher.jobs.pages import save_picture
from diffusers_fisher.jobs.records import Records

BATCH = 50
STEPS = 24
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 1.0}  # without guidance more samples go wrong
SCORES = ("log p(x|prompt)", "log p(x|prompt) - log p(x)")


def evaluate(pipe: Any, count: int, folder: Path) -> dict[str, torch.Tensor]:
    """Returns by name, each (count,): the label of the prompt, log p(x|prompt), log p(x), the classifier's
    log-probability, and whether the classifier agrees with the prompt."""
    records = Records(folder, {"samples": count, "steps": STEPS, **SAMPLING, **pipeline_digests(pipe)})
    rows: dict[str, list[float]] = {}
    for start in range(0, count, BATCH):
        key = f"{start:06d}"
        if key not in records.done():
            records.write(key, _batch(pipe, range(start, min(count, start + BATCH)), folder / f"samples_{key}.png"))
        for name, values in records.read(key).items():
            rows.setdefault(name, []).extend(values)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def _batch(pipe: Any, numbers: range, picture: Path) -> dict[str, list[float]]:
    labels = [number % 10 for number in numbers]
    prompts = [embedded_prompt(label) for label in labels]
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    images = pipe(prompts, generator=generators, output_type="pt", **SAMPLING).images.float()
    reward = ClassifierReward.from_pretrained(
        Path(embedded_checkpoint()) / "classifier", target=[EMBEDDED_CLASSES[label] for label in labels]
    )
    with torch.no_grad():
        confidence, predictions = reward(images, prompts), reward.logits(images).argmax(1)
    with_prompt, without_prompt = (
        pipe.log_likelihood(
            images, text, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)
        ).log_prob
        for text in (prompts, "")
    )
    save_picture(torch.cat(list(images), dim=-1), picture)
    return {
        "label": labels, "with_prompt": with_prompt.tolist(), "without": without_prompt.tolist(),
        "confidence": confidence.tolist(), "right": (predictions == torch.tensor(labels)).float().tolist(),
    }  # fmt: skip


def run(count: int, folder: Path) -> dict[str, Any]:
    """Returns the results of the example."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    values = evaluate(pipe, count, folder)
    rankings = dict(zip(SCORES, (values["with_prompt"], values["with_prompt"] - values["without"]), strict=True))
    table = {}
    for name, score in rankings.items():
        class_masks = [values["label"] == label for label in range(10)]
        correlations = [float(spearmanr(score[rows], values["confidence"][rows]).statistic) for rows in class_masks]
        best = [score[rows].argsort(descending=True)[: _quarter(rows)] for rows in class_masks]
        worst = [score[rows].argsort()[: _quarter(rows)] for rows in class_masks]
        table[name] = {
            "rank_correlation": float(spearmanr(score, values["confidence"]).statistic),
            "rank_correlation_within_classes": sum(correlations) / len(correlations),
            "standard_error_within_classes": float(torch.tensor(correlations).std() / len(correlations) ** 0.5),
            "right_of_best_quarter": _right(values, class_masks, best),
            "right_of_worst_quarter": _right(values, class_masks, worst),
        }
    return {"samples": count, "steps": STEPS, **SAMPLING, "right": float(values["right"].mean()), "rankings": table}


def _quarter(rows: torch.Tensor) -> int:
    return max(1, int(rows.sum()) // 4)


def _right(
    samples: dict[str, torch.Tensor], class_masks: list[torch.Tensor], indices_by_class: list[torch.Tensor]
) -> float:
    """Returns the fraction of the chosen samples of all classes that are classified as prompted."""
    values = [samples["right"][rows][indices] for rows, indices in zip(class_masks, indices_by_class, strict=True)]
    return float(torch.cat(values).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="number of samples, at least 20: two per class")
    parser.add_argument("--output", type=Path, default=Path("outputs/sample_ranking"))
    arguments = parser.parse_args()
    result = run(arguments.samples, arguments.output)
    print(f"{result['right']:.1%} of {result['samples']} samples are classified as prompted")
    for name, row in result["rankings"].items():
        correlation, error = row["rank_correlation_within_classes"], row["standard_error_within_classes"]
        print(
            f"{name}: rank correlation with the classifier's confidence {row['rank_correlation']:.2f}, within classes "
            f"{correlation:.2f} ± {error:.2f}; classified as prompted in the best quarter "
            f"{row['right_of_best_quarter']:.1%}, in the worst quarter {row['right_of_worst_quarter']:.1%}"
        )


if __name__ == "__main__":
    main()
