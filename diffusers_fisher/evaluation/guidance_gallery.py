"""Guides many prompts over many processes and writes a gallery, for `diffusers-fisher guide`."""

import codecs
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import logging

from ..console import say
from ..errors import InputError
from ..files import check_writable, finite_number
from ..jobs.folder_lock import locked_folder
from ..jobs.pages import save_picture
from ..jobs.pipelines import check_offload
from ..jobs.processes import process_state
from ..jobs.records import Records, item_keys, shard
from .guidance_gallery_report import PICTURES, FailedPrompt, GuidedPrompt, gallery_summary, write_gallery
from .prompt_guide import GallerySettings, Guided, Memory, PromptGuide, check_guidance

logger = logging.get_logger(f"diffusers.{__name__}")


def run_gallery(
    output: Path,
    prompts_file: Path,
    settings: GallerySettings,
    memory: Memory | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Guides every prompt of a file and writes the gallery.

    With `accelerate launch` every process takes a share of the prompts. The next run continues a killed one.

    Args:
        output: folder of `settings.json`, `records/`, `pictures/`, `index.html` and `gallery.png`.
        prompts_file: text file with one prompt per line; empty lines are left out.
        memory: options that save memory; None means `Memory()`.
        retry_failed: guide again the prompts that failed.

    Returns:
        The mean rewards before and after, the number of prompts, and the number of prompts that "failed" because
        their first images or rewards were not finite.

    Raises:
        InputError: there are no prompts, a name is unknown, `offload` has no accelerator, or `output` belongs to
            another run that has not ended or has records of other settings. With `likelihood` also if
            `pipe.log_likelihood` refuses the pipeline.
        UnsupportedError: diffusers can't offload the pipeline.
        CheckpointError: a checkpoint or record is damaged.
    """
    memory = memory or Memory()
    prompts = read_prompts(prompts_file)
    state = process_state()
    _check(settings, memory, state.device)
    with locked_folder(output, state):
        return _guide_all(output, prompts, settings, memory, retry_failed, state)


def _guide_all(
    output: Path, prompts: list[str], settings: GallerySettings, memory: Memory, retry_failed: bool,
    state: PartialState,
) -> dict[str, Any]:  # fmt: skip
    """Guides all prompts in a folder that belongs to this launch."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    note = {**dataclasses.asdict(settings), "prompts": f"{len(prompts)}, sha256 {digest[:16]}"}
    records = Records(output, note, GuidedPrompt | FailedPrompt)
    check_writable(records.folder / PICTURES)
    items = shard(list(zip(item_keys(len(prompts)), prompts, strict=True)), state.process_index, state.num_processes)
    done = records.done()
    rest = [item for item in items if item[0] not in done or (retry_failed and "failed" in records.read(item[0]))]
    if state.is_main_process:
        say(f"{len(prompts)} prompts, {len(items) - len(rest)} of this process's {len(items)} done")
    if rest:
        guidance = _Guidance(records, settings, memory, state)
        for begin in range(0, len(rest), memory.batch_size):
            guidance.run(rest[begin : begin + memory.batch_size])
    state.wait_for_everyone()
    collected = records.collected(item_keys(len(prompts)))
    summary = gallery_summary(collected)
    if state.is_main_process:
        write_gallery(records.folder, collected, records.settings)
        say(f"The gallery is {(records.folder / 'index.html').resolve()}")
        if summary["failed"]:
            logger.warning(
                "%d of %d prompts failed: the gallery says why, and --retry-failed tries them again.",
                summary["failed"], summary["prompts"],
            )  # fmt: skip
    return summary


def read_prompts(path: Path) -> list[str]:
    """Returns the lines of a text file that are not empty, without the spaces around them.

    The file is UTF-8, or UTF-16 with its mark. Lines end as on Unix, Windows or old Macs, and nowhere else.

    Raises:
        InputError: the file can't be read, or has no prompts.
    """
    try:
        content = path.read_bytes()
        is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"The prompts '{path}' can't be read: {error}. Give a text file in UTF-8, one prompt per line."
        ) from error
    prompts = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not prompts:
        raise InputError(f"The prompts '{path}' are empty; give one prompt per line.")
    return prompts


def _check(settings: GallerySettings, memory: Memory, device: torch.device) -> None:
    check_guidance(settings, memory)
    check_offload(memory.offload, device)


class _Guidance:
    """Guides batches of prompts, and writes the pictures and the record of every prompt."""

    def __init__(self, records: Records, settings: GallerySettings, memory: Memory, state: PartialState):
        self.records, self.settings = records, settings
        self.guide = PromptGuide(settings, memory, state.device, progress=state.is_main_process)

    def run(self, batch: Sequence[tuple[str, str]]) -> None:
        """Guides and records a batch of keys and prompts. The record of a prompt at fault says that it failed."""
        seeds = [self.settings.seed + int(key) for key, _ in batch]
        results = self.guide.guide([prompt for _, prompt in batch], seeds)
        for (key, prompt), seed, result in zip(batch, seeds, results, strict=True):
            entries = {"failed": result} if isinstance(result, str) else self._write_result(key, prompt, seed, result)
            self.records.write(key, {"prompt": prompt, "seed": seed, **entries})

    def _write_result(self, key: str, prompt: str, seed: int, result: Guided) -> dict[str, Any]:
        """Writes the pictures of one prompt, and returns the entries of its record."""
        out, index = result.output, result.row
        images = {"before": out.initial_images[index], "after": out.images[index]}
        files = {name: f"{PICTURES}/{key}_{name}.png" for name in images}
        for name, image in images.items():
            save_picture(image, self.records.folder / files[name])
        histories: dict[str, Any] = {
            "rewards": out.rewards, "held_out": out.held_out_rewards, "shell_distances": out.shell_distances,
            "whiteness": out.whiteness, "gradient_norms": out.gradient_norms,
        }  # fmt: skip
        return {
            "best_run": result.best_run,
            **{name: [finite_number(value) for value in rows[:, index].tolist()] for name, rows in histories.items()},
            **(self._likelihoods(prompt, images, seed) if self.settings.likelihood else {}),
            "seconds": out.seconds.tolist(), "status": out.status, "flagged": result.black_images(images), **files,
        }  # fmt: skip

    def _likelihoods(self, prompt: str, images: dict[str, torch.Tensor], seed: int) -> dict[str, Any]:
        """Returns bits/dim of the images under their prompt, and the half-width of their 95% interval."""
        generator = torch.Generator().manual_seed(seed)
        out = self.guide.pipe.log_likelihood(torch.stack(list(images.values())), prompt, generator=generator)
        numbers = {"bits_per_dim": out.bits_per_dim, "bits_per_dim_error": out.total_error_bits}
        return {
            name: dict(zip(images, map(finite_number, row.tolist()), strict=True)) for name, row in numbers.items()
        }
