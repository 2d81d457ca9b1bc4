"""The table of backbones: tiny pipelines of the real classes, which every test of `test_backbones` runs over.

A new backbone is one line of `BACKBONES`, with what makes a tiny one in `tiny`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny
import tiny_families
import torch

import diffusers_fisher
from diffusers_fisher.backbones import backbone_of

PROMPTS = ["a b", "c"]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """How to make a pipeline, and what is particular to it.

    Args:
        make: `make(cls=...)`, a tiny pipeline of the stock class or of ours.
        stock: the stock class.
        network: "unet" or "transformer".
        condition: what stands first in `guide` and after the images in `log_likelihood`; None: unconditional.
        call: the same for the stock call, for (two) samples.
        options: what every call needs beside.
        guidance_scale: with classifier-free guidance; None: it knows none.
        guidance_name: name of the argument of the call by which it guides.
        unguided: value of this argument without guidance.
        guides: what else the call needs for guidance.
        shape: (C, h, w) of latents, at a size whose full Jacobians take no time.
        pixels: height and width that belong to it.
        flow: whether it is a flow model.
        multiple: what the height and width of images must divide by.
        takes_latents: whether the stock call takes `latents`.
        offload: whether diffusers offers model offload for the class.
    """

    make: Callable[..., Any]
    stock: type
    network: str = "transformer"
    condition: Any = dataclasses.field(default_factory=lambda: PROMPTS)
    call: dict[str, Any] = dataclasses.field(default_factory=lambda: {"prompt": PROMPTS})
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    guidance_scale: float | None = 4.0
    guidance_name: str = "guidance_scale"
    unguided: float = 1.0
    guides: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, int, int] = (4, 4, 4)
    pixels: tuple[int, int] = (8, 8)
    flow: bool = False
    multiple: int = 8
    takes_latents: bool = True
    offload: bool = True

    @property
    def name(self) -> str:
        return self.stock.__name__.removesuffix("Pipeline")

    @property
    def cls(self) -> Any:
        """The class of this package."""
        return getattr(diffusers_fisher, f"{self.name}FisherPipeline")

    def ours(self) -> Any:
        return self.make(cls=self.cls)

    def noise(self, count: int = 2, seed: int = 0) -> torch.Tensor:
        """Latents (count, C, h, w)."""
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Returns the latents in the layout of the stock call."""
        return backbone_of(pipe).pack(latents) if isinstance(pipe, diffusers_fisher.FisherPipelineMixin) else latents

    def size(self) -> dict[str, int]:
        return dict(zip(("height", "width"), self.pixels, strict=True)) if self.takes_latents else {}

    def guidance(self, guided: bool) -> dict[str, Any]:
        if self.guidance_scale is None:
            return {}
        return (
            {self.guidance_name: self.guidance_scale, **self.guides} if guided else {self.guidance_name: self.unguided}
        )

    def sample(self, pipe: Any, guided: bool = True, call: Any = None, steps: int = 3, **arguments: Any) -> Any:
        """Returns the pipeline's result, by default its final latents; `call` takes the place of its own call."""
        arguments = {
            "output_type": "latent", "num_inference_steps": steps, **self.size(), **self.call, **self.options,
            **self.guidance(guided), **arguments,
        }  # fmt: skip
        # Z-Image writes its template into the list of prompts.
        arguments = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
        return (call or type(pipe).__call__)(pipe, return_dict=False, **arguments)[0]

    def guide(self, pipe: Any, reward: Any, guided: bool = True, **options: Any) -> Any:
        first = [] if self.condition is None else [self.condition]
        options = {**self.size(), **self.options, **self.guidance(guided), **options}
        options |= {"batch_size": 2} if self.condition is None else {}
        options = {key: value for key, value in options.items() if key != "use_resolution_binning"}
        height, width = self.pixels
        return pipe.guide(*first, reward, **{"height": height, "width": width, **options})

    def score(self, pipe: Any, count: int = 2, images: Any = None, **options: Any) -> Any:
        """Returns the likelihood of `images` or of `latents` under the first `count` conditions."""
        first = [] if self.condition is None else [self.condition[:count]]
        options = {
            "num_inference_steps": 3, "step_halving": False, "generator": torch.Generator().manual_seed(0),
            **self.options, **options,
        }  # fmt: skip
        return pipe.log_likelihood(images, *first, **options)


SHORT = {"max_sequence_length": 8}  # the limit of the tiny tokenizers
UNBINNED = {"use_resolution_binning": False, "clean_caption": False}
UNCONDITIONAL = {
    "network": "unet", "condition": None, "call": {"batch_size": 2}, "guidance_scale": None, "takes_latents": False
}  # fmt: skip
PIXELS = {**UNCONDITIONAL, "shape": (3, 4, 4), "pixels": (4, 4), "multiple": 2}
LABELS = {"condition": [1, 5], "call": {"class_labels": [1, 5]}, "takes_latents": False}


def _with_texts(make: Callable, **settings: Any) -> Callable:
    return lambda cls: make(cls, texts=True, **settings)


_LINES = [
    Backbone(tiny.stable_diffusion, diffusers.StableDiffusionPipeline, "unet"),
    Backbone(tiny.stable_diffusion_xl, diffusers.StableDiffusionXLPipeline, "unet"),
    Backbone(
        _with_texts(tiny.stable_diffusion_3), diffusers.StableDiffusion3Pipeline, options=SHORT, flow=True, multiple=2
    ),
    Backbone(
        _with_texts(tiny.flux, guidance_embeds=True), diffusers.FluxPipeline, options=SHORT, guidance_scale=3.5,
        flow=True, multiple=4,
    ),
    Backbone(lambda cls: tiny.pixart(cls, 128), diffusers.PixArtAlphaPipeline, options=SHORT | UNBINNED),
    Backbone(tiny.pixart, diffusers.PixArtSigmaPipeline, options=SHORT | UNBINNED),
    Backbone(tiny.dit, diffusers.DiTPipeline, multiple=4, **LABELS),
    Backbone(tiny.unconditional, diffusers.DDPMPipeline, **PIXELS),
    Backbone(tiny.unconditional, diffusers.DDIMPipeline, **PIXELS),
    Backbone(
        tiny.latent_unconditional, diffusers.LDMPipeline, shape=(3, 4, 4), multiple=4, offload=False, **UNCONDITIONAL
    ),
]  # fmt: skip
BACKBONES = {line.name: line for line in _LINES}


class GridBackbone(Backbone):
    """Flux 2: the call takes the packed latents' grid, and klein's returns latents of the autoencoder."""

    def sample(self, pipe: Any, *args: Any, latents: torch.Tensor | None = None, **arguments: Any) -> Any:
        """Takes packed latents, and for the output type "latent" returns those of the last step."""
        if latents is not None:
            arguments["latents"] = latents.mT.unflatten(2, tuple(side // self.multiple for side in self.pixels))
        samples, step = [], pipe.scheduler.step

        def record(*args: Any, **kwargs: Any) -> Any:
            samples.append(step(*args, **kwargs)[0])
            return (samples[-1],)

        pipe.scheduler.step = record
        try:
            result = super().sample(pipe, *args, **arguments)
        finally:
            del pipe.scheduler.step
        return samples[-1] if arguments.get("output_type", "latent") == "latent" else result


class EmbeddedBackbone(Backbone):
    """Kandinsky 2.2: image embeddings, which are among the options, stand for prompts."""

    def guide(self, pipe: Any, reward: Any, guided: bool = True, **options: Any) -> Any:
        return pipe.guide(None, reward, **{**self.size(), **self.options, **self.guidance(guided), **options})

    def score(self, pipe: Any, count: int = 2, images: Any = None, **options: Any) -> Any:
        embeddings = {name: value[:count] for name, value in self.options.items()}
        return super().score(pipe, count, images, **{**embeddings, **options})


class AreaBackbone(Backbone):
    """HiDream, whose pipeline scales sizes to an area that no folder keeps."""

    def sample(self, pipe: Any, *args: Any, **arguments: Any) -> Any:
        pipe.default_sample_size = 4
        return super().sample(pipe, *args, **arguments)

    def score(self, pipe: Any, *args: Any, **options: Any) -> Any:
        pipe.default_sample_size = 4
        return super().score(pipe, *args, **options)


NEGATIVE = {"negative_prompt": ["", ""]}
LAYERS = {"text_encoder_out_layers": (0, 1, 2)}
FLOW = {"flow": True, "multiple": 4, "shape": (4, 4, 2), "pixels": (8, 4)}
PATCHES = {"shape": (4, 2, 2), "pixels": (16, 16), "multiple": 16}
_FAMILY_LINES = [
    Backbone(tiny_families.z_image, diffusers.ZImagePipeline, options=SHORT, unguided=0.0, **FLOW),
    Backbone(
        tiny_families.qwen_image, diffusers.QwenImagePipeline, guidance_name="true_cfg_scale", guides=NEGATIVE, **FLOW
    ),
    GridBackbone(tiny_families.flux2_klein, diffusers.Flux2KleinPipeline, options=SHORT | LAYERS, **FLOW),
    GridBackbone(tiny_families.flux2, diffusers.Flux2Pipeline, options=SHORT | LAYERS, unguided=4.0, **FLOW),
    Backbone(
        tiny_families.sana, diffusers.SanaPipeline, flow=True, pixels=(32, 32), multiple=32,
        options=SHORT | {"clean_caption": False, "complex_human_instruction": None, "use_resolution_binning": False},
    ),
    Backbone(tiny_families.chroma, diffusers.ChromaPipeline, options=SHORT, **FLOW),
    Backbone(
        tiny_families.lumina2, diffusers.Lumina2Pipeline, options={"max_sequence_length": 24, "system_prompt": ""},
        flow=True, **PATCHES,
    ),
    Backbone(tiny.aura_flow, diffusers.AuraFlowPipeline, options=SHORT, **FLOW),
    Backbone(
        tiny_families.cogview4, diffusers.CogView4Pipeline, options=SHORT, flow=True, multiple=16, shape=(4, 4, 2),
        pixels=(32, 16),
    ),
    Backbone(
        tiny_families.hunyuan_dit, diffusers.HunyuanDiTPipeline, options={"use_resolution_binning": False}, **PATCHES
    ),
    AreaBackbone(tiny_families.hidream, diffusers.HiDreamImagePipeline, options=SHORT, flow=True, multiple=4),
]  # fmt: skip
_FAMILY_LINES.append(
    EmbeddedBackbone(
        tiny_families.kandinsky_2_2, diffusers.KandinskyV22Pipeline, "unet", condition=None, call={},
        options=tiny_families.image_embeds(), shape=(4, 4, 4), pixels=(8, 8), multiple=4,
    )
)  # fmt: skip
FAMILIES = {line.name: line for line in _FAMILY_LINES}
"""Backbones over which a quick test and the slow ones run."""

EVERY = [*BACKBONES, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
"""Names of all backbones, for tests of `BACKBONES | FAMILIES`."""


def _variation(name: str, make: Callable, **changes: Any) -> Backbone:
    return dataclasses.replace(BACKBONES[name], make=make, **changes)


VARIATIONS = {
    "Stable Diffusion 2": _variation(
        "StableDiffusion",
        lambda cls: tiny.stable_diffusion(cls, scheduler=tiny.scheduler(prediction_type="v_prediction")),
    ),
    "Stable Diffusion 3.5": _variation(
        "StableDiffusion3",
        _with_texts(tiny.stable_diffusion_3, num_layers=2, qk_norm="rms_norm", dual_attention_layers=(0,)),
    ),
    "Flux-schnell": _variation("Flux", _with_texts(tiny.flux), guidance_scale=None),
}
"""Checkpoints of the same classes with other networks."""


class GaussianFlow(torch.nn.Module):
    """The exact velocity for data N(mean, variance I), in place of a flow network."""

    def __init__(self, network, per_time, mean=0.3, variance=0.5):
        super().__init__()
        self.config, self.dtype, self.device = network.config, torch.float32, torch.device("cpu")
        self.per_time = per_time
        self.mean, self.variance = mean, variance

    def cache_context(self, name):
        return contextlib.nullcontext()

    def forward(self, hidden_states, timestep, **conditions):
        s = (timestep * self.per_time).view(-1, *[1] * (hidden_states.ndim - 1))
        alpha, total = 1 - s, (1 - s) ** 2 * self.variance + s**2
        original = self.mean + alpha * self.variance / total * (hidden_states - alpha * self.mean)
        return ((s * (hidden_states - alpha * self.mean) / total) - original,)
