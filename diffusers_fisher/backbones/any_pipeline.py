"""Backbone of pipelines of a family that the library does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..arguments import check_generators
from ..errors import FisherError, InputError, UnsupportedError, check_floats
from ..images import UNIT_RANGE, ImageLike
from ..noise import noise_schedule
from .autoencoder import images_of
from .base import Backbone, Generators, Posterior
from .conditions import Condition, Conditions, number_of_conditions, text_conditions
from .first_call import random_state
from .inputs import form_of
from .networks import missing_component
from .recorded_call import Encode, RecordedCall, drawn_noise
from .stock_calls import shallow_copy

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

SIZES = ("height", "width", "num_frames")
"""Arguments of calls that decide the shape of their latents."""

SAME_IMAGE = 1e-2
"""Largest difference of two decodings of the same latents by rounding, also in half precision."""


FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What stock calls raise where components or sizes do not suit them."""


class AnyPipelineBackbone(Backbone):
    """Knows a pipeline by what its own call says.

    Latents have the layout of the call's own `latents`, (B, C, h, w), (B, C, F, h, w) for videos, packed (B, N, C) or
    another, and the scaling of those that its run ends with. How images become latents is not known.

    Args:
        pipe: the pipeline.
        recorded: a call of the pipeline, by which it draws noise and decodes latents (`with_call`); None: latents are
            decoded by the autoencoder alone.
    """

    def __init__(self, pipe: DiffusionPipeline, recorded: RecordedCall | None = None):
        super().__init__(pipe)
        self._recorded = recorded
        self._image_shape: torch.Size | None = None
        self._decodes_to_pixels = False  # whether the call's tensors are pixels in [-1, 1]

    def with_call(self, arguments: Mapping[str, Any]) -> AnyPipelineBackbone:
        """Returns the backbone of one call of the pipeline: it can draw noise as the call does, and decode latents.

        Cost: one evaluation of the network and three decodings.

        Raises:
            InputError: arguments that the call refuses.
            UnsupportedError: a call that does not make images, or whose noise or decoding is not known.
        """
        try:
            bound = AnyPipelineBackbone(self.pipe, RecordedCall.of(self, arguments))
            bound._learn_images()
        except FAILURES as error:
            if isinstance(error, FisherError):
                raise
            if isinstance(error, AttributeError) and error.obj is None:
                raise missing_component(self.pipe, error) from error
            raise UnsupportedError(
                f"A call of {self.name} of one step fails between its noise and its images: {type(error).__name__}: "
                f"{error}. Call the pipeline itself, until it makes images."
            ) from error
        return bound

    def _learn_images(self) -> None:
        """Learns shape and scale of the images of the recorded call."""
        recorded = self._call_of("decoded")
        noise = recorded.noise.detach()
        images, arrays = recorded.decode(self, noise), recorded.decode(self, noise, "np")
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            form = tuple(images.shape) if isinstance(images, torch.Tensor) else f"a {type(images).__name__}"
            raise UnsupportedError(
                f"The call of {self.name} returns {form}, and not images (B, 3, H, W), such as a reward takes. "
                "Differentiate its runs by `pipe.scheduler.differentiable(...)`, with a loss of your own."
            )
        # Arrays are in [0, 1] everywhere, tensors of some pipelines (Kandinsky 2.2) are not.
        reference = torch.as_tensor(arrays).movedim(-1, 1).float()
        scaled = {False: images.float().cpu(), True: images_of(images).cpu()}
        fitting = [
            key for key, value in scaled.items() if float((value - reference).nan_to_num().abs().max()) < SAME_IMAGE
        ]
        if not fitting:
            raise UnsupportedError(
                f"The call of {self.name} returns other images as tensors than as arrays, so their scale is not "
                "known. Give it a backbone with register_backbone."
            )
        self._decodes_to_pixels, self._image_shape = fitting[0], images.shape
        if torch.is_grad_enabled():
            self.decode(noise.float().requires_grad_())

    def _call_of(self, what: str) -> RecordedCall:
        if self._recorded is None:
            self._refuse(f"how its latents are {what}")
        return self._recorded

    def _refuse(self, unknown: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.name} has no backbone of its own, so {unknown} is not known. Pass `latents` to log_likelihood "
            "and its relatives, or give the class a backbone with register_backbone."
        )

    @property
    def network(self) -> torch.nn.Module | None:
        components = self.pipe.components
        return next((components[name] for name in ("unet", "transformer") if components.get(name) is not None), None)

    @property
    def config(self) -> Mapping[str, Any]:
        return {} if self.network is None else super().config

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.dtype if self.network is None else self._known_network.dtype

    @property
    def noise_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """That of the recorded call's noise; None, the network's dtype, without one."""
        return None if self._recorded is None else self._recorded.noise.dtype

    @property
    def predicts_flow(self) -> bool:  # type: ignore[override]
        """Whether the pipeline's scheduler is one of flow matching: what the network was trained on is not known."""
        return noise_schedule(self.scheduler).is_flow

    @property
    def standardises_latents(self) -> bool:  # type: ignore[override]
        """Whether the pipeline is one of Stable Diffusion XL's, which all standardise their latents."""
        return self.name.startswith("StableDiffusionXL")

    # Sizes and layouts

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 0 where the pipeline does not say."""
        return int(vars(self.pipe).get("vae_scale_factor") or 0)

    @property
    def latent_channels(self) -> int:
        self._refuse("how images become its latents")

    @property
    def image_channels(self) -> int:
        return 3 if self._image_shape is None else self._image_shape[1]

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Returns height and width of the images of the recorded call, whose arguments have decided them."""
        if self._image_shape is None:
            self._refuse("which size its images have")
        return self._image_shape[-2], self._image_shape[-1]

    def size_arguments(self, pixels: tuple[int, int]) -> dict[str, Any]:
        if self._recorded is None:
            return super().size_arguments(pixels)
        return {name: self._recorded.arguments[name] for name in SIZES if name in self._recorded.arguments}

    def size_arguments_of(self, latents: torch.Tensor) -> dict[str, Any]:
        return super().size_arguments_of(latents) if self.factor else {}

    def check_layout(self, samples: torch.Tensor, encode_prompt: Encode | None, arguments: dict[str, Any]) -> None:
        """Refuses latents of another shape than those that the call would draw for these arguments.

        Networks may place their tokens by the sizes that the call was told, so these must be those of the latents.
        Random generators are left as they were.

        Raises:
            InputError: latents of another shape.
            UnsupportedError: the shape of the call's own latents is not known.
        """
        restore_random = random_state(arguments, self.device)
        try:
            shape = tuple(drawn_noise(self, encode_prompt, arguments).shape)
        finally:
            restore_random()
        if tuple(samples.shape) != shape:
            names = [name for name in SIZES if name in self.parameters]
            sizes = ", ".join(f"{name} {arguments.get(name, self.parameters[name].default)}" for name in names)
            raise InputError(
                f"The latents have shape {tuple(samples.shape)}, but the call of {self.name} draws {shape} for its "
                f"arguments ({sizes or 'it takes no size'}). Pass latents of that shape, or the arguments of these "
                "latents."
            )

    # Pixels and latents

    def encode(self, pixels: torch.Tensor) -> Posterior:
        self._refuse("how images become its latents")

    def decode(self, latents: torch.Tensor, pixels: tuple[int, int] | None = None) -> torch.Tensor:
        """Decodes latents to images (B, 3, H, W) float32 in [0, 1] as the recorded call does; differentiable.

        Without a recorded call it takes latents (B, C, h, w), which the autoencoder decodes.

        Raises:
            UnsupportedError: the call's own decoding has no graph.
        """
        if self._recorded is None:
            return super().decode(latents, pixels)
        images = self._recorded.decode(self, latents)
        if latents.requires_grad and torch.is_grad_enabled() and not images.requires_grad:
            raise UnsupportedError(
                f"The call of {self.name} cuts the gradient between its last latents and its images. Differentiate "
                "its runs by a loss of `trajectory.final_sample`."
            )
        return images_of(images) if self._decodes_to_pixels else images.float()

    def with_autoencoder(self, autoencoder: torch.nn.Module | None) -> Backbone:
        if autoencoder is None:
            return self
        other = AnyPipelineBackbone(shallow_copy(self.pipe, **{self.autoencoder_name: autoencoder}), self._recorded)
        other._image_shape, other._decodes_to_pixels = self._image_shape, self._decodes_to_pixels
        return other

    # What a likelihood or a guided run begins with

    def samples_of(
        self, images: ImageLike | None, latents: torch.Tensor | None = None,
        data_range: tuple[float, float] = UNIT_RANGE,
    ) -> torch.Tensor:  # fmt: skip
        """Returns latents in the layout of the pipeline's own, float32. Images are refused."""
        if (images is None) == (latents is None):
            raise InputError("Give either `images` or `latents`: exactly one of them.")
        if latents is None:
            self._refuse("how images become its latents")
        if not isinstance(latents, torch.Tensor) or latents.ndim < 3:
            raise InputError(f"Latents {form_of(latents)}; allowed: a tensor in the layout of the call's `latents`.")
        check_floats("`latents`", latents)
        return latents.to(self.device, torch.float32)

    def posterior_of(self, images: ImageLike | None, data_range: tuple[float, float] = UNIT_RANGE) -> Posterior:
        self._refuse("how images become its latents")

    def initial_noise(
        self, latents: torch.Tensor | None, count: int, pixels: tuple[int, int], generator: Generators
    ) -> torch.Tensor:
        recorded = self._call_of("drawn")
        check_generators(generator, count)
        if latents is None:
            return recorded.drawn_noise(self, generator).to(self.device, torch.float32)
        shape = tuple(recorded.noise.shape)
        check_floats("`latents`", latents)
        if tuple(latents.shape) != shape or not torch.isfinite(latents).all():
            raise InputError(f"`latents` {form_of(latents)}; allowed: a tensor {shape}, finite, of unit variance.")
        return latents.detach().to(self.device, torch.float32)

    # Conditions

    def conditions(
        self, prompt: Condition, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> Conditions:
        """Returns one prompt per sample, and the call arguments that hold them.

        Embeddings stay as they are in `call_arguments`, and the call itself says which belong together.
        """
        number = number_of_conditions(call_arguments)
        if prompt is not None or (number is None and count is not None and self.takes_text):
            return text_conditions(self.name, self.parameters, prompt, call_arguments, count, num_images_per_prompt)
        if number is None and count is None:
            raise InputError(f"{self.name} was given neither `prompt` nor embeddings; pass one of them.")
        if num_images_per_prompt != 1:
            raise InputError(
                f"`num_images_per_prompt` is {num_images_per_prompt}; allowed: 1 with embeddings of {self.name}. Pass "
                "embeddings of every sample."
            )
        return [""] * (count or number or 1), {}

    def null_conditions(self, count: int) -> dict[str, Any]:
        self._refuse("what its unconditional branch is")

    def pooled(self, conditions: dict[str, Any]) -> None:
        """Returns None: how this family pools its conditions is not known."""
        return None

    def check_scheduler(self) -> None:
        """Checks nothing: what the network was trained with is not known."""


def bind_call(backbone: Backbone, arguments: Mapping[str, Any]) -> Backbone:
    """Returns the backbone of one call of a pipeline without a class (`AnyPipelineBackbone.with_call`), or itself."""
    return backbone.with_call(arguments) if isinstance(backbone, AnyPipelineBackbone) else backbone
