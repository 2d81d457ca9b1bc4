"""Guidance of a pipeline through the whole sampling run: from a user's arguments to the best images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..arguments import check_kinds
from ..backbones import Backbone, backbone_of
from ..backbones.any_pipeline import AnyPipelineBackbone, bind_call
from ..backbones.base import Generators
from ..backbones.conditions import Condition
from ..backbones.inputs import check_arguments
from ..backbones.networks import check_weights
from ..backbones.run import SamplingRun
from ..backbones.stock_calls import restore_attributes
from ..backbones.unguided import default_guidance
from ..errors import InputError
from ..fisher.autodiff import AutodiffFisher
from ..fisher.estimator import FisherEstimator
from ..fisher.one_step import OneStepFisher
from ..images import ImageLike
from ..schedulers import FisherSchedulerMixin
from .checks import (
    Prompts,
    Reward,
    check_candidates,
    check_differentiable,
    check_guidance,
    check_num_steps,
    check_reported,
)
from .decoders import Decoder, Decoders, smaller_size
from .movers import OptimizerFactory, optimizer_factory
from .noise_ascent import VARIABLES, AscentSettings, GuidedRun, NoiseAscent
from .output import COMPLETED, GuidanceOutput
from .phases import CheapRuns, GuidanceCallback, GuidanceStep, Phases, cheap_runs, reordered_pairs
from .regulariser import LikelihoodRegulariser
from .rewards.named import named_reward
from .run_parts import DenoisersAndEstimator, Pull, without_guidance
from .whiteness import NoiseLayout, check_projection

"""Relative lengths of the default estimator's differences. On the embedded checkpoint in bfloat16 a gradient's cosine
with the exact product is 0.85 by 0.1, 0.82 by 0.05, and 0.43 by the 0.01 that float32 has (there 0.90)."""


@check_kinds
def guide(
    pipe: DiffusionPipeline,
    prompt: Condition,
    reward: Reward | str,
    *,
    num_guidance_steps: int = 10,
    step_size: float = 0.2,
    estimator: FisherEstimator | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    num_guidance_inference_steps: int | None = None,
    guidance_scheduler: SchedulerMixin | None = None,
    num_full_iterations: int = 0,
    num_unguided_iterations: int = 0,
    reward_downscale: int = 1,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    generator: Generators = None,
    latents: torch.Tensor | None = None,
    num_candidates: int = 1,
    output_type: str = "pil",
    return_dict: bool = True,
    optimise: Sequence[str] = ("noise",),
    optimizer: str | OptimizerFactory | None = None,
    patience: int | None = None,
    noise_projection: str | None = None,
    regulariser: LikelihoodRegulariser | None = None,
    held_out_reward: Reward | str | None = None,
    callback_on_guidance_step: GuidanceCallback | None = None,
    adjoint_guidance_scale: float | None = None,
    decoder: torch.nn.Module | None = None,
    checkpoint_decoder: bool = False,
    **call_arguments: Any,
) -> GuidanceOutput:
    """Steers generation by a reward, by ascent on the initial noise through the whole sampling run.

    The denoiser builds no graph: its place in the backward pass is taken by `estimator`. The best image of every
    sample is kept.

    Args:
        pipe: a pipeline, stock or ours; nothing on it is changed. Without a backbone of its class it is known by what
            its call says, and must make images.
        prompt: one prompt, or several; None where `prompt_embeds` are passed. Class labels where the pipeline takes
            class labels.
        reward: `reward(images, prompts) -> (B,)`, images (B, 3, H, W) in [0, 1] with a graph, higher is better; or the
            name of a reward, such as "pick_score", see `named_reward`.
        num_guidance_steps: gradient steps; 0 samples and scores, for which the reward needs no gradient.
        step_size: length of the first step relative to the noise's norm; halved for a sample whose reward is no better
            than its best before.
        estimator: estimator of the diffusion Fisher; None: `OneStepFisher()`, for one denoiser call per guidance step,
            or for runs of a single step `AutodiffFisher()`, a backward pass through the network.
        num_inference_steps, guidance_scale: arguments of the sampling runs; None: the stock call's defaults.
        num_guidance_inference_steps: number of steps of the runs by which the guidance climbs, such as 5; None: all
            runs are full ones, of `num_inference_steps` steps of the pipeline's own scheduler. The images come from a
            full run in any case.
        guidance_scheduler: scheduler of the runs of `num_guidance_inference_steps`, made by `from_config` from that of
            the pipeline; None: DPM-Solver++, or the pipeline's own for flow matching and consistency models.
        num_full_iterations: number of the last guidance steps that are taken by full runs.
        num_unguided_iterations: number of the first guidance steps that are taken by runs without classifier-free
            guidance, which evaluate the network on half as many samples. Their rewards are those of other images, so
            the guided runs begin anew with their best noise.
        reward_downscale: factor by which the cheap runs average their latents before they are decoded, such as 2. The
            reward then sees smaller images in these runs, and needs no more than it makes of them.
        latents: initial noise of unit variance, (B, C, h, w), or packed where the pipeline's own are; None: drawn with
            `generator` as the stock call does.
        num_candidates: number of initial noises of every sample, `latents` or the first drawn and further ones. The
            guidance begins with the best of them; without guidance steps this is best-of-N sampling.
        output_type: "pil", "np", "pt".
        optimise: what moves: "noise"; "text", the prompts' embedding, by the network's own derivative (a graph of one
            evaluation at a time); "control", added to the model's output at every step.
        optimizer: None for normalised ascent, which keeps the noise on its sphere; or a name in torch.optim, with
            `step_size` as its learning rate, or a factory from parameters to an optimiser.
        patience: number of runs without a new best of any sample after which the guidance stops; None: it never does.
        noise_projection: None: the noise keeps its norm and nothing else. "soft" or "hard": every step also brings it
            back to white noise, to within 2 standard deviations or to the mean power in every band of frequencies, see
            "White noise" in docs/guidance.md.
        regulariser: pulls the images toward likely ones while the reward rises, see `LikelihoodRegulariser`; None:
            nothing does.
        held_out_reward: a reward or its name, which is reported and not optimised. Where it falls, the guidance
            exploits the reward.
        callback_on_guidance_step: called with a `GuidanceStep` after every run; the guidance stops if it returns True.
        adjoint_guidance_scale: guidance scale of the denoiser in the backward pass, 1.0 to keep classifier-free
            guidance out of it; None: as in the runs, whose first output is compared with a denoiser that the estimator
            brings. It has no effect on estimators without a denoiser.
        decoder: decodes for the reward in the autoencoder's place, such as an `AutoencoderTiny`; the images that are
            returned are the autoencoder's.
        checkpoint_decoder: recomputes the decoder's activations in its backward pass instead of keeping them.
        **call_arguments: arguments of the pipeline's call, such as `negative_prompt`.

    Returns:
        `GuidanceOutput`, or with `return_dict=False` the tuple of its entries. Cost: `num_guidance_steps + 1` ordinary
        runs with decoding, and a decoder and reward gradient per guidance step; see the estimator for its own. With
        `num_guidance_inference_steps`, `num_full_iterations + 1` of the runs are full ones, and one more run is made;
        with `num_unguided_iterations` too. Every candidate costs one more run, if there are several.

    Raises:
        InputError: before sampling, arguments out of range, latents of the wrong shape, a reward that is not
            differentiable or of the wrong shape. UnsupportedError: a pipeline whose latents or images are not known.
        TrajectoryError: torch.inference_mode, latents changed between steps, a learned variance that the scheduler
            does not use.
        NumericalError: in the first run, images or a reward that are not finite. In later ones, and where a gradient
            is not, the best so far is returned, and `status` says what happened.
    """
    backbone = backbone_of(pipe)
    call_arguments = check_arguments(backbone.name, backbone.parameters, guide, call_arguments)
    steps = backbone.parameters["num_inference_steps"].default if num_inference_steps is None else num_inference_steps
    check_guidance(num_guidance_steps, step_size, steps, output_type, patience)
    check_candidates(num_candidates, callback_on_guidance_step)
    _check_options(backbone, estimator, optimise, noise_projection, decoder is not None or checkpoint_decoder)
    mover = optimizer_factory(optimizer, step_size)
    settings = AscentSettings(num_guidance_steps, step_size, mover, patience, noise_projection)
    backbone.check_scheduler()
    check_num_steps(backbone, steps)
    cheap = cheap_runs(
        backbone, num_guidance_inference_steps, guidance_scheduler, num_full_iterations, num_guidance_steps, optimise,
        call_arguments,
    )  # fmt: skip
    prompts, conditions = backbone.conditions(prompt, call_arguments, None, num_images_per_prompt)
    backbone = bind_call(backbone, {**call_arguments, **conditions, **_sizes(height, width)})
    pixels = backbone.image_size(height, width)
    small_pixels = smaller_size(backbone, pixels, reward_downscale, cheap)
    reward = named_reward(reward) if isinstance(reward, str) else reward
    held_out = named_reward(held_out_reward) if isinstance(held_out_reward, str) else held_out_reward
    candidates = [
        backbone.initial_noise(None if index else latents, len(prompts), pixels, generator)
        for index in range(num_candidates)
    ]
    check_weights(backbone.with_autoencoder(decoder).autoencoder if num_guidance_steps else None)
    check_reward = check_differentiable if num_guidance_steps else check_reported
    for size in dict.fromkeys((pixels, small_pixels)):
        check_reward(reward, (len(prompts), backbone.image_channels, *size), prompts, candidates[0].device)
    arguments = _run_arguments(backbone, guidance_scale, pixels, call_arguments, conditions)
    if estimator is None:
        estimator = default_estimator(steps if cheap is None else cheap.scheduler_and_steps[1])
    denoisers = DenoisersAndEstimator(backbone, arguments, estimator, adjoint_guidance_scale, "text" in optimise)
    unguided = None
    if num_unguided_iterations:
        climbing_steps = num_guidance_steps - num_full_iterations
        unguided = without_guidance(denoisers, backbone, arguments, estimator, num_unguided_iterations, climbing_steps)
    layout = _noise_layout(backbone, candidates[0], pixels)
    decoders = Decoders(backbone.with_autoencoder(decoder), pixels, small_pixels)
    pull = None if regulariser is None else Pull(regulariser, backbone, arguments)

    make_run = _RunMaker(reward, held_out, prompts, generator, optimise, layout, pull)
    full = backbone.differentiable_scheduler(), steps
    full_run = make_run(denoisers, decoders.decode, *full)
    climbs_by = (decoders.decode, *full) if cheap is None else (decoders.decode_small, *cheap.scheduler_and_steps)
    cheap_run = None if cheap is None else cheap.checked(make_run(denoisers, *climbs_by))
    unguided_run = None if unguided is None else make_run(unguided, *climbs_by)
    phases = Phases(full_run, cheap_run, num_full_iterations, settings, unguided_run, num_unguided_iterations)
    ascents = _ascend(backbone, phases, candidates, decoders, decoder, checkpoint_decoder, callback_on_guidance_step)
    output = _output(backbone, ascents, denoisers, output_type, cheap)
    output.num_denoiser_calls += sum(each.calls() for each in (unguided, pull) if each is not None)
    return output if return_dict else cast(GuidanceOutput, output.to_tuple())


def _check_options(
    backbone: Backbone, estimator: FisherEstimator | None, optimise: Sequence[str], noise_projection: str | None,
    has_decoder_options: bool,
) -> None:  # fmt: skip
    """Refuses what `guide` can't optimise, estimate or decode by. Raises `InputError`."""
    if not optimise or not set(optimise) <= set(VARIABLES):
        raise InputError(f"`optimise` is {optimise!r}; allowed: some of {', '.join(VARIABLES)}, as a list.")
    if noise_projection is not None:
        check_projection(noise_projection)
        if "noise" not in optimise:
            raise InputError(
                f"`noise_projection` is '{noise_projection}' while `optimise` is {optimise!r}; allowed: None where "
                'the noise does not move. Add "noise" to `optimise`, or leave the projection out.'
            )
    if has_decoder_options and backbone.autoencoder is None:
        raise InputError(f"{backbone.name} has no autoencoder `vae`; leave out `decoder` and `checkpoint_decoder`.")
    if estimator is not None and estimator.denoiser is not None and "text" in optimise:
        raise InputError(
            "The estimator has a denoiser of its own, whose prompts stay as they are while the text embedding is "
            f"optimised. Make it without: {type(estimator).__name__}()."
        )


def _sizes(height: int | None, width: int | None) -> dict[str, int]:
    """Returns the call's arguments for a size that the caller passed."""
    return {name: side for name, side in (("height", height), ("width", width)) if side is not None}


def _noise_layout(backbone: Backbone, noise: torch.Tensor, pixels: tuple[int, int]) -> NoiseLayout:
    """Returns how the noise of a pipeline comes to (B, C, ...), for its whiteness.

    Where packed latents belong to is not known without a backbone of the class: their tokens are then one axis.
    """
    if isinstance(backbone, AnyPipelineBackbone) and noise.ndim == 3:
        return NoiseLayout(_swap_tokens, _swap_tokens)
    return NoiseLayout(functools.partial(backbone.unpack, pixels=pixels), backbone.pack)


def _swap_tokens(noise: torch.Tensor) -> torch.Tensor:
    """Brings (B, N, C) to (B, C, N), and back."""
    return noise.transpose(1, 2)


def default_estimator(num_steps: int) -> FisherEstimator:
    """Returns the estimator of runs of `num_steps` that were given none.

    It is `AutodiffFisher` for a single step: there the whole gradient is one product with the network's Jacobian, and
    the exact one costs little more than a difference. From pure noise (flow matching, zero terminal SNR)
    `OneStepFisher` would be zero, because pure noise tells nothing of the image.
    """
    return AutodiffFisher() if num_steps == 1 else OneStepFisher()


def _ascend(
    backbone: Backbone, phases: Phases, candidates: list[torch.Tensor], decoders: Decoders,
    decoder: torch.nn.Module | None, checkpoint_decoder: bool, callback: GuidanceCallback | None,
) -> list[NoiseAscent]:  # fmt: skip
    """Runs the phases of the ascent, and decodes its images by the pipeline's own autoencoder.

    Args:
        candidates: initial noises (B, ...) in the pipeline's layout.
        decoders: how the runs decode.
        decoder: decoder that the runs use in the place of the pipeline's own; None: it uses the pipeline's own.
    """
    with backbone.loaded(), contextlib.ExitStack() as stack:
        if decoder is not None:
            _check_decoder(decoder, phases.full, candidates[0], decoders.pixels)
        if checkpoint_decoder:
            autoencoder: Any = backbone.autoencoder if decoder is None else decoder
            for part in autoencoder.modules():
                stack.enter_context(restore_attributes(part, "gradient_checkpointing", "_gradient_checkpointing_func"))
            autoencoder.enable_gradient_checkpointing()
        num_runs = phases.num_runs(len(candidates))
        progress = stack.enter_context(backbone.progress_bar(num_runs))

        def report(ascent: NoiseAscent) -> bool:
            progress.set_postfix(reward=f"{float(ascent.rewards[-1].mean()):.3f}")
            progress.update()
            return callback is not None and callback(GuidanceStep.after(ascent, num_runs)) is True

        ascents = phases.run(candidates, report)
        if decoder is not None or decoders.small_pixels != decoders.pixels:
            for tensors in (ascents[-1].best, ascents[0].initial):
                with torch.no_grad():
                    tensors["images"] = backbone.decode(tensors["latents"], decoders.pixels)
    return ascents


@torch.no_grad()
def _check_decoder(decoder: torch.nn.Module, run: GuidedRun, noise: torch.Tensor, pixels: tuple[int, int]) -> None:
    """Refuses a decoder to images of another size than `pixels`, by one sample. Raises `InputError`."""
    if not callable(getattr(decoder, "decode", None)):
        raise InputError(f"`decoder` is a {type(decoder).__name__}; allowed: an autoencoder, such as AutoencoderTiny.")
    size = tuple(run.decode(noise[:1]).shape[-2:])
    if size != pixels:
        raise InputError(
            f"`decoder` makes {size[0]}x{size[1]} pixels of this pipeline's latents, whose autoencoder makes "
            f"{pixels[0]}x{pixels[1]}; give a decoder of the same latents."
        )


def _output(
    backbone: Backbone, ascents: list[NoiseAscent], denoisers: DenoisersAndEstimator, output_type: str,
    cheap: CheapRuns | None,
) -> GuidanceOutput:  # fmt: skip
    """Finishes the images as the stock call does, and makes the output."""
    processor = vars(backbone.pipe).get("image_processor") or VaeImageProcessor()
    last = ascents[-1]
    (images, nsfw_flags), (initial, _) = (backbone.finish(each["images"]) for each in (last.best, ascents[0].initial))
    count = len(last.best_rewards)

    def postprocess(tensor: torch.Tensor) -> ImageLike:
        return processor.postprocess(tensor, output_type, do_denormalize=[False] * count)

    def rows(histories: Iterable[list[torch.Tensor]]) -> torch.Tensor:
        history = list(itertools.chain.from_iterable(histories))
        return torch.stack(history) if history else torch.zeros(0, count, dtype=torch.float64)

    whiteness = list(itertools.chain.from_iterable(each.whiteness for each in ascents))
    return GuidanceOutput(
        images=postprocess(images), rewards=rows(each.rewards for each in ascents), best_rewards=last.best_rewards,
        latents=last.best["noise"], gradient_norms=rows(each.gradient_norms for each in ascents),
        seconds=torch.tensor([second for each in ascents for second in each.seconds], dtype=torch.float64),
        num_denoiser_calls=sum(each.num_sampling_calls for each in ascents) + denoisers.calls(),
        nsfw_content_detected=nsfw_flags, initial_images=postprocess(initial),
        held_out_rewards=rows(each.held_out_rewards for each in ascents),
        shell_distances=rows(each.shell_distances for each in ascents),
        whiteness=rows([[each.p_values for each in whiteness]]),
        noise_band_scores=rows([[each.band_scores for each in whiteness]]),
        noise_correlation_scores=rows([[each.correlation_scores for each in whiteness]]),
        status=next((each.status for each in ascents if each.status != COMPLETED), COMPLETED),
        prompt_embeds=last.best.get("text"), controls=last.best.get("control"),
        best_runs=last.first_run + torch.stack(last.rewards).argmax(0), **_cheap_entries(ascents, cheap),
    )  # fmt: skip


def _cheap_entries(ascents: list[NoiseAscent], cheap: CheapRuns | None) -> dict[str, Any]:
    """Returns the output's entries on cheap runs; none without such runs."""
    if cheap is None:
        return {}
    last, cheap_rewards, full_rewards = ascents[-1], ascents[-2].best_rewards, ascents[-1].rewards[0]
    return {
        "num_cheap_runs": last.first_run, "guidance_scheduler": cheap.scheduler_name, "cheap_rewards": cheap_rewards,
        "full_rewards": full_rewards, "reordered": reordered_pairs(cheap_rewards, full_rewards),
    }  # fmt: skip


def _run_arguments(
    backbone: Backbone, guidance_scale: float | None, pixels: tuple[int, int], *arguments: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of the runs' calls: the guidance by its defaults, `arguments`, sizes and the scale."""
    # The defaults are named, because a denoiser without them would be unguided.
    result = default_guidance(backbone.parameters)
    for each in (*arguments, backbone.size_arguments(pixels)):
        result |= each
    if "guidance_scale" in result and guidance_scale is not None:
        result["guidance_scale"] = guidance_scale
    return result


@dataclasses.dataclass(frozen=True)
class _RunMaker:
    """Makes runs of different denoisers, decoders, schedulers and numbers of steps, with the same rewards."""

    reward: Reward
    held_out: Reward | None
    prompts: Prompts
    generator: Generators
    optimise: Sequence[str]
    layout: NoiseLayout
    pull: Pull | None = None

    def __call__(
        self, parts: DenoisersAndEstimator, decode: Decoder, scheduler: FisherSchedulerMixin, steps: int
    ) -> GuidedRun:
        sample = SamplingRun(
            parts.forward, scheduler, self.generator, parts.backward, num_inference_steps=steps, **parts.arguments
        )
        decode = decode if self.pull is None else self.pull.regularised(decode)
        return GuidedRun(
            sample, decode, self.reward, self.prompts, scheduler, parts.estimator, self.held_out, self.optimise,
            parts.text, self.layout,
        )  # fmt: skip
