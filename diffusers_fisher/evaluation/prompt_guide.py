"""Guides prompts by a reward as the settings of a gallery or of a worker say."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ..backbones import backbone_of
from ..errors import CoarseGridWarning, InputError, NumericalError
from ..fisher import AutodiffFisher, DirectFisher, EndpointFisher, FiniteDifferenceFisher, FisherEstimator
from ..guidance import GuidanceOutput, named_reward
from ..guidance.movers import optimizer_factory
from ..guidance.output import COMPLETED
from ..jobs.pipelines import DenoiserSettings, load_pipeline, place_pipeline
from ..settings import Dtype, GuidanceEstimator, NoiseProjection, NotNegative, Positive, settings_class

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
        num_guidance_steps, step_size, optimizer, patience, num_guidance_inference_steps, num_full_iterations,
            num_unguided_iterations, num_candidates, noise_projection: arguments of `pipe.guide`.
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
    num_guidance_inference_steps: Positive | None = None
    num_full_iterations: NotNegative = 0
    num_unguided_iterations: NotNegative = 0
    num_candidates: Positive = 1
    noise_projection: NoiseProjection | None = None


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


def check_guidance(settings: GallerySettings, memory: Memory) -> None:
    """Raises `InputError` for settings that do not fit together."""
    if settings.patience is not None and memory.batch_size > 1:
        raise InputError(
            f"`patience` counts runs of a whole batch, so with `batch_size` {memory.batch_size} results would depend "
            "on the batches; take a batch size of 1, or leave `patience` out."
        )
    optimizer_factory(settings.optimizer, settings.step_size)


@dataclasses.dataclass(frozen=True)
class Guided:
    """The result of one prompt: a row of an output."""

    output: GuidanceOutput
    row: int

    def black_images(self, images: dict[str, torch.Tensor]) -> list[str]:
        """Returns the names of the images that a safety checker has replaced by black ones."""
        return [name for name, image in images.items() if self.output.nsfw_content_detected and not bool(image.any())]

    @property
    def best_run(self) -> int:
        return int(cast(torch.Tensor, self.output.best_runs)[self.row])


class PromptGuide:
    """Guides batches of prompts by a pipeline and rewards that it loads.

    Args:
        device: device that computes.
        progress: whether the pipeline shows its progress bars.

    Attributes:
        pipe: the pipeline.

    Raises:
        InputError: a name is unknown. With `likelihood` also if `pipe.log_likelihood` refuses the pipeline.
        UnsupportedError: diffusers can't offload the pipeline.
        CheckpointError: a checkpoint is damaged.
    """

    def __init__(self, settings: GallerySettings, memory: Memory, device: torch.device, progress: bool = False):
        self.settings, self.memory = settings, memory
        self.reward = named_reward(settings.reward)
        self.held_out = named_reward(settings.held_out) if settings.held_out else None
        parts = [getattr(reward, name, None) for reward in (self.reward, self.held_out) for name in ("model", "head")]
        for network in parts:
            if isinstance(network, torch.nn.Module):
                network.to(device)
        self.pipe = place_pipeline(
            load_pipeline(DenoiserSettings(settings.checkpoint, dtype=settings.dtype)), device, memory.offload
        )
        if settings.likelihood:  # two steps for a grey image: a refusal must come before hours of guidance
            backbone = backbone_of(self.pipe)
            grey = torch.full((1, backbone.image_channels, *backbone.image_size()), 0.5)
            with warnings.catch_warnings(action="ignore", category=CoarseGridWarning):
                self.pipe.log_likelihood(grey, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        self.pipe.set_progress_bar_config(disable=not progress)

    def guide(self, prompts: Sequence[str | int], seeds: Sequence[int]) -> list[Guided | str]:
        """Returns the result of every prompt, or the words of its error.

        If a number is not finite, the prompts are guided one by one, and the prompt at fault has the error.

        Args:
            prompts: texts, or class labels for pipelines that take labels.
            seeds: one seed of the initial noise per prompt.

        Raises:
            InputError: the pipeline refuses a prompt or a setting.
        """
        settings, failure = self.settings, None
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call: dict[str, Any] = (
            {} if settings.negative_prompt is None else {"negative_prompt": settings.negative_prompt}
        )
        try:
            output = self.pipe.guide(
                list(prompts), self.reward, held_out_reward=self.held_out, generator=generators,
                num_guidance_steps=settings.num_guidance_steps, step_size=settings.step_size,
                num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
                estimator=ESTIMATORS[settings.estimator](), optimizer=settings.optimizer, patience=settings.patience,
                num_guidance_inference_steps=settings.num_guidance_inference_steps,
                num_full_iterations=settings.num_full_iterations,
                num_unguided_iterations=settings.num_unguided_iterations, num_candidates=settings.num_candidates,
                noise_projection=settings.noise_projection,
                checkpoint_decoder=self.memory.checkpoint_decoder, output_type="pt", **call,
            )  # fmt: skip
            out = cast(GuidanceOutput, output)
        except NumericalError as error:
            failure = str(error)
        if len(prompts) > 1 and (failure is not None or out.status != COMPLETED):
            return [self.guide([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        return [failure if failure is not None else Guided(out, row) for row in range(len(prompts))]
