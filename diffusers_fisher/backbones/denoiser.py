"""A pipeline as a function: `(x, t) -> epsilon` through any unmodified diffusers pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import check_call, check_kinds
from ..denoiser import Denoiser
from ..errors import FisherError, InputError, NumericalError, UnsupportedError, check_floats, describe_change
from ..features import count_evaluations, record_summaries
from ..noise import NoiseLevel, Timestep
from .any_pipeline import AnyPipelineBackbone
from .base import Backbone
from .conditions import CONDITIONS, count_of, select_conditions
from .echo import EchoScheduler, echo_scheduler
from .first_call import ADVICE, CALL_STEPS, PROBE_STEPS, RecordedNetworks, check_sample, random_state
from .networks import denoising_networks, missing_component
from .registry import backbone_of, has_tested_call
from .unguided import asks_for_guidance, check_evaluations, embeds_guidance, guiders_of, switched_off

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

STEP_INDEX_ARGUMENTS = {
    "control_guidance_start": 0.0, "control_guidance_end": 1.0, "adapter_conditioning_factor": 1.0,
    "skip_guidance_layers": None, "denoising_start": None, "denoising_end": None, "strength": 1.0,
    "cfg_trunc_ratio": 1.0, "use_dynamic_cfg": False, "guidance_schedule": None,
}  # fmt: skip
"""Call arguments that act by the step's index within its run, each with the value that has no effect."""

REPEATS = ("num_images_per_prompt", "num_videos_per_prompt")
"""Names of the call argument that says how many samples one prompt has."""

SAME_LEVEL = 0.01
"""Largest difference between the noise levels at a timestep and at its sigma, as rounded timesteps have."""

MAX_ENCODED = 16
"""Number of encoded prompts that a denoiser keeps; a call encodes at most a few."""

DEFAULTS = {"strength": 1.0, "use_resolution_binning": False}
"""Call arguments of every evaluation unless the caller passes another value."""


class PipelineDenoiser(Denoiser):
    """Calls a pipeline for one step and returns the (guided) model output.

    A shallow copy of the pipeline is called, with a scheduler of its own, so nothing on the pipeline changes. Prompts
    are encoded at the first call, and anew after a text encoder or a tokenizer has changed. Samples are in the model's
    own input coordinates (variance preserving for k-diffusion style schedulers), in the pipeline's latent layout:
    (B, C, H, W), or packed (B, N, C) with `height` and `width` passed.

    Conditioning by the step's index (ControlNet's start and end) is refused, because one step has no index. For a
    pipeline without a backbone of the package the first evaluation is compared with a run of four steps, and refused
    where these give the network other inputs, for which the network is not evaluated again. Flux casts the timestep to
    the latents' dtype. Caches of the network (`enable_cache`) are empty before each evaluation. Without guidance the
    states have `features`, where the network is not compiled. Every evaluation draws anew what the pipeline draws in
    its call (such as an inpainting pipeline's encoding of its masked image): pass it instead
    (`masked_image_latents`). PixArt's binning of sizes is off: the latents decide the size.

    Args:
        pipe: a diffusers pipeline whose call takes `latents`, or one of the families that have a backbone.
        guidance_scale: None switches every guidance of the call off (`true_cfg_scale`, `pag_scale`, guiders and
            others too), unless the call's arguments ask for one; an output that is guided all the same is refused. A
            number above 1 is passed to the call as it is; with guidance the output is the score of no density. Where
            the scale is an input of the network (distilled guidance, such as Flux-dev's), None is the call's default.
        **call_arguments: passed to every call: `prompt`, `negative_prompt`, `prompt_embeds`, `height`, ...

    Attributes:
        num_calls: evaluations so far (with classifier-free guidance each runs the network on twice the batch).
        call_arguments: arguments of every call of the pipeline.
        guidance_scale: guidance scale of the calls; None where they have none.
        is_guided: whether classifier-free guidance or another one was asked for.
        embedded_guidance_scale: guidance scale that the network takes as an input; None if it takes none.
        substitute: function of the result of `encode_prompt`, of its prompt and of its `prompt_embeds`, whose own
            result is used instead in every evaluation. None: there is no substitution.
        outdated: message that says what the denoiser's arguments lack of the run; evaluations are then refused.

    Raises:
        UnsupportedError: a pipeline whose call takes no `latents`, a scheduler whose levels are not known or of
            another family than the network's, or conditioning by the step's index.
    """

    @check_kinds
    def __init__(self, pipe: DiffusionPipeline | Backbone, guidance_scale: float | None = None, **call_arguments: Any):
        self.backbone = pipe if isinstance(pipe, Backbone) else backbone_of(pipe)
        parameters, call_arguments = self.backbone.parameters, check_call(self.backbone.parameters, call_arguments)
        unknown = sorted(set(call_arguments) - set(parameters))
        if unknown:
            allowed = sorted(set(parameters) - {"self", "pipe", "kwargs"})
            raise InputError(f"The call of {self.backbone.name} does not take {unknown}; it takes {allowed}.")
        for name in sorted({"output_type", "return_dict"} & set(call_arguments)):
            raise InputError(f"`{name}` is {call_arguments[name]!r}; a denoiser returns a tensor. Leave it out.")
        indices = {
            name: call_arguments[name]
            for name, neutral in STEP_INDEX_ARGUMENTS.items()
            if name in call_arguments and not _are_all(call_arguments[name], neutral)
        }
        if indices:
            raise UnsupportedError(
                f"{indices} acts by the step's index within a run, which a single evaluation does not have. Leave it "
                "out, or differentiate a run with an estimator that needs no denoiser, such as DirectFisher()."
            )
        self.backbone.check_scheduler()
        super().__init__(self.backbone.denoiser_scheduler(call_arguments))
        self._set_guidance(guidance_scale, call_arguments)
        self._is_checked = has_tested_call(self.backbone)
        self._level_error = 0.0
        self._encoded: dict[Hashable, tuple[Any, ...]] = {}
        self.outdated: str | None = None
        self.substitute: Callable[[tuple, object, torch.Tensor | None], tuple] | None = None

    def _set_guidance(self, scale: float | None, call_arguments: dict[str, Any]) -> None:
        """Sets `call_arguments`, and what they say of the guidance."""
        parameters, values = (
            self.backbone.parameters,
            switched_off(type(self.pipe), self.backbone.parameters, self.backbone.config),
        )
        self._guiders_scale = scale
        has_guiders = bool(guiders_of(self.backbone.name, self.pipe.components, scale))
        if scale is not None and "guidance_scale" in parameters:
            call_arguments["guidance_scale"] = scale
        elif scale not in (None, 1) and not has_guiders:
            raise InputError(
                f"The call of {self.backbone.name} takes no `guidance_scale`; got {scale}. Leave it out, or pass the "
                f"arguments by which it guides: {', '.join(values) or 'it has none'}."
            )
        self.is_guided = asks_for_guidance(values, call_arguments) or (has_guiders and scale not in (None, 1))
        defaults = {name: value for name, value in DEFAULTS.items() if name in parameters}
        self.call_arguments = defaults | ({} if self.is_guided else values) | call_arguments
        scales = {
            name: self.call_arguments.get(name, parameters[name].default)
            for name in ("distilled_guidance_scale", "guidance_scale")
            if name in parameters
        }
        self.guidance_scale = scales.get("guidance_scale", scale)
        if embeds_guidance(self.backbone.config):
            self.embedded_guidance_scale = next(iter(scales.values()), None)

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline that the denoiser calls."""
        return self.backbone.pipe

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.backbone.device

    @property
    def input_dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def network(self) -> torch.nn.Module | None:
        """The pipeline's denoising network."""
        return self.backbone.network

    @check_kinds
    def level(self, timestep: Timestep) -> NoiseLevel:
        """Returns the noise level of the model's input at `timestep`.

        Raises:
            UnsupportedError: the pipeline's timesteps have another meaning.
        """
        if self._level_error > SAME_LEVEL:
            raise UnsupportedError(
                f"{self.backbone.name} tells its network timesteps that are not those of its scheduler's sigmas (they "
                f"differ by a noise level of {self._level_error:.2g}), so the level at a timestep is not known. "
                "Differentiate a run: its states have the run's own levels."
            )
        return super().level(timestep)

    def check_layout(self, samples: torch.Tensor) -> None:
        """Checks the layout of samples where the pipeline has no backbone of its own: the call says what it draws.

        Raises:
            InputError: the call draws latents of another shape for the denoiser's arguments.
        """
        if isinstance(self.backbone, AnyPipelineBackbone):
            self.backbone.check_layout(samples, self.encode_prompt, self._arguments(samples))

    def select_samples(self, rows: torch.Tensor) -> PipelineDenoiser:
        """Returns a denoiser whose call has the conditions of these samples alone; see `Denoiser.select_samples`.

        Taken apart are the arguments of the call that stand for one sample per entry: conditions, and other tensors
        and lists of as many entries as the conditions have.
        """
        selected = copy.copy(self)
        selected.call_arguments, selected._encoded = select_conditions(self.call_arguments, rows), {}
        return selected

    def pooled_condition(self) -> torch.Tensor | None:
        """Returns one vector per sample, (B, width), of the call's conditions; see `Denoiser.pooled_condition`."""
        return self.backbone.pooled(self.call_arguments)

    @check_kinds
    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Returns the raw (guided) model output at model input `x`. Builds a graph only where `x` asks for one.

        Args:
            x: (B, ...) model input.
            timestep: one timestep, possibly fractional, or without guidance one per sample, (B,).

        Raises:
            InputError: timesteps of another number than samples.
            UnsupportedError: a call that does not step, or that changes what the step returned.
            NumericalError: the output is not finite.
        """
        if self.outdated is not None:
            raise UnsupportedError(
                f"{self.outdated}; a single evaluation of the denoiser knows nothing of it. Leave it out, or use an "
                "estimator that needs no denoiser, such as DirectFisher()."
            )
        self._check_input(x, timestep)
        if torch.as_tensor(timestep).numel() > 1 and isinstance(self.backbone, AnyPipelineBackbone):
            return self._outputs_one_by_one(x, torch.as_tensor(timestep).flatten())
        latents, networks = x.to(self.backbone.dtype), denoising_networks(self.pipe.components)
        scheduler = echo_scheduler(self.scheduler, timestep)
        with record_summaries(self.network) as features, count_evaluations(networks.values()) as evaluations:
            if self._is_checked:
                result = self._call(scheduler, latents, with_graph=torch.is_grad_enabled() and x.requires_grad)
            else:
                result = self._checked_call(scheduler, latents, RecordedNetworks(networks), timestep)
        self.num_calls += 1
        # With guidance there are two evaluations, or one of twice the batch: the features belong to no single output.
        self._features = features[0] if len(features) == 1 and len(features[0]) == len(x) else None
        self._level_error = scheduler.level_error
        output = self._check_result(result[0], scheduler, latents, timestep)
        if not self.is_guided:
            check_evaluations(self.backbone.name, self.backbone.parameters, evaluations, len(x))
        return output

    def _outputs_one_by_one(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of samples that each have a timestep, by one call per sample.

        A call may take its timestep for one number, in silence: Wan 2.2 multiplies it with a mask of patches.
        """
        outputs = []
        for row, timestep in enumerate(timesteps):
            alone = self.select_samples(torch.tensor([row]))
            outputs.append(alone.model_output(x[row : row + 1], timestep))
            self._level_error = alone._level_error
        self.num_calls, self._features = self.num_calls + len(x), None
        return torch.cat(outputs)

    def _checked_call(
        self, scheduler: EchoScheduler, latents: torch.Tensor, networks: RecordedNetworks, timestep: Timestep
    ) -> tuple:
        """Returns the result of `_call`, after a comparison of its step with those of a run."""
        restore_random = random_state(self.call_arguments, self.device)
        with networks.recording():
            result = self._call(scheduler, latents, with_graph=torch.is_grad_enabled() and latents.requires_grad)
        if scheduler.outputs and scheduler.samples[0].shape == latents.shape:  # else `_check_result` raises
            restore_random, restore_now = random_state(self.call_arguments, self.device), restore_random
            restore_now()  # so that the run draws what the single step drew
            run = functools.partial(self._call, latents=latents.detach())
            try:
                steps = echo_scheduler(self.scheduler, timestep, PROBE_STEPS, holds_sample=True)
                networks.compare_steps(self.backbone, scheduler.outputs[0], steps, run)
            finally:
                restore_random()
            self._is_checked = True
        return result

    def _call(
        self, scheduler: EchoScheduler, latents: torch.Tensor, with_graph: bool = False, **components: torch.nn.Module
    ) -> tuple:
        """Calls the pipeline on `scheduler`. Raises `UnsupportedError` if the call needs more of a scheduler."""
        arguments = {
            "num_inference_steps": max(len(scheduler.timesteps), CALL_STEPS),
            "output_type": "latent", "return_dict": False, **self._arguments(latents),
        }  # fmt: skip
        try:
            return self.backbone.call(
                scheduler, latents, with_graph=with_graph, encode_prompt=self.encode_prompt,
                components=components | guiders_of(self.backbone.name, self.pipe.components, self._guiders_scale),
                **arguments,
            )  # fmt: skip
        except AttributeError as error:
            if error.obj is None:
                raise missing_component(self.pipe, error) from error
            if not isinstance(error.obj, EchoScheduler):
                raise
            raise UnsupportedError(
                f"The call of {self.backbone.name} reads `scheduler.{error.name}`, which belongs to a whole run. "
                f"{ADVICE}"
            ) from error
        except (RuntimeError, ValueError) as error:
            if (
                isinstance(error, FisherError)
                or scheduler.outputs
                or not isinstance(self.backbone, AnyPipelineBackbone)
            ):
                raise
            if isinstance(error, RuntimeError):  # of a network that latents of this shape do not fit
                with contextlib.suppress(UnsupportedError):  # what the call draws is not known either
                    self.check_layout(latents)
            if isinstance(error, RuntimeError) or latents.ndim != 3:
                raise
            raise UnsupportedError(
                f"The call of {self.backbone.name} does not take latents of shape {tuple(latents.shape)} ({error}). "
                "If its scheduler steps packed latents and its call takes others, use an estimator that needs no "
                "denoiser, such as DirectFisher(), and a loss of `trajectory.final_sample`."
            ) from error

    def _arguments(self, latents: torch.Tensor) -> dict[str, Any]:
        """Returns the arguments of a call for latents of this number and size."""
        return {
            **self.backbone.size_arguments_of(latents), **self._repeats(len(latents)), **self.call_arguments,
        }  # fmt: skip

    def _repeats(self, count: int) -> dict[str, int]:
        """Returns the call argument by which one prompt serves `count` samples; none where it is not needed.

        Raises:
            InputError: prompts, embeddings or class labels of another number than samples.
        """
        arguments, parameters = self.call_arguments, self.backbone.parameters
        name = next((each for each in REPEATS if each in parameters), None)
        repeats = 1 if name is None else arguments.get(name) or 1
        for condition in CONDITIONS:
            value = arguments.get(condition)
            number = count_of(condition, value) if isinstance(value, (list, tuple, torch.Tensor)) else 1
            if value is None or number is None or number * repeats == count:
                continue
            if number == 1 and name is not None and name not in arguments:
                return {name: count}
            raise InputError(
                f"`{condition}` is for {number * repeats} samples, and the denoiser was called with {count}; give one "
                "for every sample, as a list."
            )
        return {}

    def _check_result(
        self, result: torch.Tensor, scheduler: EchoScheduler, latents: torch.Tensor, timestep: Timestep
    ) -> torch.Tensor:
        """Returns the model output of the call's one step.

        Raises unless it is finite, belongs to `latents` and, for pipelines with a backbone, is the call's result.
        """
        name = self.backbone.name
        if not scheduler.outputs:
            raise UnsupportedError(
                f"{name} ended its call without a step of its scheduler, so there is no model output. Leave out what "
                "shortens or interrupts its run."
            )
        output = scheduler.outputs[0]
        if isinstance(self.backbone, AnyPipelineBackbone):
            check_sample(self.backbone, scheduler, latents)
        elif result is not output and not _are_equal(result, output):
            raise UnsupportedError(
                f"{name} returned other latents than its scheduler's step, {describe_change(output, result)}: it "
                "blends, scales or unpacks them after the step, or a callback changed them, so they are not the model "
                f"output. {ADVICE}"
            )
        if not torch.isfinite(output).all():
            low, high = map(float, latents.detach().aminmax())
            raise NumericalError(
                f"The denoiser's output at timestep {timestep} is not finite, with weights in {self.backbone.dtype} "
                f"and inputs from {low:.3g} to {high:.3g}. Check the weights, and that inputs "
                "are finite and of the noise level's size."
            )
        return output

    def _check_input(self, x: torch.Tensor, timestep: Timestep) -> None:
        check_floats("The model input", x)
        if x.ndim < 2:
            raise InputError(f"The model input has shape {tuple(x.shape)}; allowed: (B, ...), a batch of samples.")
        if not isinstance(self.backbone, AnyPipelineBackbone):
            sample = self.backbone.pack(torch.empty(1, self.backbone.latent_channels, 8, 8, device="meta"))
            axis = 1 if sample.ndim == 4 else 2
            if x.ndim != sample.ndim or x.shape[axis] != sample.shape[axis]:
                allowed = ("B", sample.shape[1], "h", "w") if axis == 1 else ("B", "N", sample.shape[2])
                raise InputError(
                    f"The model input has shape {tuple(x.shape)}; allowed: ({', '.join(map(str, allowed))}), latents "
                    f"in the layout of {self.backbone.name}."
                )
        count = torch.as_tensor(timestep).numel()
        if count not in (1, len(x)):
            raise InputError(
                f"{count} timesteps were given for {len(x)} samples; allowed: one for all, or one per sample."
            )
        if count > 1 and self.is_guided:
            raise UnsupportedError(
                f"With guidance (scale {self.guidance_scale}) {self.backbone.name} runs twice the batch, which has no "
                "such timesteps; call once for every timestep, or at guidance scale 1."
            )

    def encode_prompt(self, encode: Callable[..., tuple], *args: Any, **kwargs: Any) -> tuple:
        """Returns the result of the pipeline's own `encode`, which runs without a graph, and remembers it.

        A prompt is encoded anew when a text encoder or a tokenizer has changed.
        """
        key = _key((args, kwargs))
        # Results that somebody has changed in place, such as a callback of a run, are encoded anew.
        encoders, entry = self._encoders_key(), self._encoded.get(key)
        if entry is None or entry[1] != (encoders, _key(entry[0])):
            try:
                with torch.no_grad():
                    result = encode(*args, **kwargs)
            except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                raise InputError(
                    f"The call's arguments don't suit `encode_prompt` of {self.backbone.name}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            # It keeps the arguments too: else a new tensor could get the address that is in the key.
            self._encoded[key] = result, (self._encoders_key(), _key(result)), args, kwargs
            if len(self._encoded) > MAX_ENCODED:
                del self._encoded[next(iter(self._encoded))]
        result = self._encoded[key][0]
        if self.substitute is None:
            return result
        return self.substitute(result, kwargs.get("prompt", args[0] if args else None), kwargs.get("prompt_embeds"))

    def _encoders_key(self) -> Hashable:
        from ..models import component_key  # here, because it loads diffusers' models

        components = self.pipe.components.items()
        return tuple(component_key(part) for name, part in components if "text_encoder" in name or "tokenizer" in name)


def _key(value: object) -> Hashable:
    """Makes a hashable key of call arguments: strings and numbers by value, tensors by identity and version.

    A tensor's version counts its changes in place; tensors made under inference mode have none.
    """
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict):
        return tuple((name, _key(entry)) for name, entry in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_key(entry) for entry in value)
    return value if isinstance(value, (str, int, float, type(None), torch.device, torch.dtype)) else id(value)


def _are_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())


def _are_all(value: object, neutral: float | None) -> bool:
    """Returns whether an argument, or every entry of it, is `neutral`."""
    return all(entry == neutral for entry in value) if isinstance(value, (list, tuple)) else value == neutral
