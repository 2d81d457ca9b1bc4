"""Guidance of many prompts over many processes, resumable, with a gallery: what `diffusers-fisher guide` runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, NumericalError
from ..files import save_figure
from ..fisher import AutodiffFisher, DirectFisher, EndpointFisher, FiniteDifferenceFisher
from ..guidance import GuidanceOutput, named_reward
from ..guidance.adjoint import COMPLETED
from ..training.trace_config import DenoiserSettings, load_pipeline
from .records import Records, item_keys, shard
from .report import Page, save_picture

PICTURES = "pictures"
SHOWN = 100  # prompts on the page, whose pictures it holds
DRAWN = 12  # prompts on gallery.png

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "direct": DirectFisher,
    "finite-difference": FiniteDifferenceFisher,
    "autodiff": AutodiffFisher,
    "endpoint-centred": lambda: EndpointFisher(centred=True),
    "endpoint": EndpointFisher,
}


@dataclasses.dataclass(frozen=True)
class GallerySettings:
    """What the images depend on; all of it but the batch size must be the same when a run is taken up again.

    Args:
        checkpoint: a pipeline's folder or id, "embedded" for the embedded one.
        reward, held_out: as `named_reward` takes them; None: no held-out reward.
        estimator: a key of `ESTIMATORS`.
        num_inference_steps, guidance_scale: None: the pipeline's own defaults.
        seed: of the first prompt; each further one's is one more, whatever the batches.
    """

    checkpoint: str = "embedded"
    reward: str = "classifier:embedded:ankle boot"
    held_out: str | None = None
    estimator: str = "direct"
    num_guidance_steps: int = 10
    step_size: float = 0.2
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "float32"
    seed: int = 0


def run_gallery(output: Path, prompts_file: Path, settings: GallerySettings, batch_size: int = 1) -> dict[str, Any]:
    """Guides every prompt of a file and writes the gallery.

    Every process of `accelerate launch` takes its share. A prompt's record is written when it is done, so that a run
    which was killed goes on where it was.

    Args:
        output: folder of `settings.json`, `records/`, `pictures/`, `index.html` and `gallery.png`.
        prompts_file: one prompt a line; empty lines are left out.
        batch_size: prompts guided at once, each with its own history.

    Returns:
        The mean rewards before and after, the number of prompts, and that of those which "failed", whose images or
        rewards were not finite at once (on every process).

    Raises:
        InputError: no prompts, unknown names, values out of range, or records of other settings in `output`.
        CheckpointError: a damaged checkpoint or record.
    """
    from accelerate import PartialState

    prompts = read_prompts(prompts_file)
    _check(settings, batch_size)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    records = Records(output, {**dataclasses.asdict(settings), "prompts": f"{len(prompts)}, sha256 {digest[:16]}"})
    (records.folder / PICTURES).mkdir(exist_ok=True)
    state = PartialState()
    mine = shard(list(zip(item_keys(len(prompts)), prompts, strict=True)), state.process_index, state.num_processes)
    left = set(records.missing(key for key, _ in mine))
    todo = [item for item in mine if item[0] in left]
    if state.is_main_process:
        print(f"{len(prompts)} prompts, {len(mine) - len(todo)} of this process's {len(mine)} done", flush=True)
    if todo:
        _guide_all(records, settings, todo, batch_size, state)
    state.wait_for_everyone()
    collected = records.collected(item_keys(len(prompts)))
    if state.is_main_process:
        write_gallery(records.folder, collected, settings)
        print(f"The gallery is {(records.folder / 'index.html').resolve()}", flush=True)
    return _summary(collected)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: the file can't be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"The prompts '{path}' can't be read: {error}. Give a text file, one prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"The prompts '{path}' are empty; give one prompt a line.")
    return prompts


def _check(settings: GallerySettings, batch_size: int) -> None:
    if settings.estimator not in ESTIMATORS:
        raise InputError(f"The estimator is '{settings.estimator}'; allowed: {', '.join(ESTIMATORS)}.")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"`dtype` is '{settings.dtype}'; allowed: float32, bfloat16, float16.")
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")


def _guide_all(
    records: Records, settings: GallerySettings, todo: Sequence[tuple[str, str]], batch_size: int, state: Any
) -> None:
    rewards: list[Any] = [named_reward(name) if name else None for name in (settings.reward, settings.held_out)]
    for network in (getattr(reward, part, None) for reward in rewards for part in ("model", "head")):
        if isinstance(network, torch.nn.Module):
            network.to(state.device)
    pipe = load_pipeline(DenoiserSettings(settings.checkpoint, dtype=settings.dtype)).to(state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    for begin in range(0, len(todo), batch_size):
        _guide_batch(pipe, rewards, records, settings, todo[begin : begin + batch_size])


def _guide_batch(
    pipe: Any, rewards: list[Any], records: Records, settings: GallerySettings, batch: Sequence[tuple[str, str]]
) -> None:
    """Guides and records a batch. Where a number is not finite, its prompts are guided one by one, so that none
    suffers from another's; one that has no reward at all is recorded with the reason."""
    generators = [torch.Generator().manual_seed(settings.seed + int(key)) for key, _ in batch]
    stopped = None
    try:
        out = pipe.guide(
            [prompt for _, prompt in batch], rewards[0], held_out_reward=rewards[1], generator=generators,
            num_guidance_steps=settings.num_guidance_steps, step_size=settings.step_size,
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
            estimator=ESTIMATORS[settings.estimator](), output_type="pt",
        )  # fmt: skip
    except NumericalError as error:
        stopped = str(error)
    if len(batch) > 1 and (stopped is not None or out.status != COMPLETED):
        for item in batch:
            _guide_batch(pipe, rewards, records, settings, [item])
    elif stopped is not None:
        ((key, prompt),) = batch
        records.write(key, {"prompt": prompt, "seed": settings.seed + int(key), "failed": stopped})
    else:
        for index, (key, prompt) in enumerate(batch):
            _write(records, key, prompt, settings, out, index)


def _write(
    records: Records, key: str, prompt: str, settings: GallerySettings, out: GuidanceOutput, index: int
) -> None:
    """The pictures of one prompt, then its record."""
    files = {}
    for name, images in (("before", out.initial_images), ("after", out.images)):
        files[name] = f"{PICTURES}/{key}_{name}.png"
        save_picture(images[index], records.folder / files[name])
    histories: dict[str, Any] = {
        "rewards": out.rewards, "held_out": out.held_out_rewards, "shell_distances": out.shell_distances,
        "gradient_norms": out.gradient_norms,
    }  # fmt: skip
    records.write(
        key,
        {
            "prompt": prompt, "seed": settings.seed + int(key), "best_run": int(out.rewards[:, index].argmax()),
            **{name: rows[:, index].tolist() for name, rows in histories.items()},
            "seconds": out.seconds.tolist(), "status": out.status, **files,
        },
    )  # fmt: skip


def write_gallery(folder: Path, records: Sequence[dict[str, Any]], settings: GallerySettings) -> None:
    """Writes `index.html` and `gallery.png` from the records of all prompts."""
    page, failed = Page("Guidance by a reward"), [record for record in records if "failed" in record]
    for record in failed:
        page.paragraph(f"Without a result: {record['prompt']}. {record['failed']}")
    records = [record for record in records if "failed" not in record]
    if not records:
        page.write(folder / "index.html")
        return
    page.paragraph(
        f"Checkpoint {settings.checkpoint}, reward {settings.reward}, estimator {settings.estimator}, "
        f"{settings.num_guidance_steps} steps of {settings.step_size} of the noise's norm; {len(records)} prompts."
    )
    summary = _summary(records)
    page.table(("mean over prompts", "before", "after"), [(name, *row) for name, row in summary["means"].items()])
    page.figure(curves(records), "Reward by run: every prompt, and the mean. A held-out reward that falls while the "
                "reward rises says that the reward is being gamed.")  # fmt: skip
    page.heading("Prompts")
    if len(records) > SHOWN:
        page.paragraph(f"The first {SHOWN}; all pictures are in the folder '{PICTURES}', all numbers in 'records'.")
    for record in records[:SHOWN]:
        page.paragraph(record["prompt"])
        best = record["best_run"]
        told = [f"{when}: reward {record['rewards'][run]:.4g}" for when, run in (("before", 0), ("after", best))]
        if record["held_out"]:
            told = [
                f"{text}, held out {record['held_out'][run]:.4g}" for text, run in zip(told, (0, best), strict=True)
            ]
        page.pictures([(folder / record[name], text) for name, text in zip(("before", "after"), told, strict=True)])
        if record["status"] != "completed":
            page.paragraph(record["status"])
    page.write(folder / "index.html")
    save_figure(gallery(folder, records[:DRAWN]), folder / "gallery.png")


def curves(records: Sequence[dict[str, Any]]) -> Any:
    """Rewards by run, and held-out ones where there are any: a matplotlib figure."""
    from matplotlib.figure import Figure

    names = ["rewards", *(["held_out"] if records[0]["held_out"] else [])]
    figure = Figure(figsize=(5 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for record in records:
            axes.plot(record[name], color="0.8", linewidth=0.8)
        length = min(len(record[name]) for record in records)
        means = torch.tensor([record[name][:length] for record in records], dtype=torch.float64).mean(0)
        axes.plot(means.numpy(), color="C0", marker=".")
        axes.set(xlabel="run", ylabel={"rewards": "reward", "held_out": "held-out reward"}[name])
    return figure


def gallery(folder: Path, records: Sequence[dict[str, Any]]) -> Any:
    """A row a prompt: before, after, reward curve. A matplotlib figure."""
    import numpy
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6.4, 1.9 * len(records)), layout="constrained")
    rows = figure.subplots(len(records), 3, squeeze=False)
    for row, record in zip(rows, records, strict=True):
        for axes, name in zip(row, ("before", "after"), strict=False):
            with Image.open(folder / record[name]) as picture:
                axes.imshow(numpy.asarray(picture))
            axes.set(xticks=[], yticks=[])
            axes.set_title(name, fontsize=8)
        row[0].set_ylabel(record["prompt"][:28], fontsize=8)
        row[2].plot(record["rewards"], marker=".")
        row[2].set_title("reward by run", fontsize=8)
        row[2].tick_params(labelsize=7)
    return figure


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts of the first run's numbers and the best run's, and how many prompts have none."""
    failed, means = sum("failed" in record for record in records), {}
    records = [record for record in records if "failed" not in record]
    for name, label in (("rewards", "reward"), ("held_out", "held-out reward"), ("shell_distances", "shell distance")):
        if records and records[0][name]:
            pairs = [(record[name][0], record[name][record["best_run"]]) for record in records]
            before, after = zip(*pairs, strict=True)
            means[label] = (sum(before) / len(records), sum(after) / len(records))
    return {"prompts": len(records) + failed, "failed": failed, "means": means}
