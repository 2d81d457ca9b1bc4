"""Does an image's likelihood depend on batches and processes, and how much faster are two processes?

python examples/benchmarks/dataset_likelihood.py [sharing] [killed] [report]   # parts to run; without parts all

The benchmark runs `diffusers-fisher likelihood` on test images under the embedded checkpoint, in three parts.
"sharing" uses batches of 1 and 16 and 1 and 2 processes, and compares the numbers of every image and the times.
"killed" kills a run with SIGKILL and resumes it. "report" runs the commands of the README over all 10,000 test images
(half an hour on two cores). It keeps the summary, and writes the report and a picture of the most and least likely
images into docs. The benchmark needs Fashion-MNIST (see examples/fashion_mnist.py) and, for the times, two cores
without other work. It writes dataset_likelihood.json.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import FOLDER, PICTURES, machine

from diffusers_fisher import StableDiffusionFisherPipeline, embedded_checkpoint
from diffusers_fisher.files import save_figure, write_json

sys.path.insert(0, str(FOLDER.parent))
import fashion_mnist

IMAGES = 256
PARTS = ("sharing", "killed", "report")
ROOT = FOLDER.parent.parent
PICTURE = PICTURES / "dataset_likelihood.png"
PAGE = ROOT / "docs" / "dataset_likelihood_report.html"
RUNS = {"1 process, batches of 1": (1, 1), "1 process, batches of 16": (1, 16), "2 processes, batches of 16": (2, 16)}
ONE, TWO = "1 process, batches of 16", "2 processes, batches of 16"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # one core per process


def command(folder: Path, name: str, processes: int, batch_size: int, *options: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [
        sys.executable, *launcher, "-m", "diffusers_fisher.cli", "likelihood", "--model", "embedded", "--data",
        str(folder / "images"), "--caption-column", "text", "--batch-size", str(batch_size), "--output",
        str(folder / name), *options,
    ]  # fmt: skip


def bits(folder: Path) -> list[float]:
    lines = (folder / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["bits_per_dim"] for line in lines]


def share_images(folder: Path, estimator: str, count: int) -> dict[str, Any]:
    """Runs every way; returns the largest difference from the first way, and images per second."""
    numbers, rates = {}, {}
    for name, (processes, batch_size) in RUNS.items():
        target = folder / f"{estimator} {name}"
        shutil.rmtree(target, ignore_errors=True)
        line = command(folder, target.name, processes, batch_size, "--estimator", estimator, "--limit", str(count))
        subprocess.run(line, check=True, env=ENVIRONMENT)
        run = json.loads((target / "summary.json").read_text())["last_run"]
        if (run["processes"], run["images"]) != (processes, count):
            raise RuntimeError(f"{name}: it ran {run['images']} images in {run['processes']} processes.")
        numbers[name], rates[name] = bits(target), run["images_per_second"]
    first = numbers[next(iter(RUNS))]
    away = {name: max(abs(a - b) for a, b in zip(row, first, strict=True)) for name, row in numbers.items()}
    return {
        "images": count, "largest_difference_bits_per_dim": away, "images_per_second": rates,
        "two_processes_over_one": rates[TWO] / rates[ONE],
    }  # fmt: skip


def resume_after_kill(folder: Path, estimator: str, count: int) -> dict[str, Any]:
    """Kills two processes after a third of their records, and resumes the run with the same command."""
    name = f"{estimator} killed"
    shutil.rmtree(folder / name, ignore_errors=True)
    line = command(folder, name, 2, 4, "--estimator", estimator, "--limit", str(count))
    files = folder / name / "records"

    def read_rows() -> dict[int, dict[str, Any]]:
        groups = [json.loads(path.read_text()) for path in files.glob("0*.json")]
        return {row["position"]: row for group in groups for row in group["records"]}

    process = subprocess.Popen(line, env=ENVIRONMENT)
    while len(read_rows()) < count // 3:
        if process.poll() is not None:
            raise RuntimeError("The run ended before it could be killed.")
        time.sleep(0.2)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):  # workers are in other groups
        each.kill()
    process.wait()
    before = read_rows()
    subprocess.run(line, check=True, env=ENVIRONMENT)
    after = read_rows()
    summary = json.loads((folder / name / "summary.json").read_text())
    single_name = f"{estimator} {ONE}"
    subprocess.run(command(folder, single_name, 1, 16, "--estimator", estimator, "--limit", str(count)), check=True)
    single_bits = bits(folder / single_name)
    return {
        "images": count, "records_before": len(before), "computed_after": summary["last_run"]["images"],
        "records_changed": sum(after[position] != row for position, row in before.items()),
        "largest_difference_from_unbroken_bits_per_dim": max(
            abs(a - b) for a, b in zip(bits(folder / name), single_bits, strict=True)
        ),
    }  # fmt: skip


def report() -> dict[str, Any]:
    """Returns the summary of all test images by the README's commands; a killed run is resumed."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    make, evaluate = (
        shlex.split(next(line for line in lines if line.startswith(begin)))
        for begin in ("python examples/fashion_mnist.py", "diffusers-fisher likelihood")
    )
    images, output = (ROOT / evaluate[evaluate.index(option) + 1] for option in ("--data", "--output"))
    scripts = Path(sys.executable).parent
    for words in (make, evaluate):
        subprocess.run([scripts / words[0], *words[1:]], check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (output / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copy(output / "index.html", PAGE)
    save_figure(_make_figure(images, sorted(rows, key=lambda row: row["bits_per_dim"])), PICTURE)
    return json.loads((output / "summary.json").read_text())


def _make_figure(images: Path, rows: list[dict[str, Any]]) -> Any:
    """Draws the histogram, and one row each of the most and least likely images."""
    import numpy
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 5), layout="constrained")
    top, *strips = figure.subfigures(3, 1, height_ratios=[2.2, 1, 1])
    axes = top.subplots()
    axes.hist([row["bits_per_dim"] for row in rows], bins=80)
    axes.set(xlabel="bits/dim of the latent (lower is likelier)", ylabel="images")
    for part, title, part_rows in zip(
        strips, ("Most likely", "Least likely"), (rows[:12], rows[:-13:-1]), strict=True
    ):
        part.suptitle(title, fontsize=10)
        for place, row in zip(part.subplots(1, len(part_rows)), part_rows, strict=True):
            with Image.open(images / row["name"]) as picture:
                place.imshow(numpy.asarray(picture), cmap="gray", vmin=0, vmax=255)
            place.set(xticks=[], yticks=[])
            place.set_xlabel(f"{row['bits_per_dim']:.2f}", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts to run, of {', '.join(PARTS)}; without parts all of them")
    parser.add_argument("--images", type=int, default=IMAGES, help='number of images of "sharing" and "killed"')
    parser.add_argument("--output", type=Path, default=Path("outputs/dataset_likelihood"))
    arguments = parser.parse_args()
    if not set(arguments.parts) <= set(PARTS):
        parser.error(f"parts are {arguments.parts}; allowed: {', '.join(PARTS)}")
    folder, count, path = arguments.output, arguments.images, FOLDER / "dataset_likelihood.json"
    if not (folder / "images" / "metadata.jsonl").is_file():
        fashion_mnist.write_folder(folder / "images", "test")
    estimators = ["autodiff"]
    if StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint()).trace_model is not None:
        estimators.insert(0, "trace-model")
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "sharing": lambda: {name: share_images(folder, name, count) for name in estimators},
        "killed": lambda: resume_after_kill(folder, estimators[0], count),
        "report": report,
    }
    result = json.loads(path.read_text()) if path.is_file() else {}
    for part in arguments.parts or PARTS:
        result[part] = {"machine": machine(), **tasks[part]()}
        write_json(path, result)


if __name__ == "__main__":
    main()
