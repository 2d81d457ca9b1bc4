"""Text-to-image pipelines with likelihood and guidance; their calls are the stock ones.

What is particular to each family is its backbone's business (`diffusers_fisher/backbones/`).
"""

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .mixin import FisherPipelineMixin


class StableDiffusionFisherPipeline(FisherPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Made with `from_pretrained` from any Stable Diffusion 1.x or 2.x checkpoint, or from a pipeline at hand with
    `fisher_pipeline(pipe)`. `StableDiffusionFisherPipeline(**pipe.components)` has no trace model and no latent
    statistics, because they are no components; they may be set.
    """


class StableDiffusionXLFisherPipeline(FisherPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    The sizes that the network is told (`original_size`, `target_size`) are those of the image unless given.
    """


class StableDiffusion3FisherPipeline(FisherPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Flow matching: the likelihood's grid ends at 0.999 of the noise, where the standard prior holds.
    """


class FluxFisherPipeline(FisherPipelineMixin, FluxPipeline):
    """`FluxPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed, (B, h/2 * w/2, 4 * C), in `guide` and in outputs; `log_likelihood` takes (B, C, h, w). The
    guidance scale of Flux-dev is an input of the network, so a likelihood is that of one scale: the stock call's
    default unless `guidance_scale` is given.
    """


class PixArtAlphaFisherPipeline(FisherPipelineMixin, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """


class PixArtSigmaFisherPipeline(FisherPipelineMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """


for _class in (
    StableDiffusionFisherPipeline, StableDiffusionXLFisherPipeline, StableDiffusion3FisherPipeline, FluxFisherPipeline,
    PixArtAlphaFisherPipeline, PixArtSigmaFisherPipeline,
):  # fmt: skip
    _class.__module__ = "diffusers_fisher"  # the public module is what a saved component names
