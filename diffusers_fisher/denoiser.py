"""A pipeline as a function: `(x, t) -> epsilon` through any unmodified diffusers pipeline."""

import abc
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .errors import InputError, NumericalError, UnsupportedError
from .features import recorded
from .noise import DenoisingState, NoiseLevel, Timestep, input_scale, noise_level, prediction_of


@contextlib.contextmanager
def borrowed(pipe: Any, **attributes: Any) -> Iterator[None]:
    """Sets instance attributes of `pipe` for the block, then puts back everything the block changed on it.

    Writes past the pipeline's `__setattr__`, which would otherwise note the change in its config.
    """
    saved = dict(vars(pipe))
    vars(pipe).update(attributes)
    try:
        yield
    finally:
        vars(pipe).clear()
        vars(pipe).update(saved)


STEP_INDEXED = {
    "control_guidance_start": 0.0, "control_guidance_end": 1.0, "adapter_conditioning_factor": 1.0,
    "skip_guidance_layers": None, "denoising_start": None, "denoising_end": None, "strength": 1.0,
}  # fmt: skip
"""Call arguments that act by the step's index within its run, with the value that does not."""


class _EchoScheduler:
    """A scheduler of one step that hands the model output back."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, timestep: Timestep):
        self.config = scheduler.config
        timestep = torch.as_tensor(timestep)
        # Pipelines iterate over timesteps: one entry, which may be a timestep a sample.
        self.timesteps = timestep.reshape(1) if timestep.numel() == 1 else timestep.reshape(1, -1)
        self.sigmas = torch.ones(2)
        self.output: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep | None = None) -> torch.Tensor:
        return sample

    def step(
        self, model_output, timestep, sample, return_dict: bool = True, generator=None, eta=None,
        use_clipped_model_output=None,
    ):  # fmt: skip
        self.output = model_output
        return SchedulerOutput(prev_sample=model_output) if return_dict else (model_output, model_output)


class Denoiser(abc.ABC):
    """A denoising network as a function of its own input (variance preserving for k-diffusion style schedulers).

    Args:
        scheduler: the diffusers scheduler whose timesteps, noise levels and prediction type the network uses.

    Attributes:
        num_calls: evaluations so far.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.prediction = prediction_of(scheduler)
        self.num_calls = 0
        self._features: torch.Tensor | None = None  # of the last evaluation

    @abc.abstractmethod
    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Raw model output at model input `x`, (B, ...), at one timestep, or at one per sample, (B,). Builds a graph
        only where `x` asks for one."""

    def __call__(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Predicted noise at `x`, (B, ...). Cost: one evaluation."""
        return self.state(x, timestep).epsilon

    def state(self, x: torch.Tensor, timestep: Timestep) -> DenoisingState:
        """The denoising state at model input `x` and (possibly fractional) `timestep`. Cost: one evaluation."""
        output = self.model_output(x, timestep)
        return DenoisingState(
            x, output.to(x.dtype), self.level(timestep), self.prediction, timestep, features=self._features
        )

    @property
    def network(self) -> torch.nn.Module | None:
        """The network behind the denoiser; None where there is none, as for closed forms."""
        return None

    def pooled_condition(self) -> torch.Tensor | None:
        """One vector per sample, (B, width), that stands for what the samples are conditioned on; None without."""
        return None

    def level(self, timestep: Timestep) -> NoiseLevel:
        """Noise level of the model's input at `timestep`."""
        carried = noise_level(self.scheduler, timestep)
        return carried.scaled(input_scale(self.scheduler, carried))


class PipelineDenoiser(Denoiser):
    """Calls a pipeline for one step and returns the (guided) model output.

    The pipeline is left exactly as it was after every call: scheduler, config, attributes, grad mode. Prompts are
    encoded once, at the first call. Samples are in the model's own input coordinates (variance preserving for
    k-diffusion style schedulers), in the pipeline's latent layout: (B, C, H, W), or packed (B, N, C) with `height` and
    `width` given.

    Conditioning by the step's index (ControlNet's start and end) can't be had from one step and is refused. Flux
    casts the timestep to the latents' dtype. Without guidance the states have `features`, where the network is not
    compiled. What the pipeline draws in its call (an inpainting pipeline's encoding of
    its masked image) is drawn anew by every evaluation: give it ready-made (`masked_image_latents`). PixArt's binning
    of sizes is off: the latents decide.

    Args:
        pipe: a diffusers pipeline whose call takes `latents`.
        guidance_scale: classifier-free guidance; 1.0 is none. With guidance the output is no score of any density.
        **call_arguments: passed to every call: `prompt`, `negative_prompt`, `prompt_embeds`, `height`, ...

    Attributes:
        num_calls: evaluations so far (with classifier-free guidance each runs the network on twice the batch).
        call_arguments: what every call of the pipeline is given.
        outdated: in words, what of the run that it stands for is not in its arguments; evaluations are then refused.

    Raises:
        UnsupportedError: a pipeline whose call takes no `latents`, a scheduler whose levels are not known (or, of our
            pipelines, of another family than the network's), or conditioning by the step's index.
    """

    def __init__(self, pipe: Any, guidance_scale: float = 1.0, **call_arguments: Any):
        parameters = inspect.signature(type(pipe).__call__).parameters
        if "latents" not in parameters:
            raise UnsupportedError(
                f"{type(pipe).__name__} takes no `latents`, so it can't be evaluated at a given sample; supported: "
                "pipelines whose call has `latents`, such as StableDiffusionPipeline. Unconditional and "
                "class-conditional ones get them from diffusers_fisher.fisher_pipeline(pipe)."
            )
        unknown = sorted(set(call_arguments) - set(parameters))
        if unknown:
            allowed = sorted(set(parameters) - {"self", "kwargs"})
            raise InputError(f"The call of {type(pipe).__name__} does not take {unknown}; it takes {allowed}.")
        indexed = {key: call_arguments[key] for key, neutral in STEP_INDEXED.items() if key in call_arguments}
        indexed = {key: value for key, value in indexed.items() if not _neutral(value, STEP_INDEXED[key])}
        if indexed:
            raise UnsupportedError(
                f"{indexed} acts by the step's index within a run, which a single evaluation does not have. Leave it "
                "out, or differentiate a run with an estimator that needs no denoiser, such as DirectFisher()."
            )
        if hasattr(pipe, "_check_scheduler"):  # one of our pipelines, which knows what its network was trained on
            pipe._check_scheduler()
        super().__init__(pipe.scheduler)
        self.pipe = pipe
        self.guidance_scale = guidance_scale
        if "guidance_scale" in parameters:
            call_arguments = {"guidance_scale": guidance_scale, **call_arguments}
        fixed = {"strength": 1.0, "use_resolution_binning": False}
        self.call_arguments = {key: value for key, value in fixed.items() if key in parameters} | call_arguments
        self._encoded: dict[Any, Any] = {}
        self.outdated: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.pipe._execution_device

    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Raw (guided) model output at model input `x`. Builds a graph only where `x` asks for one.

        Args:
            x: (B, ...).
            timestep: one, possibly fractional, or without guidance one a sample, (B,).

        Raises:
            InputError: timesteps of another number than samples; what the pipeline refuses, in its own words.
            UnsupportedError: a call that does not step, or that changes what the step returned.
            NumericalError: the output is not finite.
        """
        if self.outdated is not None:
            raise UnsupportedError(
                f"{self.outdated}; a single evaluation of the denoiser knows nothing of it. Leave it out, or use an "
                "estimator that needs no denoiser, such as DirectFisher()."
            )
        self._check_timesteps(x, timestep)
        scheduler = _EchoScheduler(self.scheduler, timestep)
        with_graph = torch.is_grad_enabled() and x.requires_grad
        call = inspect.unwrap(type(self.pipe).__call__) if with_graph else type(self.pipe).__call__
        attributes = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}, **self.encoding()}
        arguments = {**self._size_arguments(x), **self.call_arguments}
        latents = x.to(self._latents_dtype())
        with borrowed(self.pipe, **attributes), recorded(self.network) as features:
            result = call(
                self.pipe, latents=latents, num_inference_steps=1, output_type="latent", return_dict=False, **arguments
            )
        self.num_calls += 1
        # With guidance there are two evaluations, or one of twice the batch: features of no single output.
        self._features = features[0] if len(features) == 1 and len(features[0]) == len(x) else None
        output = result[0]
        name = type(self.pipe).__name__
        if scheduler.output is None:
            raise UnsupportedError(
                f"{name} ended its call without a step of its scheduler, so there is no model output. Leave out what "
                "shortens or interrupts its run."
            )
        if output is not scheduler.output and not _same(output, scheduler.output):
            raise UnsupportedError(
                f"{name} changed the latents after its scheduler's step (an inpainting blend, or a callback), so what "
                "it returned is not the model output. Use the text-to-image pipeline over the same components."
            )
        if not torch.isfinite(output).all():
            raise NumericalError(
                f"The denoiser's output at timestep {timestep} is not finite. Half-precision weights or inputs far "
                "outside the noise level's range are the usual causes."
            )
        return output

    def _check_timesteps(self, x: torch.Tensor, timestep: Timestep) -> None:
        count = torch.as_tensor(timestep).numel()
        if count not in (1, len(x)):
            raise InputError(f"{count} timesteps were given for {len(x)} samples; give one, or one a sample.")
        if count > 1 and self._doubles_batch():
            raise UnsupportedError(
                f"With guidance (scale {self.guidance_scale}) {type(self.pipe).__name__} runs twice the batch, which "
                "has no such timesteps; call once for every timestep, or at guidance scale 1."
            )

    def _doubles_batch(self) -> bool:
        arguments = self.call_arguments
        if "true_cfg_scale" in inspect.signature(type(self.pipe).__call__).parameters:
            return arguments.get("true_cfg_scale", 1.0) > 1  # the other scale is an input of the network
        return self.guidance_scale > 1

    @property
    def network(self) -> Any:
        """The pipeline's `unet` or `transformer`."""
        found = (getattr(self.pipe, name, None) for name in ("unet", "transformer"))
        return next((part for part in found if part is not None), None)  # compiled ones have no truth value

    def pooled_condition(self) -> torch.Tensor | None:
        """See `Denoiser.pooled_condition`; of our pipelines alone."""
        pooled_of = getattr(self.pipe, "_pooled", None)
        return None if pooled_of is None else pooled_of(self.call_arguments)

    def _latents_dtype(self) -> torch.dtype:
        network = self.network
        return (self.pipe if network is None else network).dtype

    def _size_arguments(self, x: torch.Tensor) -> dict[str, int]:
        factor = getattr(self.pipe, "vae_scale_factor", None)
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        if x.ndim != 4 or factor is None or "height" not in parameters:
            return {}
        return {"height": x.shape[-2] * factor, "width": x.shape[-1] * factor}

    def encoding(self) -> dict[str, Any]:
        """What to set on the pipeline for a call, so that it encodes its prompts once."""
        return {"encode_prompt": self.encode_prompt} if hasattr(self.pipe, "encode_prompt") else {}

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the pipeline's own: encodes each prompt once, without a graph, and remembers."""
        key = _key((args, kwargs))
        if key not in self._encoded:
            with torch.no_grad():
                # With the arguments, so that no other tensor takes the place in memory that the key knows it by.
                self._encoded[key] = type(self.pipe).encode_prompt(self.pipe, *args, **kwargs), args, kwargs
        return self._encoded[key][0]


def _key(value: Any) -> Any:
    """A hashable stand-in for call arguments: strings and numbers by value, tensors by identity."""
    if isinstance(value, dict):
        return tuple((name, _key(entry)) for name, entry in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_key(entry) for entry in value)
    return value if isinstance(value, (str, int, float, type(None), torch.device, torch.dtype)) else id(value)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())


def _neutral(value: Any, neutral: Any) -> bool:
    return all(entry == neutral for entry in value) if isinstance(value, (list, tuple)) else value == neutral
