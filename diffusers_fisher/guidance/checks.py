"""What a reward is, and the checks of one before and during guidance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..backbones import Backbone
from ..errors import InputError, NumericalError, TrajectoryError

Prompts = Sequence[str] | Sequence[int]
"""One prompt per sample; class labels for pipelines that take class labels."""

Reward = Callable[[torch.Tensor, Any], torch.Tensor]
"""`reward(images, prompts) -> rewards`: images (B, 3, H, W) in [0, 1] with a graph, `Prompts`, rewards (B,), higher is
better."""


def check_guidance(
    num_guidance_steps: int, step_size: float, num_inference_steps: int, output_type: str, patience: int | None
) -> None:
    """Refuses numbers of steps, step sizes and output types that `guide` can't use. Raises `InputError`."""
    if num_guidance_steps < 0 or num_inference_steps < 1:
        raise InputError(
            f"`num_guidance_steps` is {num_guidance_steps}, `num_inference_steps` {num_inference_steps}; allowed: "
            "at least 0 and at least 1."
        )
    if not 0 < step_size < math.inf:
        raise InputError(f"`step_size` is {step_size}; allowed: positive, such as 0.2 of the noise's norm.")
    if patience is not None and patience < 1:
        raise InputError(f"`patience` is {patience}; allowed: at least 1 run, or None.")
    if output_type not in ("pil", "np", "pt"):
        raise InputError(f"`output_type` is '{output_type}'; allowed: pil, np, pt.")


def check_num_steps(backbone: Backbone, num_inference_steps: int, name: str = "num_inference_steps") -> None:
    """Refuses more steps than the pipeline's scheduler makes. Raises `InputError`, before a run begins."""
    scheduler = backbone.differentiable_scheduler()
    num_train_timesteps = scheduler.config.get("num_train_timesteps")
    if backbone.predicts_flow or num_train_timesteps is None or num_inference_steps <= num_train_timesteps:
        return
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"`{name}` is {num_inference_steps}; {type(backbone.scheduler).__name__} allows at most "
            f"{num_train_timesteps}, its number of training timesteps. It said: {error}"
        ) from error


def checked_reward(reward: Reward, images: torch.Tensor, prompts: Prompts, finite: bool = True) -> torch.Tensor:
    """Calls the reward and checks its shape and, with `finite`, its values.

    Raises:
        InputError: not a tensor of shape (B,). NumericalError: not finite.
    """
    values = reward(images, list(prompts))  # a copy, which the reward may change
    if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise InputError(
            f"The reward {name_of(reward)} returned {got} for {len(images)} images; it must return a tensor of shape "
            f"({len(images)},), one number per image, higher is better."
        )
    if finite and not torch.isfinite(values).all():
        raise NumericalError(f"The reward {name_of(reward)} is not finite: {values.detach().cpu().tolist()}.")
    return values


def check_differentiable(reward: Reward, shape: Sequence[int], prompts: Prompts, device: torch.device) -> None:
    """Tries the reward on smooth ramps before any sampling. Cost: one evaluation of the reward and its gradient.

    Raises:
        InputError: the reward has no gradient with respect to the images.
        TrajectoryError: torch.inference_mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise TrajectoryError(
            "Guidance needs gradients, which torch.inference_mode forbids whatever is set inside it; use "
            "torch.no_grad instead, or nothing: the denoiser builds no graph in any case."
        )
    check_callable(reward)
    with torch.enable_grad():
        images = _ramps(shape, device).requires_grad_()
        values = checked_reward(reward, images, prompts)
        gradient = torch.autograd.grad(values.sum(), images, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise gradient_error(reward)
    for _, term in getattr(reward, "terms", ()):  # a term with a graph would hide the other terms of a sum
        check_differentiable(term, shape, prompts, device)


@torch.no_grad()
def check_reported(reward: Reward, shape: Sequence[int], prompts: Prompts, device: torch.device) -> None:
    """Tries a reward that is reported and not optimised. Its result must have the right shape, and nothing more.

    Raises:
        InputError: not a tensor of shape (B,).
    """
    check_callable(reward)
    checked_reward(reward, _ramps(shape, device), prompts, finite=False)


def check_callable(reward: Reward) -> None:
    """Refuses a reward that can't be called with two arguments. Raises `InputError`."""
    if isinstance(reward, type):
        raise InputError(
            f"The reward is the class {reward.__name__}; allowed: an object that can be called. Pass "
            f"{reward.__name__}(...)."
        )
    try:  # of a module it is `forward` that takes the arguments
        inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward).bind(None, None)
    except TypeError as error:
        raise InputError(
            f"The reward {name_of(reward)} can't be called as reward(images, prompts): {error}. It must take both, "
            "images (B, 3, H, W) in [0, 1] and one prompt per image, whether it uses the prompts or not."
        ) from error
    except ValueError:  # a builtin function without a signature
        return


def check_candidates(num_candidates: int, callback: Callable | None) -> None:
    """Refuses numbers of candidates, and callbacks that can't be called with one argument. Raises `InputError`."""
    if num_candidates < 1:
        raise InputError(f"`num_candidates` is {num_candidates}; allowed: at least 1.")
    if callback is not None:
        try:
            inspect.signature(callback).bind(None)
        except TypeError as error:
            raise InputError(
                f"`callback_on_guidance_step` can't be called as callback(step): {error}. It must take one argument, "
                "a GuidanceStep."
            ) from error
        except ValueError:  # a builtin function without a signature
            return


def _ramps(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Makes images with no two equal pixels, so that a reward may divide by the images' contrast."""
    return torch.linspace(0.25, 0.75, math.prod(shape), device=device).reshape(tuple(shape))


def gradient_error(reward: Reward) -> InputError:
    """Makes the error for a reward that is not differentiable with respect to the images."""
    return InputError(
        f"The reward {name_of(reward)} is not differentiable with respect to the images: it returned a tensor without "
        "a graph to them. Keep to torch operations on the tensor; processors that go through PIL or numpy, `.item()`, "
        "`.detach()`, argmax and torch.no_grad cut gradients."
    )


def reward_in_run(
    reward: Reward, images: torch.Tensor, prompts: Prompts, part: str, latents: torch.Tensor
) -> torch.Tensor:
    """Calls the reward on images of a run, and checks the images, the rewards and, in a backward pass, the gradient.

    Args:
        part: name of the part of the run, for messages.
        latents: what the images were decoded from.

    Raises:
        InputError: the reward is not a tensor of shape (B,).
        NumericalError: the images or the rewards are not finite; or, from the backward pass through `images`, the
            reward's gradient is not finite.
    """
    if not torch.isfinite(images).all():
        size, dtype = float(latents.detach().abs().max()), latents.dtype
        raise NumericalError(
            f"The images of {part} are not finite; their latents "
            + (
                f"are, up to {size:.3g} in {dtype}. Check the weights and the dtype of the decoder."
                if math.isfinite(size)
                else f"in {dtype} are not either. Check the scheduler's settings, and the weights of the network."
            )
        )
    values = checked_reward(reward, images, prompts)

    def check(gradient: torch.Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NumericalError(
                f"The gradient of the reward {name_of(reward)} with respect to the images of {part} is not finite. A "
                "root or a logarithm at 0, or a division by 0, is the usual cause."
            )

    if images.requires_grad:
        images.register_hook(check)
    return values


def name_of(reward: Any) -> str:
    """Returns the reward's name for messages."""
    return f"'{getattr(reward, '__name__', type(reward).__name__)}'"


def norms(x: torch.Tensor) -> torch.Tensor:
    """Returns the norm of each sample, (B, 1, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))


def normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each sample divided by its norm (zero where the norm is zero), and the norms, (B,) float64 on the CPU.

    Each sample is scaled by its largest element first: squares of 1e20, which some estimators' gradients reach,
    overflow in float32.
    """
    flat = x.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, 1)
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    result = (scaled / torch.where(lengths > 0, lengths, 1)).view_as(x)
    return result, (largest.cpu().double() * lengths.cpu().double())[:, 0]
