"""Flux 2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError
from .base import Generators
from .packed import PackedBackbone, known_pixels
from .stock_calls import SchedulerWithMemory


class Flux2Backbone(PackedBackbone):
    """Knows Flux 2: flow matching, on latents packed to (B, h/2 * w/2, 4 * C) as its scheduler sees them.

    The call takes the packed latents' grid, (B, 4 * C, h/2, w/2), and klein's returns latents of the autoencoder.
    Channels of the grid are standardised by the autoencoder's batch normalisation. The guidance scale of dev is an
    input of the network; klein is guided, or distilled.
    """

    token_indices = (0, None)

    def call(self, scheduler: object, latents: torch.Tensor | None, *args: Any, **arguments: Any) -> Any:
        if latents is None:
            return super().call(scheduler, latents, *args, **arguments)
        rows, columns = self._grid_size(self.image_size(arguments.get("height"), arguments.get("width")))
        if latents.shape[1] != rows * columns:
            raise InputError(
                f"Packed latents have {latents.shape[1]} tokens; allowed: {rows} x {columns}, by `height` and `width` "
                "of the call. Pass the size that belongs to the latents."
            )
        memory = SchedulerWithMemory(scheduler, len(latents))
        super().call(memory, latents.mT.unflatten(2, (rows, columns)), *args, **arguments)
        return (memory.last,)

    def _grid_size(self, pixels: tuple[int, int]) -> tuple[int, int]:
        return pixels[0] // self.size_multiple, pixels[1] // self.size_multiple

    def draw_noise(self, shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        grid = self.pipe._patchify_latents(torch.empty(shape, device="meta")).shape
        return self.pipe._pack_latents(randn_tensor(grid, generator=generator, device=self.device, dtype=self.dtype))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe._pack_latents(self.pipe._patchify_latents(latents))

    def unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        grid = latents.mT.unflatten(2, self._grid_size(known_pixels(pixels)))
        return self.pipe._unpatchify_latents(grid)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self._known_autoencoder
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, deviation = (self.pipe._patchify_latents(each.float()) for each in (posterior.mode(), posterior.std))
        shift, scale = self._moments(mean)
        return self.pipe._unpatchify_latents((mean - shift) / scale), self.pipe._unpatchify_latents(deviation / scale)

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        grid = self.pipe._patchify_latents(latents)
        shift, scale = self._moments(grid)
        vae = self._known_autoencoder
        return vae.decode(self.pipe._unpatchify_latents(grid * scale + shift).to(vae.dtype)).sample

    def _moments(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and deviation of the grid's channels, (1, 4 * C, 1, 1)."""
        vae = self._known_autoencoder
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean.to(like), torch.sqrt(variance + vae.config.batch_norm_eps).to(like)
