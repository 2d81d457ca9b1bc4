"""One object per pipeline that knows what is particular to its family: a `Backbone`.

The defaults here are those of a text-to-image pipeline in latents (B, C, h, w) of a Kullback-Leibler autoencoder. A
family's class overrides what differs; `backbones/stable_diffusion_3.py` is a short example.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..arguments import check_generators
from ..errors import InputError, UnsupportedError, check_floats
from ..images import UNIT_RANGE, ImageLike, image_tensor
from .autoencoder import decode_latents, encode_pixels, images_of, pixels_of
from .conditions import Condition, Conditions, text_conditions
from .encoding import encode_apart, encode_conditions, mean_of_tokens
from .inputs import check_latents, form_of
from .networks import check_latents_alone, check_weights, reset_caches
from .parts import LatentStatistics, checkpoint_moments, checkpoint_parts
from .scheduler_kind import check_scheduler_kind
from .stock_calls import shallow_copy
from .unguided import check_unconditional_branch, pop_unguided

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from ..models import FisherTraceModel
    from ..schedulers import FisherSchedulerMixin

Generators = torch.Generator | list[torch.Generator] | None
Moment = torch.Tensor | float | None
Posterior = tuple[torch.Tensor, torch.Tensor | None]


class Backbone:
    """Says what the library must know of one pipeline: its layouts, sizes and conditions, and how to call it.

    Nothing of the pipeline is changed: its shallow copies are called, which share its components. Offload hooks,
    adapters and caches are state of the components, so threads that change them must take turns.

    Args:
        pipe: the pipeline, stock or one of ours.

    Attributes:
        space: "latent", or "pixel" where samples are the images themselves.
        predicts_flow: whether the network was trained on (1 - s) x_0 + s eps.
        noise_dtype: dtype in which the call draws its noise; None: that of the network's weights.
        scales_samples: whether the call multiplies noise and model input by the scheduler's factors.
        standardises_latents: whether the call uses the autoencoder's `latents_mean` and `latents_std`.
        pooled_index: place of the network's pooled embeddings in the result of `encode_prompt`; None without any.
        token_indices: places of the tokens' embeddings and of their mask (None without any) in the result of
            `encode_prompt`, whose mean stands for pooled embeddings; None: it does not.
        pixel_multiple: number of pixels of which the call takes multiples alone, beside whole patches of the network.
        network_name, autoencoder_name: names of these components.
    """

    space: ClassVar[str] = "latent"
    predicts_flow: ClassVar[bool] = False
    noise_dtype: ClassVar[torch.dtype | None] = None
    scales_samples: ClassVar[bool] = True
    standardises_latents: bool = False
    pooled_index: ClassVar[int | None] = None
    token_indices: ClassVar[tuple[int, int | None] | None] = None
    pixel_multiple: ClassVar[int] = 8
    network_name: ClassVar[str] = "transformer"
    autoencoder_name: ClassVar[str] = "vae"

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self._keeps_loaded = False

    @property
    def name(self) -> str:
        """The pipeline's class, for messages."""
        return type(self.pipe).__name__

    @property
    def scheduler(self) -> SchedulerMixin:
        """The pipeline's scheduler."""
        return self.pipe.scheduler

    def differentiable_scheduler(self) -> FisherSchedulerMixin:
        """Makes a scheduler like the pipeline's whose runs can be differentiated."""
        from ..schedulers import fisher_scheduler

        return fisher_scheduler(type(self.scheduler)).from_config(self.pipe.scheduler.config)

    def denoiser_scheduler(self, call_arguments: Mapping[str, Any]) -> SchedulerMixin:
        """Returns a scheduler whose timesteps are those that the call tells the network, for these arguments."""
        return self.scheduler

    @property
    def network(self) -> torch.nn.Module | None:
        """The denoising network."""
        return self.pipe.components[self.network_name]

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's configuration."""
        return self._known_network.config

    @property
    def autoencoder(self) -> torch.nn.Module | None:
        """The autoencoder; None where the pipeline has none."""
        return self.pipe.components.get(self.autoencoder_name)

    @property
    def trace_model(self) -> FisherTraceModel | None:
        """The trace model of this checkpoint, where there is one."""
        return checkpoint_parts(self.pipe).trace_model

    @property
    def latent_statistics(self) -> LatentStatistics | None:
        """Mean and variance of the training data's latents, each of one sample's shape; None if they are unknown."""
        return checkpoint_parts(self.pipe).latent_statistics

    @property
    def device(self) -> torch.device:
        """The device on which the pipeline computes."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the latents that the call takes: that of the network's weights."""
        return self._known_network.dtype

    @property
    def _known_network(self) -> Any:
        """The network as diffusers' ModelMixin, whose `config` and `dtype` torch's own type lacks."""
        return self.network

    # The call

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The pipeline's call, as a function of `latents`. Raises `UnsupportedError` if it takes no `latents`."""
        call = type(self.pipe).__call__
        if "latents" in inspect.signature(call).parameters:
            return call
        if self.latents_call is None:
            raise UnsupportedError(
                f"{self.name} takes no `latents`, so it can't be evaluated at a sample; supported: pipelines "
                "whose call has `latents`, such as StableDiffusionPipeline."
            )
        return self.latents_call

    latents_call: ClassVar[Callable[..., Any] | None] = None
    """For families whose stock call takes no `latents`: a static method `(pipe, ..., latents)` that does."""

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the call by name."""
        return dict(inspect.signature(self.function).parameters)

    @property
    def takes_text(self) -> bool:
        """Whether samples are conditioned on prompts, rather than on class labels or nothing."""
        return "prompt" in self.parameters

    @property
    def encodes_prompts(self) -> bool:
        """Whether the pipeline has an `encode_prompt`."""
        return "encode_prompt" in dir(type(self.pipe))

    def call(
        self,
        scheduler: object,
        latents: torch.Tensor | None,
        with_graph: bool = False,
        encode_prompt: Callable[..., tuple] | None = None,
        components: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        """Runs the pipeline's call on a shallow copy with another scheduler, without a progress bar.

        Args:
            scheduler: scheduler that the call runs on.
            latents: latents in the pipeline's layout; None: the call draws them.
            with_graph: whether to leave the call's `torch.no_grad` out.
            encode_prompt: takes the place of the pipeline's `encode_prompt`, which is its first argument.
            components: other components of the copy, by name.
            **arguments: other arguments of the call.
        """
        check_weights(self.network if with_graph else None)
        reset_caches(self.pipe)
        attributes = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}, **(components or {})}
        # Under model offload a copy would keep a record of its own of the hooks that all copies share.
        if self.is_offloaded:
            offload = self.pipe.maybe_free_model_hooks
            attributes["maybe_free_model_hooks"] = (lambda: None) if self._keeps_loaded else offload
        pipe = shallow_copy(self.pipe, **attributes)
        if encode_prompt is not None and self.encodes_prompts:
            encode = functools.partial(encode_apart, shallow_copy(pipe))  # of `pipe` itself it would be a circle
            vars(pipe)["encode_prompt"] = functools.partial(encode_prompt, encode)
        call = inspect.unwrap(self.function) if with_graph else self.function
        with contextlib.nullcontext() if with_graph or self.latents_call is None else torch.no_grad():
            return call(pipe, latents=latents, **arguments)

    def progress_bar(self, total: int) -> tqdm:
        """Makes a progress bar like the pipeline's. A copy makes it, because a pipeline remembers its first bar."""
        return shallow_copy(self.pipe).progress_bar(total=total)

    @property
    def is_offloaded(self) -> bool:
        """Whether the pipeline's networks are on the device only while they work (model offload)."""
        return bool(vars(self.pipe).get("_all_hooks"))

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Keeps the network on its device between the block's calls under model offload, and then offloads it."""
        self._keeps_loaded = True
        try:
            yield
        finally:
            self._keeps_loaded = False
            if self.is_offloaded:
                self.pipe.maybe_free_model_hooks()

    def with_autoencoder(self, autoencoder: torch.nn.Module | None) -> Backbone:
        """Returns the backbone with another autoencoder; for None it returns itself."""
        if autoencoder is None:
            return self
        return type(self)(shallow_copy(self.pipe, **{self.autoencoder_name: autoencoder}))

    # Sizes and layouts

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.pipe.vae_scale_factor

    @property
    def patch_size(self) -> int:
        """Latents along one side of a patch that the network takes as one token; 1 without patches."""
        return self.config.get("patch_size") or 1

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which heights and widths of images must be multiples."""
        return math.lcm(self.pixel_multiple, self.factor * self.patch_size)

    @property
    def latent_channels(self) -> int:
        """Channels of unpacked latents. Raises `UnsupportedError` for a network that takes more than latents."""
        channels = self.config["in_channels"]
        check_latents_alone(self.name, channels, self.autoencoder)
        return channels

    @property
    def sample_size(self) -> int | Sequence[int]:
        """The network's own size, in latents: one number, or height and width."""
        return self.config["sample_size"]

    @property
    def image_channels(self) -> int:
        """Channels of images."""
        return 3

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Returns height and width in pixels, the network's own for None. Raises `InputError` unless they divide."""
        size = (height or self._default_side("height"), width or self._default_side("width"))
        if any(side <= 0 or side % self.size_multiple for side in size):
            raise InputError(f"`height` and `width` are {size}; allowed: positive multiples of {self.size_multiple}.")
        return size

    def _default_side(self, name: str) -> int:
        """Returns the call's default of "height" or "width"; where it has none, the network's own, in pixels."""
        default = self.parameters[name].default if name in self.parameters else None
        if isinstance(default, int):
            return default
        size = self.sample_size
        return self.factor * (size if isinstance(size, int) else size[name == "width"])

    def size_arguments(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """Returns the call's arguments for images of height and width `pixels`, which are taken as they are."""
        sizes = {"height": pixels[0], "width": pixels[1], "use_resolution_binning": False}
        return {name: value for name, value in sizes.items() if name in self.parameters}

    def size_arguments_of(self, latents: torch.Tensor) -> dict[str, Any]:
        """Returns the call's arguments for the size of latents (B, C, h, w); none for packed latents."""
        rows, columns = latents.shape[-2:]
        return self.size_arguments((rows * self.factor, columns * self.factor)) if latents.ndim == 4 else {}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Brings latents (B, C, h, w) into the layout of the pipeline's own `latents`."""
        return latents

    def unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        """Brings latents in the pipeline's layout back to (B, C, h, w), for images of height and width `pixels`."""
        return latents

    def pack_statistic(self, value: Moment, samples: torch.Tensor) -> Moment:
        """Brings a statistic of one sample (C, h, w), or a number, into the pipeline's layout."""
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or self.pack(samples).shape == samples.shape:
            return value
        return self.pack(value.expand(1, *samples.shape[1:]))[0]

    # Pixels and latents

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns mean and deviation (None where encoding is not random) of scaled latents, (B, C, h, w) float32 each.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
        """
        return encode_pixels(self._known_autoencoder, pixels, self.standardises_latents)

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes scaled latents (B, C, h, w) to pixels (B, 3, H, W), about -1 to 1."""
        return decode_latents(self._known_autoencoder, latents, self.standardises_latents)

    def decode(self, latents: torch.Tensor, pixels: tuple[int, int] | None = None) -> torch.Tensor:
        """Decodes latents in the pipeline's layout to images (B, 3, H, W) float32 in [0, 1]; differentiable."""
        check_weights(self.autoencoder if latents.requires_grad and torch.is_grad_enabled() else None)
        return images_of(self.decode_scaled(self.unpack(latents, pixels)))

    def finish(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        """Finishes images (B, 3, H, W) in [0, 1] as the stock call does, and flags the unsafe ones."""
        return images, []

    def check_decoder(self) -> None:
        """Refuses a pipeline whose latents can't be decoded. Raises `UnsupportedError`."""
        if self.autoencoder is None:
            raise UnsupportedError(
                f"{self.name} has no autoencoder `{self.autoencoder_name}`; pass `decode`, latents to images in "
                "[0, 1]."
            )

    @property
    def _known_autoencoder(self) -> Any:
        """The autoencoder as diffusers' ModelMixin, whose `config` and `encode` torch's own type lacks."""
        self.check_decoder()
        return self.autoencoder

    # What a likelihood or a guided run begins with

    @torch.no_grad()
    def samples_of(
        self, images: ImageLike | None, latents: torch.Tensor | None = None,
        data_range: tuple[float, float] = UNIT_RANGE,
    ) -> torch.Tensor:  # fmt: skip
        """Returns scaled latents (B, C, h, w) float32 of images, or the latents that were passed instead, checked.

        The mean of the autoencoder's posterior stands for an image.

        Raises:
            InputError: both or neither of the two, or a kind, size or range that the pipeline does not take.
        """
        if (images is None) == (latents is None):
            raise InputError("Give either `images` or `latents`: exactly one of them.")
        channels, multiple = self.latent_channels, self.size_multiple // self.factor
        if latents is None:
            return self.posterior_of(images, data_range)[0]
        check_latents(latents, channels, multiple)
        return latents.to(self.device, torch.float32)

    @torch.no_grad()
    def posterior_of(self, images: ImageLike | None, data_range: tuple[float, float] = UNIT_RANGE) -> Posterior:
        """Returns mean and deviation (None where encoding is not random) of scaled latents of images, checked."""
        tensor = image_tensor(images, self.size_multiple, self.image_channels, data_range)
        return self.encode(pixels_of(tensor).to(self.device))

    def initial_noise(
        self, latents: torch.Tensor | None, count: int, pixels: tuple[int, int], generator: Generators
    ) -> torch.Tensor:
        """Returns initial noise float32 in the pipeline's layout: `latents`, or noise drawn as the stock call does."""
        check_generators(generator, count)
        shape: tuple[int, ...] = (count, self.latent_channels, *(side // self.factor for side in pixels))
        if latents is None:
            return self.draw_noise(shape, generator).float()
        shape = tuple(self.pack(torch.empty(shape, device="meta")).shape)
        check_floats("`latents`", latents)
        if latents.shape != shape or not torch.isfinite(latents).all():
            raise InputError(f"`latents` {form_of(latents)}; allowed: a tensor {shape}, finite, of unit variance.")
        return latents.detach().to(self.device, torch.float32)

    def draw_noise(self, shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Draws noise for latents of `shape` (B, C, h, w) in the stock call's order, in the pipeline's layout."""
        dtype = self.noise_dtype or self.dtype
        return self.pack(randn_tensor(shape, generator=generator, device=self.device, dtype=dtype))

    def prior(self, mean: Moment, variance: Moment, samples: torch.Tensor) -> tuple[Moment, Moment, str]:
        """Returns the data's moments in the pipeline's layout, and the variance's basis: see `checkpoint_moments`."""
        basis, is_packed = "pixel", self.pack(samples).shape != samples.shape
        if mean is None and variance is None:
            mean, variance, basis = checkpoint_moments(self.pipe, samples.shape[1:], is_packed)
        return self.pack_statistic(mean, samples), self.pack_statistic(variance, samples), basis

    # Conditions

    def conditions(
        self, prompt: Condition, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> Conditions:
        """Returns one condition per sample, and the call arguments that hold them; see `text_conditions`."""
        return text_conditions(self.name, self.parameters, prompt, call_arguments, count, num_images_per_prompt)

    def null_conditions(self, count: int) -> dict[str, Any]:
        """Returns the call arguments of guidance's unconditional branch: empty prompts, one per sample."""
        check_unconditional_branch(self.name, self.config)
        return {"prompt": [""] * count}

    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor | None:
        """Returns one vector per sample, (B, width), that stands for its condition in trace models.

        Args:
            conditions: the call's arguments, with one condition per sample as the method `conditions` returns them.
        """
        if self.pooled_index is not None:
            return self.encoded_conditions(conditions)[self.pooled_index]
        if self.token_indices is not None:
            return mean_of_tokens(self.encoded_conditions(conditions), *self.token_indices)
        raise UnsupportedError(
            f"{self.name} has no conditions, so no pooled vector for a trace model with `pooled_channels`. Use a "
            "trace model with pooled_channels=None."
        )

    def encoded_conditions(self, conditions: dict[str, Any]) -> tuple:
        """Returns the result of `encode_prompt` for the call arguments `conditions`, without negative prompts."""
        return encode_conditions(self.pipe, self.parameters, conditions)

    def unguided_scale(self, call_arguments: dict[str, Any]) -> float | None:
        """Removes scales of guidance from `call_arguments`, and returns the guidance scale at which the output is a
        score; None for the call's default of a scale that is an input of the network. Raises `InputError` for a scale
        that guides."""
        return pop_unguided(type(self.pipe), self.parameters, self.config, call_arguments)

    # Checks

    def check_scheduler(self) -> None:
        """Refuses schedulers of another kind than the network's, or whose scaling the stock call leaves out, by an
        `UnsupportedError` that says which to use."""
        check_scheduler_kind(self.name, self.scheduler, self.predicts_flow, self.scales_samples)

    def check_bins(self, bins: int | None) -> None:
        """Refuses `bins` for densities of latents. Raises `InputError`."""
        if bins is not None and self.space != "pixel":
            raise InputError(
                f"`bins` is {bins}, but {self.name} is in latents, whose density is not that of pixels in bins. Leave "
                "it out."
            )
