"""Measures memory over many runs in one process: 200 guided images and 1,000 likelihoods on the embedded checkpoint.

python examples/benchmarks/memory.py
"""

import gc
from collections.abc import Callable

import matplotlib.pyplot as plt
import psutil
import torch
from common import PICTURES, save

from diffusers_fisher import (
    ClassifierReward,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.files import save_figure

GUIDE_CALLS, IMAGES, BATCH = 200, 1000, 20


def resident_megabytes() -> float:
    return psutil.Process().memory_info().rss / 1e6


def live_tensors() -> int:
    """Returns the number of tensors that Python knows, after a garbage collection."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def record(run: Callable[[int], object], count: int) -> dict[str, list[float] | int]:
    """Returns the memory after every run, and the number of tensors that all runs but the first two left behind."""
    memory = []
    for index in range(count):
        run(index)
        if index == 1:
            before = live_tensors()
        memory.append(round(resident_megabytes(), 1))
    return {"megabytes": memory, "tensors_left": live_tensors() - before}


def main() -> None:
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    reward = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target="ankle boot")
    images, labels = embedded_test_images()

    def guide(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        pipe.guide("a photo of a sneaker", reward, num_guidance_steps=1, num_inference_steps=10, generator=generator)

    def score(index: int) -> None:
        rows = [(BATCH * index + offset) % len(images) for offset in range(BATCH)]
        pipe.log_likelihood(images[rows], [embedded_prompt(int(labels[row])) for row in rows], num_inference_steps=12)

    result = {"guide": record(guide, GUIDE_CALLS), "log_likelihood": record(score, IMAGES // BATCH)}
    save("memory", {"setting": {"guide_calls": GUIDE_CALLS, "images": IMAGES, "batch": BATCH}, **result})
    draw(result)


def draw(result: dict) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    titles = (f"{GUIDE_CALLS} calls of guide", f"{IMAGES:,} images in batches of {BATCH}")
    for panel, name, title in zip(panels, ("guide", "log_likelihood"), titles, strict=True):
        megabytes = result[name]["megabytes"]
        panel.plot(megabytes)
        panel.set(title=title, xlabel="calls", ylabel="resident memory, MB", ylim=(0, 1.2 * max(megabytes)))
    save_figure(figure, PICTURES / "memory.png")


if __name__ == "__main__":
    main()
