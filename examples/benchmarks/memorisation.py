"""How well scores tell memorised prompts from others, on checkpoints that memorise; writes memorisation.json.

    PYTHONPATH=examples python examples/benchmarks/memorisation.py [--trace-models FOLDER]

For each seed it fine-tunes the embedded checkpoint (examples/train_memorising.py), whose prompts are memorised or not
by construction, and measures:

- the AUROC of the score difference and of the trace difference, at several noise levels and numbers of draws, with the
  evaluations per prompt and 95% intervals by the bootstrap over prompts;
- the intersection over union of heat maps with the half of the image that is repeated (a random map has 1/3);
- whether the checkpoint memorises: the distance of samples to the repeated image, from random noise and from the least
  memorised of 16 noises.

`--trace-models FOLDER` adds a trace model per seed (FOLDER/0, FOLDER/1, ...), trained for that seed's checkpoint.
A stopped run goes on: trainings continue from their last state, and seeds that were measured are read from their
files.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy
import torch
import train_memorising
from common import save

from diffusers_fisher import FisherEstimator, FisherTraceModel, StableDiffusionFisherPipeline, TraceMatchingFisher
from diffusers_fisher.files import read_json, write_json
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.noise import log_noise_to_signal_range

LEVELS: dict[str, tuple[float, ...]] = {
    "highest": (math.inf,), "5": (5.0,), "2": (2.0,), "1": (1.0,), "highest, 5 and 2": (math.inf, 5.0, 2.0),
}  # fmt: skip
"""Noise-to-signal ratios by name; infinite stands for the highest of the schedule."""

DRAWS = (1, 4, 16)
SAMPLES, SAMPLE_STEPS, GUIDANCE = 4, 20, 2.0
RESAMPLES = 2000
PROXY, TRACE, MODEL = "score difference", "trace difference", "trace difference, trace model"


def measure(config: train_memorising.Config, draws: int, estimator: FisherEstimator | None) -> dict[str, Any]:
    """Returns all measurements of one seed's checkpoint."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(f"{config.output}/checkpoint")
    pipe.set_progress_bar_config(disable=True)
    prompts = train_memorising.make_prompts(config)
    texts = [prompt.text for prompt in prompts]
    record: dict[str, Any] = {"seed": config.seed, "kinds": [prompt.kind for prompt in prompts], "levels": {}}
    highest = math.exp(log_noise_to_signal_range(pipe.scheduler)[1])
    for name, levels in LEVELS.items():
        level = [min(each, highest) for each in levels]
        out = pipe.memorisation(
            texts, noise_to_signal=level, num_draws=draws, maps=True, generator=torch.Generator().manual_seed(1)
        )
        assert out.trace_differences is not None
        row: dict[str, Any] = {
            "noise_to_signal": out.noise_to_signal.tolist(),
            "calls": {PROXY: out.score_calls // draws, TRACE: out.num_denoiser_calls // draws},
            "values": {
                PROXY: out.score_differences.mean(0).tolist(), TRACE: out.trace_differences.mean(0).tolist(),
            },
            "overlaps": {
                PROXY: overlaps(out.image_maps(32, 32, by="score"), prompts),
                TRACE: overlaps(out.image_maps(32, 32, by="trace"), prompts),
            },
        }  # fmt: skip
        if estimator is not None:
            model = pipe.memorisation(
                texts, noise_to_signal=level, num_draws=draws, estimator=estimator,
                generator=torch.Generator().manual_seed(1),
            )  # fmt: skip
            assert model.trace_differences is not None
            row["calls"][MODEL] = model.num_denoiser_calls // draws
            row["values"][MODEL] = model.trace_differences.mean(0).tolist()
        record["levels"][name] = row
        print(f"seed {config.seed}, level {name}", flush=True)
    record["distances"] = distances(pipe, config, prompts, draws)
    return record


def overlaps(maps: torch.Tensor, prompts: list[train_memorising.Prompt]) -> list[float]:
    """Returns for each prompt with a repeated half the intersection over union of that half and the map's upper
    half of pixels; `maps` are (B, 32, 32)."""
    values = []
    for heat, prompt in zip(maps, prompts, strict=True):
        if prompt.half:
            mask = train_memorising.half_mask(prompt.half).flatten()
            chosen = torch.zeros_like(mask)
            chosen[heat.flatten().topk(len(mask) // 2).indices] = True
            values.append(float((mask & chosen).sum() / (mask | chosen).sum()))
    return values


def distances(
    pipe: StableDiffusionFisherPipeline, config: train_memorising.Config, prompts: list[train_memorising.Prompt],
    draws: int,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """Returns by kind the root mean squared distance of samples to the prompt's first image, where it is repeated.

    The samples begin with random noise, and with the least memorised of the noises.
    """
    images, captions = train_memorising.make_samples(config, prompts)
    texts = [prompt.text for prompt in prompts]
    result: dict[str, dict[str, list[float]]] = {"random": {}, "least memorised": {}}
    for sample in range(SAMPLES):
        out = pipe.memorisation(texts, num_draws=draws, num_probes=0, generator=torch.Generator().manual_seed(sample))
        for name, noise in (("random", out.noise[0]), ("least memorised", out.least_memorised_noise())):
            samples = pipe(
                texts, latents=noise, num_inference_steps=SAMPLE_STEPS, guidance_scale=GUIDANCE, output_type="pt"
            ).images  # fmt: skip
            for index, prompt in enumerate(prompts):
                mask = train_memorising.half_mask(prompt.half) if prompt.half else torch.ones(32, 32, dtype=torch.bool)
                first = images[captions == index][0, 0].float() / 255
                difference = (samples[index].mean(0).cpu() - first)[mask]
                result[name].setdefault(prompt.kind, []).append(float(difference.square().mean().sqrt()))
    return result


def comparisons(positive: numpy.ndarray, negative: numpy.ndarray) -> numpy.ndarray:
    """Returns which memorised prompt (rows) scores higher than which other (columns); ties count half."""
    left, right = positive[:, None], negative[None]
    return (left > right) + (left == right) / 2


def auroc(records: list[dict[str, Any]], level: str, score: str, draws: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Returns the AUROC by means of `draws` draws, averaged over seeds and disjoint groups of draws, and its interval
    by resampling prompts."""
    tables, random = [], numpy.random.default_rng(0)
    for record in records:
        values = numpy.array(record["levels"][level]["values"][score])
        groups = values[: len(values) // draws * draws].reshape(-1, draws, values.shape[1]).mean(1)
        memorised = numpy.isin(record["kinds"], kinds)
        others = numpy.array(record["kinds"]) == "many"
        tables.append(numpy.mean([comparisons(group[memorised], group[others]) for group in groups], axis=0))
    resampled = [
        numpy.mean([
            table[random.integers(0, len(table), len(table))][:, random.integers(0, table.shape[1], table.shape[1])]
            .mean()
            for table in tables
        ])
        for _ in range(RESAMPLES)
    ]  # fmt: skip
    return {
        "level": level, "score": score, "draws": draws, "kinds": "+".join(kinds),
        "evaluations": draws * records[0]["levels"][level]["calls"][score],
        "auroc": float(numpy.mean([table.mean() for table in tables])),
        "by_seed": [float(table.mean()) for table in tables],
        "interval": numpy.quantile(resampled, [0.025, 0.975]).tolist(),
    }  # fmt: skip


def mean_with_interval(values: numpy.ndarray) -> dict[str, Any]:
    """Returns the mean of `values` and its 95% interval by the bootstrap."""
    random = numpy.random.default_rng(0)
    means = values[random.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return {"mean": float(values.mean()), "interval": numpy.quantile(means, [0.025, 0.975]).tolist()}


def summarise(records: list[dict[str, Any]], draws: int) -> dict[str, Any]:
    """Returns the tables of all seeds: AUROC by score, overlaps of the maps, distances of samples."""
    first = records[0]["levels"]
    rows = [
        auroc(records, level, score, number, kinds)
        for level in LEVELS
        for score in first[level]["values"]
        for number in DRAWS
        if number <= draws
        for kinds in (("whole", "half"), ("whole",), ("half",))
    ]
    maps = {}
    for level in LEVELS:
        both = {
            score: numpy.concatenate([record["levels"][level]["overlaps"][score] for record in records])
            for score in (PROXY, TRACE)
        }
        maps[level] = {score: mean_with_interval(values) for score, values in both.items()}
        maps[level]["trace minus score"] = mean_with_interval(both[TRACE] - both[PROXY])
    spread = {
        noise: {
            kind: mean_with_interval(numpy.concatenate([record["distances"][noise][kind] for record in records]))
            for kind in records[0]["distances"][noise]
        }
        for noise in records[0]["distances"]
    }
    return {"auroc": rows, "overlap": maps, "distance_to_first_image": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/memorising.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--trace-models", type=Path, help="folder with one trace model per seed")
    parser.add_argument("--no-json", action="store_true", help="print the tables instead of writing memorisation.json")
    arguments = parser.parse_args()
    base, records = load_config(arguments.config, train_memorising.Config), []
    for seed in arguments.seeds:
        config = dataclasses.replace(base, seed=seed, output=f"{base.output}/{seed}")
        train_memorising.run(config)
        estimator = None
        if arguments.trace_models is not None:
            estimator = TraceMatchingFisher(FisherTraceModel.from_pretrained(arguments.trace_models / str(seed)))
        name = f"scores_{arguments.draws}{'' if estimator is None else '_with_trace_model'}.json"
        path = Path(config.output) / name
        if not path.exists():
            write_json(path, measure(config, arguments.draws, estimator))
        records.append(read_json(path))
    result = {"config": dataclasses.asdict(base), "seeds": arguments.seeds, **summarise(records, arguments.draws)}
    if arguments.no_json:
        print(result["overlap"], *result["auroc"], result["distance_to_first_image"], sep="\n")
    else:
        save("memorisation", result)


if __name__ == "__main__":
    main()
