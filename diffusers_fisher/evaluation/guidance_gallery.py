"""Guides many prompts over many processes and writes a gallery, for `diffusers-fisher guide`."""

import codecs
import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from diffusers.utils import logging

from ..backbones import backbone_of
from ..console import say
from ..errors import CoarseGridWarning, InputError, NumericalError, UnsupportedError
from ..files import check_writable, finite_number
from ..fisher import AutodiffFisher, DirectFisher, EndpointFisher, FiniteDifferenceFisher, FisherEstimator
from ..guidance import GuidanceOutput, named_reward
from ..guidance.movers import optimizer_factory
from ..guidance.output import COMPLETED
from ..jobs.folder_lock import locked_folder
from ..jobs.pages import save_picture
from ..jobs.pipelines import DenoiserSettings, load_pipeline
from ..jobs.processes import process_state
from ..jobs.records import Records, item_keys, shard
from ..pipelines import FisherPipelineMixin
from ..settings import Dtype, GuidanceEstimator, Positive, settings_class
from .guidance_gallery_report import PICTURES, FailedPrompt, GuidedPrompt, gallery_summary, write_gallery

logger = logging.get_logger(f"diffusers.{__name__}")


ESTIMATORS: dict[GuidanceEstimator, Callable[[], FisherEstimator | None]] = {
    "one-step": lambda: None,  # the default of `guide`, which depends on the network's precision
    "direct": DirectFisher,
    "finite-difference": FiniteDifferenceFisher,
    "autodiff": AutodiffFisher,
    "endpoint-centred": lambda: EndpointFisher(centred=True),
    "endpoint": EndpointFisher,
}


@settings_class
class GallerySettings:
    """Settings on which the images depend. A run can be resumed with the same settings only.

    Args:
        checkpoint: a pipeline's folder or Hub id; "embedded" means the checkpoint that the package ships.
        reward, held_out: names of rewards, see `named_reward`; `held_out` None means no held-out reward.
        estimator: estimator of the Fisher, see `ESTIMATORS`.
        num_guidance_steps, step_size, optimizer, patience: arguments of `pipe.guide`.
        num_inference_steps, guidance_scale: arguments of the pipeline; None means its default.
        dtype: dtype of the pipeline's weights.
        seed: seed of the first prompt; the seed of every further prompt is one more, for every batch size.
        negative_prompt: negative prompt for all prompts; None means the pipeline's default.
        likelihood: whether to record bits/dim of every image before and after, by `pipe.log_likelihood`.
    """

    checkpoint: str = "embedded"
    reward: str = "classifier:embedded:ankle boot"
    held_out: str | None = None
    estimator: GuidanceEstimator = "one-step"
    num_guidance_steps: int = 10
    step_size: float = 0.2
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    dtype: Dtype = "float32"
    seed: int = 0
    negative_prompt: str | None = None
    optimizer: str | None = None
    patience: int | None = None
    likelihood: bool = False


@settings_class
class Memory:
    """Options that save memory and change no result. A run can be resumed with other values.

    Args:
        batch_size: number of prompts that are guided at once, each with its own history.
        checkpoint_decoder: argument of `pipe.guide`.
        offload: move every network to the accelerator only while it works, by `enable_model_cpu_offload`.
    """

    batch_size: Positive = 1
    checkpoint_decoder: bool = False
    offload: bool = False


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
    if settings.patience is not None and memory.batch_size > 1:
        raise InputError(
            f"`patience` counts runs of a whole batch, so with `batch_size` {memory.batch_size} results would depend "
            "on the batches; take a batch size of 1, or leave `patience` out."
        )
    if memory.offload and device.type == "cpu":
        raise InputError("`offload` needs an accelerator to load the networks onto, and none was found; leave it out.")
    optimizer_factory(settings.optimizer, settings.step_size)


class _Guidance:
    """Guides batches of prompts, and writes the pictures and the record of every prompt."""

    def __init__(self, records: Records, settings: GallerySettings, memory: Memory, state: PartialState):
        self.records, self.settings, self.memory = records, settings, memory
        self.reward = named_reward(settings.reward)
        self.held_out = named_reward(settings.held_out) if settings.held_out else None
        parts = [getattr(reward, name, None) for reward in (self.reward, self.held_out) for name in ("model", "head")]
        for network in parts:
            if isinstance(network, torch.nn.Module):
                network.to(state.device)
        self.pipe = load_pipeline(DenoiserSettings(settings.checkpoint, dtype=settings.dtype))
        if memory.offload:
            _offload(self.pipe, state.device)
        else:
            self.pipe.to(state.device)
        if settings.likelihood:  # two steps for a grey image: a refusal must come before hours of guidance
            backbone = backbone_of(self.pipe)
            grey = torch.full((1, backbone.image_channels, *backbone.image_size()), 0.5)
            with warnings.catch_warnings(action="ignore", category=CoarseGridWarning):
                self.pipe.log_likelihood(grey, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        self.pipe.set_progress_bar_config(disable=not state.is_main_process)

    def run(self, batch: Sequence[tuple[str, str]]) -> None:
        """Guides and records a batch of keys and prompts.

        If a number is not finite, the prompts are guided one by one, and the record of the prompt at fault says that
        it failed.
        """
        settings, failure = self.settings, None
        generators = [torch.Generator().manual_seed(settings.seed + int(key)) for key, _ in batch]
        call: dict[str, Any] = (
            {} if settings.negative_prompt is None else {"negative_prompt": settings.negative_prompt}
        )
        try:
            output = self.pipe.guide(
                [prompt for _, prompt in batch], self.reward, held_out_reward=self.held_out, generator=generators,
                num_guidance_steps=settings.num_guidance_steps, step_size=settings.step_size,
                num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
                estimator=ESTIMATORS[settings.estimator](), optimizer=settings.optimizer, patience=settings.patience,
                checkpoint_decoder=self.memory.checkpoint_decoder, output_type="pt", **call,
            )  # fmt: skip
            out = cast(GuidanceOutput, output)
        except NumericalError as error:
            failure = str(error)
        if len(batch) > 1 and (failure is not None or out.status != COMPLETED):
            for item in batch:
                self.run([item])
            return
        for index, (key, prompt) in enumerate(batch):
            seed = settings.seed + int(key)
            result = {"failed": failure} if failure is not None else self._write_result(key, prompt, seed, out, index)
            self.records.write(key, {"prompt": prompt, "seed": seed, **result})

    def _write_result(self, key: str, prompt: str, seed: int, out: GuidanceOutput, index: int) -> dict[str, Any]:
        """Writes the pictures of one prompt, and returns the entries of its record."""
        images = {"before": out.initial_images[index], "after": out.images[index]}
        files = {name: f"{PICTURES}/{key}_{name}.png" for name in images}
        for name, image in images.items():
            save_picture(image, self.records.folder / files[name])
        histories: dict[str, Any] = {
            "rewards": out.rewards, "held_out": out.held_out_rewards, "shell_distances": out.shell_distances,
            "whiteness": out.whiteness, "gradient_norms": out.gradient_norms,
        }  # fmt: skip
        # A safety checker replaces an image by a black one.
        black_images = [name for name, image in images.items() if out.nsfw_content_detected and not bool(image.any())]
        return {
            "best_run": int(cast(torch.Tensor, out.best_runs)[index]),
            **{name: [finite_number(value) for value in rows[:, index].tolist()] for name, rows in histories.items()},
            **(self._likelihoods(prompt, images, seed) if self.settings.likelihood else {}),
            "seconds": out.seconds.tolist(), "status": out.status, "flagged": black_images, **files,
        }  # fmt: skip

    def _likelihoods(self, prompt: str, images: dict[str, torch.Tensor], seed: int) -> dict[str, Any]:
        """Returns bits/dim of the images under their prompt, and the half-width of their 95% interval."""
        generator = torch.Generator().manual_seed(seed)
        out = self.pipe.log_likelihood(torch.stack(list(images.values())), prompt, generator=generator)
        numbers = {"bits_per_dim": out.bits_per_dim, "bits_per_dim_error": out.total_error_bits}
        return {
            name: dict(zip(images, map(finite_number, row.tolist()), strict=True)) for name, row in numbers.items()
        }


def _offload(pipe: FisherPipelineMixin, device: torch.device) -> None:
    """Calls `enable_model_cpu_offload`. Raises `UnsupportedError` if diffusers can't offload the pipeline."""
    try:
        pipe.enable_model_cpu_offload(device=device)
    except (ValueError, RuntimeError, ImportError) as error:  # no order of its networks, no accelerator, no accelerate
        raise UnsupportedError(
            f"{type(pipe).__name__} can't be offloaded: {error} Leave `offload` out, or save memory with a smaller "
            "batch and a checkpointed decoder."
        ) from error
