"""Checks of a pipeline's networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

NETWORKS = (
    "unet", "transformer", "transformer_2", "prior", "decoder", "unconditional_unet", "unconditional_transformer",
)  # fmt: skip
"""Names that pipelines of diffusers give to their denoising networks."""


def denoising_networks(components: Mapping[str, object]) -> dict[str, torch.nn.Module]:
    """Returns the denoising networks of a pipeline's components by name; some have one per range of levels."""
    return {name: part for name in NETWORKS if isinstance(part := components.get(name), torch.nn.Module)}


def check_weights(network: object) -> None:
    """Refuses to differentiate a network whose weights autograd does not accept. Raises `UnsupportedError`."""
    if not isinstance(network, torch.nn.Module):
        return
    stored = {each.dtype for each in network.parameters() if each.is_floating_point() and each.element_size() < 2}
    if stored:
        raise UnsupportedError(
            f"The weights of {type(network).__name__} are stored in {stored.pop()} (layerwise casting), to which they "
            "return before a backward pass could use them. Load the network in bfloat16 or wider, or use an estimator "
            "without a backward pass, such as FiniteDifferenceFisher() or AutodiffFisher(forward_mode=True)."
        )
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise UnsupportedError(
            f"The weights of {type(network).__name__} were made under torch.inference_mode, so nothing can be "
            "differentiated through them. Load the pipeline outside of it; under torch.no_grad it may be loaded."
        )


def cache_hooks(network: torch.nn.Module) -> list[ModelHook]:
    """Returns the hooks by which diffusers' caches keep results of one evaluation of a network for the next ones."""
    return [hook for registry in _registries(network) for hook in registry.hooks.values() if hook._is_stateful]


def _registries(network: torch.nn.Module) -> list[HookRegistry]:
    return [vars(module)["_diffusers_hook"] for module in network.modules() if "_diffusers_hook" in vars(module)]


def reset_caches(pipe: DiffusionPipeline) -> None:
    """Empties the caches of a pipeline before a call, whose first evaluation is then that of the network itself.

    A call that was interrupted, or that leaves the networks loaded, does not empty them.

    Raises:
        UnsupportedError: a cache reads the timestep from the user's pipeline, of which only copies are called.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        for hook in cache_hooks(network):
            if "current_timestep_callback" in vars(hook):
                raise UnsupportedError(
                    f"The {type(network).__name__} of {type(pipe).__name__} has a cache ({type(hook).__name__}) that "
                    "reads the timestep from the pipeline object, but shallow copies of the pipeline are called. Turn "
                    "it off with the network's `disable_cache()`, or use another cache."
                )
        for registry in _registries(network):
            registry.reset_stateful_hooks(recurse=False)


def check_no_cache(pipeline: str, network: torch.nn.Module | None, purpose: str) -> None:
    """Refuses a network with a cache for `purpose`, in which the denoiser must be the run's own function.

    Raises:
        UnsupportedError: says how to turn the cache off.
    """
    hooks = [] if network is None else cache_hooks(network)
    if hooks:
        raise UnsupportedError(
            f"The {type(network).__name__} of {pipeline} has a cache ({type(hooks[0]).__name__}), with which "
            f"{purpose}. Turn it off with the network's `disable_cache()`, or use an estimator that needs no "
            "denoiser, such as DirectFisher()."
        )


def missing_component(pipe: DiffusionPipeline, error: Exception) -> UnsupportedError:
    """Makes the error for a call that needs a component which the pipeline has not, such as one of two networks."""
    names = [name for name, part in pipe.components.items() if part is None]
    return UnsupportedError(
        f"The call of {type(pipe).__name__} uses something that is None ({error}), and its components "
        f"{', '.join(names) or '(none)'} are None. Load the pipeline with the component that its call needs."
    )


def check_latents_alone(pipeline: str, channels: int, autoencoder: Any) -> None:
    """Refuses a network that takes more channels than latents have. Raises `UnsupportedError`.

    Args:
        channels: channels of the network's input.
        autoencoder: the pipeline's autoencoder, of any class of diffusers; None where there is none.
    """
    expected = channels if autoencoder is None else autoencoder.config.get("latent_channels", channels)
    if expected != channels:
        raise UnsupportedError(
            f"The network of {pipeline} takes {channels} channels, but latents of its autoencoder have {expected}: it "
            "needs more than latents, as networks for inpainting, depth or editing do. Use a text-to-image checkpoint."
        )
