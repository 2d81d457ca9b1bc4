"""Reports the guidance of many prompts: means over the prompts, curves of the rewards, a page and a gallery."""

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import pandas
from matplotlib.figure import Figure
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat

from ..figures import make_figure, write_plain
from ..files import save_figure
from ..guidance.output import COMPLETED
from ..jobs.pages import Page
from ..settings import NotNegative

PICTURES = "pictures"  # folder of the pictures
LIMIT = 100  # largest number of prompts that the page shows with their pictures
GALLERY_ROWS = 12  # prompts on gallery.png
ROW_WIDTH = 28  # letters of a prompt on gallery.png
QUANTITIES = {
    "rewards": "reward",
    "held_out": "held-out reward",
    "shell_distances": "shell distance",
    "whiteness": "whiteness of the noise",
    "bits_per_dim": "bits/dim",
}  # keys of a record, with their names on the page


EXPLANATIONS = {
    "reward": "reward: in the unit of the reward itself; higher is better.",
    "held-out reward": "held-out reward: of a second reward, which was watched and not optimised.",
    "shell distance": "shell distance: how far the norm of the initial noise is from that of Gaussian noise, in "
    "standard deviations. Beyond 3 the model was not trained on such noise.",
    "whiteness of the noise": "whiteness: how often white noise is as uneven as this one, from 0 to 1. Below 0.01 the "
    "model was not trained on such noise.",
    "bits/dim": "bits/dim: negative log-likelihood of the image's latents; lower is likelier.",
}
"""What the page says of a quantity, by its name there."""


class FailedPrompt(BaseModel):
    """Record of a prompt without a result."""

    prompt: str
    failed: str


class GuidedPrompt(BaseModel):
    """What the report reads of a prompt's record."""

    prompt: str
    before: str
    after: str
    best_run: NotNegative
    rewards: Annotated[list[FiniteFloat | None], Field(min_length=1)]
    held_out: list[FiniteFloat | None]
    shell_distances: list[FiniteFloat | None]
    whiteness: list[FiniteFloat | None]
    bits_per_dim: dict[Literal["before", "after"], FiniteFloat | None] | None = None
    bits_per_dim_error: dict[Literal["before", "after"], FiniteFloat | None] | None = None
    seconds: list[FiniteFloat]
    status: str
    flagged: list[str]


def write_gallery(folder: Path, records: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes `index.html` and `gallery.png`.

    Args:
        folder: folder of the gallery, which holds the pictures already.
        records: records of all prompts.
        settings: the gallery's settings by name.
    """
    page, failures = Page("Guidance by a reward"), [record for record in records if "failed" in record]
    for record in failures:
        page.paragraph(f"Without a result: {record['prompt']}. {record['failed']}")
    records = [record for record in records if "failed" not in record]
    if not records:
        page.write(folder / "index.html")
        return
    page.paragraph(
        f"Checkpoint {settings['checkpoint']}, reward {settings['reward']}, estimator {settings['estimator']}, "
        f"{settings['num_guidance_steps']} steps of {settings['step_size']} "
        + (f"by {settings['optimizer']}" if settings["optimizer"] else "of the noise's norm")
        + _cheap_runs_text(settings)
        + f"; {len(records)} prompts."
    )
    means = gallery_summary(records)["means"]
    page.table(("mean over prompts", "before", "after"), [(name, *row) for name, row in means.items()])
    page.paragraph("\n".join(EXPLANATIONS[name] for name in means if name in EXPLANATIONS))
    has_held_out = "held_out" in _reward_names(records)
    hacking = (
        " A held-out reward that falls while the reward rises is a sign of reward hacking." if has_held_out else ""
    )
    page.figure(curves(records), f"Reward by run: every prompt, and the mean.{hacking}")
    held_out = ", and the held-out reward of its image," if has_held_out else ","
    page.figure(
        by_seconds(records), f"The best reward so far{held_out} by seconds of guidance: means over the prompts."
    )
    page.heading("Prompts")
    if len(records) > LIMIT:
        page.paragraph(f"The first {LIMIT}; all pictures are in the folder '{PICTURES}', all numbers in 'records'.")
    for record in records[:LIMIT]:
        _add_prompt(page, folder, record)
    page.write(folder / "index.html")
    save_figure(gallery(folder, records[:GALLERY_ROWS]), folder / "gallery.png")


def _cheap_runs_text(settings: Mapping[str, Any]) -> str:
    """Says by which runs the guidance climbs, where they are not the full ones."""
    steps = settings.get("num_guidance_inference_steps")
    return "" if steps is None else f", by runs of {steps} sampling steps; the images after are those of full runs"


def gallery_summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over prompts of the numbers of the first and of the best run, and the numbers of prompts and of
    failed prompts. A prompt where a number is not finite, before or after, does not count for the mean of that number.
    """
    complete = [record for record in records if "failed" not in record]
    means: dict[str, tuple[float | None, float | None]] = {}
    for name, label in QUANTITIES.items():
        if complete and complete[0].get(name):
            pairs = pandas.DataFrame([_before_and_after(record, name) for record in complete], dtype=float).dropna()
            means[label] = (None, None) if pairs.empty else tuple(pairs.mean().tolist())
    return {"prompts": len(records), "failed": len(records) - len(complete), "means": means}


def _before_and_after(record: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    if isinstance(record[name], dict):
        return record[name]["before"], record[name]["after"]
    return record[name][0], record[name][record["best_run"]]


def curves(records: Sequence[dict[str, Any]]) -> Figure:
    """Draws the rewards by run, and the held-out rewards where there are any: each prompt's and their mean."""
    names, length = _reward_names(records), min(len(record["rewards"]) for record in records)
    figure, row = make_figure(5 * len(names), 3.2, columns=len(names))
    for axes, name in zip(row, names, strict=True):
        for record in records:
            axes.plot(pandas.Series(record[name], dtype=float), color="0.8", linewidth=0.8)
        axes.plot(_histories([record[name] for record in records], length).mean(), color="C0", marker=".")
        axes.set(xlabel="run", ylabel=QUANTITIES[name])
    return figure


def by_seconds(records: Sequence[dict[str, Any]]) -> Figure:
    """Draws means over prompts of the best reward so far, and of the held-out reward of the same run, by the mean of
    the seconds since the beginning of a prompt's batch. A prompt that stopped early keeps its last values."""
    names, length = _reward_names(records), max(len(record["rewards"]) for record in records)
    seconds = _histories([list(itertools.accumulate(record["seconds"])) for record in records], length).mean()
    rewards = _histories([record["rewards"] for record in records], length)
    is_best = rewards.eq(rewards.cummax(axis="columns"))
    best_runs = numpy.maximum.accumulate(numpy.where(is_best, range(length), 0), axis=1)
    figure, row = make_figure(5 * len(names), 3.2, columns=len(names))
    for axes, name in zip(row, names, strict=True):
        table = _histories([record[name] for record in records], length)
        best = pandas.DataFrame(numpy.take_along_axis(table.to_numpy(), best_runs, axis=1))
        axes.plot(seconds, best.mean(), color="C0", marker=".")
        axes.set(xlabel="seconds", ylabel="best reward" if name == "rewards" else "held-out reward at the best")
    return figure


def gallery(folder: Path, records: Sequence[dict[str, Any]]) -> Figure:
    """Draws one row per prompt: the image before, the image after, and the rewards by run."""
    figure, cells = make_figure(6.4, 1.9 * len(records), len(records), 3)
    for index, record in enumerate(records):
        row = cells[3 * index : 3 * index + 3]
        for axes, name in zip(row, ("before", "after"), strict=False):
            with Image.open(folder / record[name]) as picture:
                axes.imshow(numpy.asarray(picture))
            axes.set(xticks=[], yticks=[])
            axes.set_title("\n".join([name, *_bits(record, name)]), fontsize=8)
        key = Path(record["before"]).name.split("_")[0]
        write_plain(row[0].set_ylabel("", fontsize=8), _shorten(record["prompt"]), otherwise=f"prompt {key}")
        row[2].plot(record["rewards"], marker=".")
        row[2].set_title("reward by run", fontsize=8)
        row[2].tick_params(labelsize=7)
    return figure


def _shorten(prompt: str) -> str:
    """Returns the beginning of a prompt, as long as a row of the gallery is high. Letters of Chinese, Japanese and
    Korean are twice as wide as others."""
    widths = itertools.accumulate(2 if unicodedata.east_asian_width(letter) in "FW" else 1 for letter in prompt)
    return "".join(letter for letter, width in zip(prompt, widths, strict=True) if width <= ROW_WIDTH)


def _add_prompt(page: Page, folder: Path, record: dict[str, Any]) -> None:
    """Adds one prompt to the page: its pictures with their numbers, and remarks."""
    page.paragraph(record["prompt"])
    captions = []
    for moment, run in (("before", 0), ("after", record["best_run"])):
        numbers = [f"reward {record['rewards'][run]:.4g}"]
        if record["held_out"]:
            numbers.append(f"held out {_number_text(record['held_out'][run])}")
        numbers.append(f"whiteness {_number_text(record['whiteness'][run])}")
        captions.append(f"{moment}: {', '.join([*numbers, *_bits(record, moment)])}")
    page.pictures([(folder / record[name], text) for name, text in zip(("before", "after"), captions, strict=True)])
    if record["flagged"]:
        page.paragraph(f"Black, because the safety checker flagged it: the image {' and '.join(record['flagged'])}.")
    if record["status"] != COMPLETED:
        page.paragraph(record["status"])


def _number_text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _bits(record: Mapping[str, Any], moment: str) -> list[str]:
    """Returns bits/dim of one image with their error, in words; an empty list without likelihoods."""
    if "bits_per_dim" not in record:
        return []
    value, error = (record[name][moment] for name in ("bits_per_dim", "bits_per_dim_error"))
    return [f"{_number_text(value)} ± {_number_text(error)} bits/dim"]


def _reward_names(records: Sequence[dict[str, Any]]) -> list[str]:
    return ["rewards", "held_out"] if records[0]["held_out"] else ["rewards"]


def _histories(rows: Iterable[Sequence[float | None]], length: int) -> pandas.DataFrame:
    """Returns one row per prompt and one column per run, with NaN for a number that was not finite. The last value of
    a prompt that stopped early fills the columns of the later runs."""
    return pandas.DataFrame([pandas.Series(row, dtype=float).reindex(range(length), method="ffill") for row in rows])
