"""Where a pipeline's samples live: sizes, autoencoder, initial noise. A backbone overrides what differs in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..autoencoder import decoded, images_of
from ..errors import InputError, UnsupportedError
from ..images import UNIT_RANGE, image_tensor
from ..noise import noise_schedule

if TYPE_CHECKING:
    from typing import Any as _Stock  # a stock pipeline class, which the mixins stand before
else:
    _Stock = object


class LatentSpace(_Stock):
    """Latents (B, C, h, w) of a Kullback-Leibler autoencoder, scaled and shifted by its config."""

    _space = "latent"
    _predicts_flow = False  # the network was trained on (1 - s) x_0 + s eps
    _scales_input = True  # the stock call multiplies noise and model input by the scheduler's factors

    @property
    def _network(self) -> Any:
        return self.unet if hasattr(self, "unet") else self.transformer

    @property
    def _factor(self) -> int:
        """Pixels a side to one latent."""
        return self.vae_scale_factor

    def _size_multiple(self) -> int:
        """What the pipeline's own check and its autoencoder ask of heights and widths."""
        return math.lcm(8, self._factor)

    def _latent_channels(self) -> int:
        return self._network.config.in_channels

    def _sample_size(self) -> int | tuple[int, int]:
        """The network's own size in latents."""
        return self._network.config.sample_size

    def _noise_dtype(self) -> torch.dtype:
        return self._network.dtype

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) in the layout of the pipeline's own `latents`."""
        return latents

    def _unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        """The inverse of `_pack` for images of height and width `pixels`."""
        return latents

    def _decode(self, latents: torch.Tensor, pixels: tuple[int, int] | None = None) -> torch.Tensor:
        """Latents in the pipeline's layout to images (B, 3, H, W) in [0, 1], float32, differentiable."""
        return images_of(self._decoded(self._unpack(latents, pixels)))

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder makes of scaled latents (B, C, h, w), about -1 to 1."""
        return decoded(self.vae, latents)

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation of scaled latents, (B, C, h, w) float32 each, of images (B, 3, H, W) in [-1, 1];
        no deviation where encoding is not random."""
        vae = self.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return (posterior.mode().float() - shift) * scale, posterior.std.float() * scale

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1]: the mean of their posterior."""
        return self._posterior(pixels)[0]

    @torch.no_grad()
    def _latents_to_score(
        self, images: Any, latents: torch.Tensor | None, data_range: tuple[float, float] = UNIT_RANGE
    ) -> torch.Tensor:
        """Scaled latents (B, C, h, w) float32 of what `log_likelihood` was given, checked."""
        if (images is None) == (latents is None):
            raise InputError("Give either `images` or `latents`: exactly one of them.")
        if latents is None:
            tensor = image_tensor(images, self._size_multiple(), self._image_channels(), data_range)
            return self._encoded((2 * tensor - 1).to(self._execution_device))
        channels, multiple = self._latent_channels(), self._size_multiple() // self._factor
        shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else ()
        if len(shape) != 4 or shape[1] != channels or any(side % multiple for side in shape[2:]):
            got = f"have shape {shape}" if isinstance(latents, torch.Tensor) else f"are a {type(latents).__name__}"
            raise InputError(
                f"Latents {got}; allowed: a tensor (B, {channels}, h, w), h and w multiples of {multiple}."
            )
        return latents.to(self._execution_device, torch.float32)

    def _checked_bins(self, bins: int | None) -> int | None:
        if bins is not None and self._space != "pixel":
            raise InputError(
                f"`bins` is {bins}, but {type(self).__name__} is in latents, whose density is not that of pixels in "
                "bins. Leave it out."
            )
        return bins

    def _image_channels(self) -> int:
        return 3

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self._sample_size()
        sides = (default, default) if isinstance(default, int) else tuple(default)
        factor, multiple = self._factor, self._size_multiple()
        size = (height or sides[0] * factor, width or sides[1] * factor)
        if any(side <= 0 or side % multiple for side in size):
            raise InputError(f"`height` and `width` are {size}; allowed: positive multiples of {multiple}.")
        return size

    def _initial_noise(
        self, latents: torch.Tensor | None, count: int, pixels: tuple[int, int], generator: Any
    ) -> torch.Tensor:
        """Initial noise float32 in the pipeline's layout, drawn as the stock call draws it."""
        from diffusers.utils.torch_utils import randn_tensor

        shape: tuple[int, ...] = (count, self._latent_channels(), *(side // self._factor for side in pixels))
        device = self._execution_device
        if latents is None:
            if isinstance(generator, list) and len(generator) != count:
                raise InputError(f"{len(generator)} generators were given for {count} images; give one, or as many.")
            drawn = randn_tensor(shape, generator=generator, device=device, dtype=self._noise_dtype())
            return self._pack(drawn).float()
        shape = tuple(self._pack(torch.empty(shape, device="meta")).shape)
        if not isinstance(latents, torch.Tensor) or latents.shape != shape or not torch.isfinite(latents).all():
            got = (
                f"have shape {tuple(latents.shape)}"
                if isinstance(latents, torch.Tensor)
                else f"are a {type(latents).__name__}"
            )
            raise InputError(f"`latents` {got}; allowed: a tensor {shape}, finite, of unit variance.")
        return latents.detach().to(device, torch.float32)

    def _finished(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        """What the stock call does to images (B, 3, H, W) in [0, 1] at its end, and which were flagged as unsafe."""
        return images, []

    def _check_scheduler(self) -> None:
        """Refuses schedulers of another family than the network's, or whose scaling the stock call leaves out."""
        schedule = noise_schedule(self.scheduler)
        name = f"{type(self).__name__} was given {type(self.scheduler).__name__}"
        if schedule.is_flow != self._predicts_flow:
            kinds = ("flow matching", "variance-preserving noise")
            mine, other = kinds if self._predicts_flow else kinds[::-1]
            instead = "FlowMatchEulerDiscreteScheduler" if self._predicts_flow else "DDIMScheduler"
            raise UnsupportedError(
                f"{name}, a scheduler of {other}, but its network was trained with {mine}. Use {instead} or another "
                "of that family, with the checkpoint's own scheduler config."
            )
        if not self._scales_input and schedule.scales_samples:
            raise UnsupportedError(
                f"{name}, whose noise and model input must be scaled, which the stock call does not do. Use "
                "DDIMScheduler, DDPMScheduler or another whose init_noise_sigma is 1."
            )


class PixelSpace(LatentSpace):
    """Samples are the images themselves, (B, C, H, W) in [-1, 1]."""

    _space = "pixel"
    _scales_input = False

    @property
    def _factor(self) -> int:
        return 1

    def _size_multiple(self) -> int:
        """The network halves its input between its blocks."""
        return 2 ** (len(self._network.config.block_out_channels) - 1)

    def _image_channels(self) -> int:
        return self._network.config.in_channels

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pixels, None
