"""How many images per second does a likelihood evaluate, and how many would its network alone?

python examples/benchmarks/throughput.py [--images 256] [--steps 8] [--save]

Test images of the embedded checkpoint are evaluated in batches of 1, 4 and 16, in one process of one thread, in one of
two threads, and in two of one thread each. The floor is the time of the network's own calls: those of a batch are
recorded, and repeated with the same inputs and threads between the batches of the run. "With trace model" repeats the
calls of the trace model too. The parts of the time are those of the networks; decoding runs in threads of its own.
With --save the benchmark writes throughput.json and throughput.png. It needs two cores without other work.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from common import FOLDER, save
from sharded_run import write_images

from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.evaluation.dataset_settings import DatasetSettings
from diffusers_fisher.evaluation.image_evaluator import ImageEvaluator
from diffusers_fisher.evaluation.row_evaluator import RowEvaluator
from diffusers_fisher.figures import make_figure
from diffusers_fisher.files import save_figure
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline

CONFIGURATIONS = [(1, 1, 1), (1, 1, 4), (1, 1, 16), (1, 2, 16), (2, 1, 16)]
"""Processes, threads of each, images at once."""
DECODING_THREADS = 2


class Clock:
    """Sums the seconds of a network's calls, and can record and repeat them."""

    def __init__(self, network: torch.nn.Module):
        self.seconds, self.calls, self.records = 0.0, [], False
        self.forward = network.forward

        @functools.wraps(self.forward)  # the signature is asked for
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.records:
                self.calls.append((args, kwargs))
            begin = _now()
            result = self.forward(*args, **kwargs)
            self.seconds += _now() - begin
            return result

        network.forward = timed  # not by hooks, because the trace model's `forward` is called by itself

    def repeat(self) -> float:
        """Repeats the recorded calls and returns their seconds, which do not count among those of the run."""
        begin = _now()
        with torch.no_grad():
            for args, kwargs in self.calls:
                self.forward(*args, **kwargs)
        return _now() - begin


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def work(folder: Path, threads: int, batch_size: int, steps: int, part: tuple[int, int]) -> dict[str, Any]:
    """Evaluates the images of one process, when all processes are ready; returns seconds by part, and the floor's."""
    torch.set_num_threads(threads)
    pipe = load_pipeline(DenoiserSettings("embedded"))
    data = ImageData(str(folder / "images"), caption_column="text")
    evaluator = ImageEvaluator(pipe, DatasetSettings(DenoiserSettings("embedded"), data, num_inference_steps=steps))
    images = open_images(data)
    rows = [(position, images.rows[position]) for position in range(part[0], len(images), part[1])]
    engine = RowEvaluator(evaluator, images, batch_size, DECODING_THREADS)
    networks = {"denoiser": pipe.unet, "trace model": pipe.trace_model, "autoencoder": pipe.vae.encoder,
                "text encoder": pipe.text_encoder}  # fmt: skip
    clocks = {name: Clock(network) for name, network in networks.items()}
    floors: dict[str, list[float]] = defaultdict(list)
    for clock in clocks.values():
        clock.records = True
    list(engine.run(iter(rows[:batch_size])))  # warms up too
    for clock in clocks.values():
        clock.seconds, clock.records = 0.0, False
    (folder / f"ready-{part[0]}").touch()
    while len(list(folder.glob("ready-*"))) < part[1]:
        time.sleep(0.01)
    begin, paused = _now(), 0.0
    for number, _ in enumerate(engine.run(iter(rows))):
        if number % max(1, len(rows) // batch_size // 8) == 0:  # eight times between the batches of the run
            pause = _now()
            for name in ("denoiser", "trace model"):
                floors[name].append(clocks[name].repeat())
            paused += _now() - pause
    seconds = _now() - begin - paused
    parts = {name: clock.seconds for name, clock in clocks.items()}
    batches = len(rows) / batch_size
    denoiser, trace = (batches * statistics.median(floors[name]) for name in ("denoiser", "trace model"))
    return {"images": len(rows), "seconds": seconds, "parts": {**parts, "rest": seconds - sum(parts.values())},
            "floor": denoiser, "floor_with_trace_model": denoiser + trace}  # fmt: skip


def measure(folder: Path, processes: int, threads: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Runs the processes of one configuration together."""
    for file in folder.glob("ready-*"):
        file.unlink()
    words = [sys.executable, __file__, "--output", str(folder), "--steps", str(steps)]
    running = [
        subprocess.Popen([*words, "--work", *map(str, (threads, batch_size, index, processes))], text=True,
                         stdout=subprocess.PIPE)
        for index in range(processes)
    ]  # fmt: skip
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    seconds, count = max(result["seconds"] for result in results), sum(result["images"] for result in results)
    total = sum(result["seconds"] for result in results)
    ratios = {name: sum(result[name] for result in results) / total for name in ("floor", "floor_with_trace_model")}
    parts = {name: sum(result["parts"][name] for result in results) / total for name in results[0]["parts"]}
    return {
        "processes": processes, "threads": threads, "batch_size": batch_size, "images_per_second": count / seconds,
        "fraction_of_floor": ratios["floor"], "fraction_of_floor_with_trace_model": ratios["floor_with_trace_model"],
        "parts_of_the_time": parts,
    }  # fmt: skip


def rows_of(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table."""
    for row in results:
        yield (
            f"{row['processes']} processes of {row['threads']} threads, batches of {row['batch_size']:2d}: "
            f"{row['images_per_second']:6.2f} images/s, {row['fraction_of_floor']:.2f} of the floor, "
            f"{row['fraction_of_floor_with_trace_model']:.2f} with the trace model"
        )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws where the time goes."""
    figure, (axes,) = make_figure(8, 3)
    names = [f"{row['processes']} x {row['threads']}, {row['batch_size']}" for row in results]
    left = [0.0] * len(results)
    for part in results[0]["parts_of_the_time"]:
        widths = [row["parts_of_the_time"][part] for row in results]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="fraction of the time", ylabel="processes x threads, images at once")
    axes.invert_yaxis()
    axes.legend(ncols=5, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--save", action="store_true", help="write throughput.json and throughput.png")
    parser.add_argument("--work", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        threads, batch_size, *part = arguments.work
        print(json.dumps(work(arguments.output, threads, batch_size, arguments.steps, tuple(part))))
        return
    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place) / "images", arguments.images)
        results = [measure(Path(place), *row, steps=arguments.steps) for row in CONFIGURATIONS]
    print(*rows_of(results), sep="\n")
    if arguments.save:
        load = psutil.getloadavg()[0]  # above the number of processes, other work has slowed the run
        save("throughput", {"images": arguments.images, "steps": arguments.steps, "load": load, "rows": results})
        plot(results, FOLDER / "throughput.png")


if __name__ == "__main__":
    main()
