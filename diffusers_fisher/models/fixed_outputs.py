"""Outputs of a denoising network on a fixed input, which show whether two networks are the same function.

The input is the same on every machine, because it comes from a formula instead of random numbers.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

TIMESTEPS = (125.0, 500.0)  # of 1,000; bfloat16 has them exactly, in thousandths, too
NUM_SUMS = 32  # numbers that are kept of an output; their relative change is that of the output, to within 12%
NUM_TOKENS = 4  # of the text
NUM_PATCHES = 4  # along each side of the input of transformers
OUTPUT_TOLERANCE = 1e-4  # relative change of the output that rounding and other kernels explain, in float32
ROUNDINGS = 4  # number of roundings of the dtype that explain a relative change of the output
TF32_ROUNDING = 2.0**-10  # accelerators may multiply float32 numbers with this rounding
ROUNDING_OF_8_BITS = 2.0**-3  # of float8 with 3 bits after the point; quantised weights are taken for such
LARGEST_TOLERANCE = 0.1  # weights in float8 change the embedded checkpoint's outputs by 0.03, FreeU by 0.19
WIDTHS = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
"""Settings of the width of text embeddings, from the first that a network uses to the last."""


def is_quantised(parameter: torch.Tensor) -> bool:
    """Returns whether a parameter keeps its values in a form of its own (torchao), whatever its dtype says."""
    return type(parameter) not in (torch.nn.Parameter, torch.Tensor)


@functools.cache
def fixed_direction(count: int) -> torch.Tensor:
    """Returns a fixed direction without a pattern, (count,) float64; its entries have mean square 1/2."""
    return torch.cos(torch.arange(count, dtype=torch.float64) ** 2 * 0.7548776662466927)


@torch.no_grad()
def fixed_outputs(network: torch.nn.Module) -> dict[str, Any] | None:
    """Returns 32 sums of the output at each of two timesteps, and the relative change that rounding explains.

    The batch is one. The result is None for networks that can't be evaluated so: with weights that are not in memory
    or are no floating-point numbers, with dropout at work, with outputs that are not finite, or whose call takes other
    arguments than those of diffusers' networks.

    Cost: two evaluations of a small input, 16x16 for the network of Stable Diffusion.
    """
    parameters = list(network.parameters())
    drops = any(isinstance(part, torch.nn.Dropout) and part.training and part.p > 0 for part in network.modules())
    if drops or not parameters or any(each.is_meta or not each.is_floating_point() for each in parameters):
        return None
    rounding = max(ROUNDING_OF_8_BITS if is_quantised(each) else torch.finfo(each.dtype).eps for each in parameters)
    if parameters[0].device.type != "cpu":
        rounding = max(rounding, TF32_ROUNDING)
    coarse = min(ROUNDINGS * rounding, LARGEST_TOLERANCE)
    tolerance = OUTPUT_TOLERANCE if rounding <= torch.finfo(torch.float32).eps else coarse
    try:
        outputs = [_output(network, timestep, parameters[0].device) for timestep in TIMESTEPS]
    except Exception:  # a network of any class, with any settings and hooks, which this input need not fit
        return None
    if not all(bool(output.isfinite().all()) for output in outputs):
        return None
    return {"tolerance": tolerance, "sums": [sums_of(output.flatten().cpu().double()).tolist() for output in outputs]}


def output_change(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[float, float]:
    """Returns by which part of their size outputs differ, and the part that rounding explains.

    The first number is that of the timestep at which they differ most.
    """
    pairs = zip(expected["sums"], actual["sums"], strict=True)
    change = max(math.dist(left, right) / max(math.hypot(*left), 1e-30) for left, right in pairs)
    return change, max(expected["tolerance"], actual["tolerance"])


def sums_of(values: torch.Tensor) -> torch.Tensor:
    """Returns `NUM_SUMS` sums, float64, of products of the values (N,) with a fixed direction, taken in turn."""
    terms = values * fixed_direction(len(values))
    return torch.nn.functional.pad(terms, (0, -len(terms) % NUM_SUMS)).view(-1, NUM_SUMS).sum(0)


def _output(network: torch.nn.Module, timestep: float, device: torch.device) -> torch.Tensor:
    # `__call__` ends in this method, which runs the hooks, and does not compile after `network.compile()`.
    output = network._call_impl(**_inputs(network, timestep, device), return_dict=False)[0]
    if next(network.parameters()).device != device:  # model offload has loaded the network
        torch.nn.Module.to(network, device)
    return output


def _inputs(network: Any, timestep: float, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a network's call, except for `return_dict`."""
    config, names = network.config, inspect.signature(network.forward).parameters

    def values(*shape: int) -> torch.Tensor:
        return (math.sqrt(2) * fixed_direction(math.prod(shape))).view(shape).to(device, network.dtype)

    image: tuple[int, ...] = (config["in_channels"], _side(config), _side(config))
    is_packed = "img_ids" in names  # Flux
    if is_packed:
        image, timestep = (NUM_PATCHES**2, config["in_channels"]), timestep / 1000
    arguments: dict[str, Any] = {"timestep": torch.tensor([timestep], device=device)}
    arguments["sample" if "sample" in names else "hidden_states"] = values(1, *image)
    if "encoder_hidden_states" in names:
        width = next(config[name] for name in WIDTHS if config.get(name) is not None)
        arguments["encoder_hidden_states"] = values(1, NUM_TOKENS, width)
    if "pooled_projections" in names:
        arguments["pooled_projections"] = values(1, config["pooled_projection_dim"])
    if is_packed:
        places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(NUM_PATCHES))] * 2)
        arguments |= {"img_ids": places.to(device), "txt_ids": torch.zeros(NUM_TOKENS, 3, device=device)}
        arguments |= {"guidance": torch.ones(1, device=device)} if config["guidance_embeds"] else {}
    if "class_labels" in names and (config.get("num_class_embeds") or config.get("num_embeds_ada_norm")):
        arguments["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        arguments["added_cond_kwargs"] = {"text_embeds": values(1, pooled), "time_ids": values(1, 6)}
    elif "use_additional_conditions" in config:  # PixArt
        arguments["added_cond_kwargs"] = {"resolution": values(1, 2), "aspect_ratio": values(1, 1)}
    return arguments


def _side(config: Mapping[str, Any]) -> int:
    """Returns a side of the input that suits the network: two in its innermost blocks, or four patches."""
    if "block_out_channels" in config:
        return 2 ** len(config["block_out_channels"])
    return NUM_PATCHES * config["patch_size"]
