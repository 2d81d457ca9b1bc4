"""Is a run in shards, of which two are killed twice, equal to one run, and does its memory stay flat?

python examples/benchmarks/sharded_run.py [--images 20000] [--shards 4]

The benchmark writes shifted test images of the embedded checkpoint, evaluates them in shards by `diffusers-fisher
likelihood --num-shards`, kills the first two shards with SIGKILL twice each, merges the shards by `diffusers-fisher
merge`, and evaluates all images once more in one run. It counts the records that are lost or doubled, compares the
numbers, and follows the memory of the one run. With
--save it writes sharded_run.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from common import save
from PIL import Image

from diffusers_fisher import embedded_prompt, embedded_test_images

AGREEMENT = 1e-5  # bits/dim: float32 sums of other orders
KILLED_SHARDS = 2
KILLS = 2


def write_images(folder: Path, count: int) -> None:
    """Writes the embedded test images again and again, each time shifted by another number of pixels."""
    images, labels = embedded_test_images()
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        turn, index = divmod(number, len(images))
        pixels = images[index].roll((turn % 32, turn // 32), (1, 2))
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
        lines.append(json.dumps({"file_name": f"{number:06d}.png", "text": embedded_prompt(int(labels[index]))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "diffusers_fisher.cli", *words]


def likelihood(folder: Path, output: Path, batch_size: int, steps: int, *options: str) -> list[str]:
    return command(
        "likelihood", "--data", str(folder / "images"), "--caption-column", "text", "--output", str(output),
        "--batch-size", str(batch_size), "--num-inference-steps", str(steps), *options,
    )  # fmt: skip


def record_files(output: Path) -> list[Path]:
    """Returns the complete files of records in a folder; the names of others begin with a point."""
    return [*output.glob("records/[!.]*.json")]


def records(output: Path) -> Counter[int]:
    """Returns how many records each image has in a folder."""
    groups = [json.loads(path.read_text()) for path in record_files(output)]
    return Counter(row["position"] for group in groups for row in group["records"])


def kill_after_a_file(line: list[str], output: Path) -> int:
    """Runs a command, kills it after its first new file of records, and returns the number of records then."""
    before = len(record_files(output))
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(record_files(output)) == before:
        if process.poll() is not None:
            raise RuntimeError("The shard ended before it could be killed; take more images.")
        time.sleep(0.02)
    process.kill()
    process.wait()
    return sum(records(output).values())


def run_watched(line: list[str], output: Path) -> list[tuple[int, float]]:
    """Runs a command, and returns how many files of records there were and how many MiB it used, over time."""
    process = subprocess.Popen(line)
    watched, points = psutil.Process(process.pid), []
    while process.poll() is None:
        files = len(record_files(output))
        if files:
            points.append((files, watched.memory_info().rss / 2**20))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"The run ended with status {process.returncode}.")
    return points


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]


def run(folder: Path, count: int, num_shards: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Evaluates the images both ways; returns what differs."""
    write_images(folder / "images", count)
    shards, kills = [folder / f"shard-{index}" for index in range(num_shards)], {}
    for index, output in enumerate(shards):
        options = ("--shard-index", str(index), "--num-shards", str(num_shards))
        line = likelihood(folder, output, batch_size, steps, *options)
        if index < KILLED_SHARDS:
            kills[str(index)] = [kill_after_a_file(line, output) for _ in range(KILLS)]
        subprocess.run(line, check=True)
    subprocess.run(command("merge", str(folder / "merged"), *map(str, shards)), check=True)
    memory = run_watched(likelihood(folder, folder / "whole", batch_size, steps), folder / "whole")
    merged, whole, found = lines(folder / "merged"), lines(folder / "whole"), records(folder / "merged")
    differences = [abs(a["bits_per_dim"] - b["bits_per_dim"]) for a, b in zip(merged, whole, strict=True)]
    quarter = memory[len(memory) // 4][1]
    return {
        "images": count, "shards": num_shards, "batch_size": batch_size, "steps": steps,
        "records_at_each_kill": kills,
        "lost": sum(position not in found for position in range(count)),
        "doubled": sum(number > 1 for number in found.values()),
        "largest_difference_bits_per_dim": max(differences),
        "same_names_and_captions": all(a["name"] == b["name"] and a["caption"] == b["caption"]
                                       for a, b in zip(merged, whole, strict=True)),
        "memory_mib": {"after_a_quarter": quarter, "largest_after_a_quarter": max(
            size for _, size in memory[len(memory) // 4 :])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/sharded_run"))
    parser.add_argument("--save", action="store_true", help="write sharded_run.json")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    result = run(arguments.output, arguments.images, arguments.shards, arguments.batch_size, arguments.steps)
    print(json.dumps(result, indent=2))
    if arguments.save:
        save("sharded_run", result)
    assert not result["lost"] and not result["doubled"], "records are lost or doubled"
    assert result["largest_difference_bits_per_dim"] < AGREEMENT, "the numbers differ"


if __name__ == "__main__":
    main()
