"""The problems of the guidance benchmarks: prompts, noise, rewards and held-out rewards on a checkpoint."""

import argparse
import contextlib
import dataclasses
import functools
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import paired_seconds
from embedded_pipelines import NAMES, embedded_pipeline
from guidance_baseline_methods import Sampler
from guidance_methods import Methods, embeddings

from diffusers_fisher import (
    ClassifierReward,
    LinearReward,
    MeasurementReward,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.jobs.records import Records


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the benchmark.

    Every method guides `prompts` prompts in batches. Methods whose time to the exact reward is measured guide
    `compared_prompts` prompts.
    """

    prompts: int = 64
    compared_prompts: int = 256
    batch: int = 16
    steps: int = 25
    guidance_scale: float = 2.0
    step_size: float = 0.2
    iterations: int = 10
    rounds: int = 5
    import_rounds: int = 7
    memory_steps: tuple[int, ...] = (5, 10, 20)
    scheduler: str = "DDIM"
    dtype: str = "float32"


TINY = Setting(
    prompts=4, compared_prompts=6, batch=2, steps=2, iterations=1, rounds=1, import_rounds=1, memory_steps=(1, 2)
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Names the network that makes the images.

    Args:
        checkpoint: "sd" or "sd3", an embedded checkpoint.
        student: folder of the consistency model that train_student.py has distilled from "sd"; None: there is none.
    """

    checkpoint: str = "sd"
    student: str | None = None

    @property
    def suffix(self) -> str:
        """End of the names of files about this network."""
        return "_student" if self.student is not None else "" if self.checkpoint == "sd" else f"_{self.checkpoint}"

    @property
    def note(self) -> dict[str, str]:
        """What the settings of records say of the network; nothing for the first checkpoint."""
        return {"source": self.suffix.strip("_")} if self.suffix else {}


class Problem:
    """Holds the checkpoint, and the prompts, noise and rewards of every batch.

    Args:
        for_search: makes other noises, target classes and target images, on which strengths are searched. The
            prompts stay the ten that the checkpoints know.
    """

    def __init__(self, setting: Setting, source: Source | None = None, for_search: bool = False):
        source = Source() if source is None else source
        self.setting, self._place = setting, int(for_search)
        self.stack = contextlib.ExitStack()  # as long as the problem lives
        self.pipe = self.stack.enter_context(embedded_pipeline(source.checkpoint, source.student))
        self.images, self.labels = embedded_test_images()
        self.latents = backbone_of(self.pipe).samples_of(self.images)
        self.classifier = ClassifierReward.from_pretrained(Path(embedded_checkpoint(), "classifier"), target=0)
        generator = torch.Generator().manual_seed(self._place)
        self.noises = torch.randn(setting.compared_prompts, 4, 8, 8, generator=generator).split(setting.batch)

    @property
    def batches(self) -> range:
        return range(len(self.noises))

    def batch_labels(self, batch: int) -> list[int]:
        begin = batch * self.setting.batch
        return [index % 10 for index in range(begin, begin + len(self.noises[batch]))]

    def prompts(self, batch: int) -> list[str]:
        return [embedded_prompt(label) for label in self.batch_labels(batch)]

    def methods(self, batch: int, steps: int | None = None) -> Methods:
        """Returns all methods for the prompts of one batch."""
        embeds = embeddings(self.pipe, self.prompts(batch))
        return Methods(self.pipe, embeds, steps or self.setting.steps, self.setting.guidance_scale, self.latents)

    def rewards(self, batch: int) -> dict[str, tuple[Any, Any]]:
        """Returns by name the reward and the held-out reward.

        The held-out reward of "another class" is nearness to real images of that class. That of "left minus right" and
        of "inpainting" (of a real image's upper half) is the log-probability of the prompted class.
        """
        labels = self.batch_labels(batch)
        target = [(label + 1 + self._place) % 10 for label in labels]
        other_class, own_class = (
            ClassifierReward(self.classifier.model, classes, self.classifier.image_input)
            for classes in (target, labels)
        )
        targets = torch.stack([self.images[self.labels == label][self._place] for label in labels])
        mask = torch.zeros(32, 32)
        mask[:16] = 1
        return {
            "another class": (other_class, self._nearness(target)),
            "left minus right": (LinearReward.left_minus_right(32, 32), own_class),
            "inpainting": (MeasurementReward(targets, mask), own_class),
        }

    def _nearness(self, target: list[int]) -> Callable:
        """A reward: minus the mean squared distance to the nearest test image of the target class."""
        class_images = [self.images[self.labels == label].flatten(1) for label in target]

        def nearness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
            pairs = zip(images.flatten(1), class_images, strict=True)
            return torch.stack([-((image - neighbours) ** 2).mean(1).min() for image, neighbours in pairs])

        return nearness


class Cells:
    """Computes parts of the benchmark, each once, and keeps them by name."""

    def __init__(self, folder: Path, setting: Setting, source: Source | None = None, **more: Any):
        note = {"threads": torch.get_num_threads()} | (Source() if source is None else source).note
        self.records = Records(folder, dataclasses.asdict(setting) | note | more)

    def __call__(self, make: Callable[..., dict[str, Any]], *arguments: Any, context: tuple = ()) -> dict[str, Any]:
        """Returns `make(*context, *arguments)`, from its record if there is one."""
        words = [make.__name__, *map(str, arguments)]
        key = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in words)
        if self.records.missing([key]):
            begin = time.perf_counter()
            self.records.write(key, make(*context, *arguments))
            print(f"{key:<70}{time.perf_counter() - begin:>8.1f} s", flush=True)
        return self.records.read(key)


def prices(problem: Problem, student: Any = None) -> dict[str, float]:
    """Returns the seconds per sample of every kind of evaluation that `Sampler` counts: medians over rounds.

    Decoding includes a reward.

    Args:
        student: another pipeline, of a single step, whose kinds have "student " before their names.
    """
    noise, setting, counts = problem.noises[0], problem.setting, Counter[str]()
    reward, prompts = problem.rewards(0)["another class"][0], problem.prompts(0)
    sampler = Sampler(problem.pipe, prompts, setting.guidance_scale, setting.steps, counts)
    samplers = {"": sampler} | ({} if student is None else {"student ": Sampler(student, prompts, 1.0, 1, counts)})

    def evaluate(name: str, kind: str, backward: bool) -> None:
        x = noise.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            clean = samplers[name].predict(x, 0)[0] if kind == "denoise" else x
            result = clean if kind == "denoise" else reward(sampler.decode(clean), prompts)
        if backward:
            torch.autograd.grad(result, x, torch.ones_like(result))

    tasks = {
        f"{name}{kind}{' backward' * backward}": functools.partial(evaluate, name, kind, backward)
        for name in samplers for kind in ("denoise", "decode") for backward in (False, True)
    }  # fmt: skip
    seconds = paired_seconds(tasks, setting.rounds)
    return {name: statistics.median(values) / len(noise) for name, values in seconds.items()}


def best_so_far(cells: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns reward and held-out reward of every prompt's best run so far, (runs, prompts), and seconds, (runs,)."""
    length = min(len(cell["rewards"]) for cell in cells)
    rewards, held_out = (
        torch.cat([torch.tensor(cell[name][:length], dtype=torch.float64) for cell in cells], dim=1)
        for name in ("rewards", "held_out")
    )
    best, indices = rewards.cummax(0)
    seconds = torch.tensor([cell["seconds"][:length] for cell in cells], dtype=torch.float64).sum(0).cumsum(0)
    return best, held_out.gather(0, indices), seconds


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Returns the mean of the values, (B,), and its standard error, which is 0 for a single value."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def parse(
    description: str | None, name: str, arguments: list[str] | None, flags: Sequence[str] = (), **defaults: int
) -> argparse.Namespace:
    """Returns the options that the benchmarks of this problem share, `flags`, and by `defaults` options with numbers.

    `records` is a folder of the network's own, unless it is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--checkpoint", choices=NAMES, default="sd")
    parser.add_argument("--student", metavar="FOLDER", help="the distilled checkpoint of train_student.py")
    for flag in ("tiny", *flags):
        parser.add_argument(f"--{flag}", action="store_true")
    for option, default in defaults.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.source = Source(options.checkpoint, options.student)
    options.records = options.records or Path(f"outputs/benchmarks/{name}{options.source.suffix}")
    return options
