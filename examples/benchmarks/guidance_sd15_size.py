"""Measures time and memory of one guidance iteration at Stable Diffusion 1.5's size, with random weights.

    python examples/benchmarks/guidance_sd15_size.py                                # CPU, float32: hours
    python examples/benchmarks/guidance_sd15_size.py --device cuda --dtype float16
    python examples/benchmarks/guidance_sd15_size.py --methods direct "endpoint, centred" --retry-failed
    python examples/benchmarks/guidance_sd15_size.py --tiny                         # only to see that it runs

The benchmark writes guidance_sd15_size_DEVICE_DTYPE.json. It has a UNet of 860 M parameters, its autoencoder, 512x512
images and 25 steps of DDIM. Every method has a process of its own, so that its peak memory is its own. In this process
the floor (a plain run, a decoding, and the backward pass of the decoding and the reward) is timed in turn with the
method. Finished methods are kept in `--records`, and a second run continues from there. Methods that failed (killed
for memory, for example) are kept too, and `--retry-failed` tries them again. `--methods` runs only some methods; the
JSON has all methods in the records. Full back-propagation with a stored graph takes hundreds of GB, so it runs only
with `--stored-graph`.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import save
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from guidance_methods import DEFAULT, Methods

from diffusers_fisher import LinearReward
from diffusers_fisher.jobs.records import Records

METHODS = (
    "floor", DEFAULT, "direct", "gaussian", "endpoint, centred", "finite difference",
    "finite difference, guidance left out", "per-step recomputation", "recomputation, guidance left out",
)  # fmt: skip
AUTODIFF_FREE = (DEFAULT, "direct", "gaussian", "endpoint, centred")
STORED = "stored graph"
EXACT = (STORED, "per-step recomputation")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings of the run; the defaults are those of Stable Diffusion 1.5."""

    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 25
    guidance_scale: float = 7.5
    pixels: int = 512
    rounds: int = 1
    tiny: bool = False


def pipeline(setting: Setting) -> Any:
    """Makes Stable Diffusion 1.5 without its text encoder, or a small version of it."""
    torch.manual_seed(0)
    widths, ends = ((320, 640, 1280, 1280), (128, 256, 512, 512)) if not setting.tiny else ((32, 64), (32, 64, 64, 64))
    cross = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=widths, cross_attention_dim=768,
        attention_head_dim=8, layers_per_block=2 if not setting.tiny else 1,
        down_block_types=("CrossAttnDownBlock2D",) * cross + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * cross,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=ends, sample_size=512,
        layers_per_block=2 if not setting.tiny else 1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    vae.enable_gradient_checkpointing()  # for all methods alike
    return pipe.to(setting.device, getattr(torch, setting.dtype))


class Iteration:
    """Runs one guidance iteration by any method."""

    def __init__(self, setting: Setting, pipe: Any):
        self.pipe = pipe
        generator = torch.Generator().manual_seed(0)
        side, dtype = setting.pixels // 8, getattr(torch, setting.dtype)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(setting.device, dtype)

        embeds = {"prompt_embeds": draw(1, 77, 768), "negative_prompt_embeds": draw(1, 77, 768)}
        self.methods = Methods(
            self.pipe, embeds, setting.steps, setting.guidance_scale, draw(8, 4, side, side).float()
        )
        self.noise = draw(1, 4, side, side)
        self.reward = LinearReward.left_minus_right(setting.pixels, setting.pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5

    def floor(self) -> torch.Tensor:
        latents = self.methods.table["direct"][0](self.noise).detach().requires_grad_()
        return torch.autograd.grad(self.reward(self.decode(latents), []).sum(), latents)[0]

    def gradient(self, method: str) -> torch.Tensor:
        sample, scheduler, estimator = self.methods.table[method]
        with scheduler.differentiable(estimator) as trajectory:
            latents = sample(self.noise)
        return trajectory.gradient(self.reward(self.decode(latents), []).sum())


def measure(setting: Setting, method: str) -> dict[str, Any]:
    """Returns the seconds of the floor and of the method, timed in turn, and the peak memory of the process."""
    pipe, cuda = pipeline(setting), setting.device.startswith("cuda")
    Iteration(dataclasses.replace(setting, steps=2), pipe).floor()  # the first calls of a process are slower
    iteration, before = Iteration(setting, pipe), _memory(cuda)

    def seconds(task: Callable) -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        task()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    floors, durations = [], []
    for _ in range(setting.rounds):
        floors.append(seconds(iteration.floor))
        if method != "floor":
            durations.append(seconds(lambda: iteration.gradient(method)))
    ratios = [duration / floor for duration, floor in zip(durations, floors, strict=False)]
    return {
        "floor_seconds": statistics.median(floors),
        "seconds": statistics.median(durations or floors),
        "over_floor": statistics.median(ratios) if ratios else 1.0,
        "memory_before": before,
        "peak_memory": _memory(cuda),
        "unet_parameters": sum(parameter.numel() for parameter in pipe.unet.parameters()),
    }


def _memory(cuda: bool) -> int:
    """Returns the peak memory so far in bytes."""
    return torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(setting: Setting, methods: Sequence[str], folder: Path, retry_failed: bool = False) -> dict[str, Any]:
    """Runs each of `methods` in its own process, unless it has a record.

    Args:
        retry_failed: whether to run a method again whose record is a failure.

    Returns:
        The rows of all methods in the records, also those of earlier runs.
    """
    records = Records(folder, dataclasses.asdict(setting) | {"threads": torch.get_num_threads()})
    for method in methods:
        key = _key(method)
        if records.missing([key]) or (retry_failed and "failed" in records.read(key)):
            records.write(key, _in_own_process(setting, method))
        print(f"{method:<40}{json.dumps(records.read(key))}", flush=True)
    all_methods = dict.fromkeys((*METHODS, STORED, *methods))
    rows = {method: records.read(_key(method)) for method in all_methods if not records.missing([_key(method)])}
    return {"setting": dataclasses.asdict(setting), "methods": rows, **_ratios(rows)}


def _key(method: str) -> str:
    return method.replace(",", "").replace(" ", "_")


def _in_own_process(setting: Setting, method: str) -> dict[str, Any]:
    """Returns the result of `measure`, or under the key "failed" how the process ended."""
    text = json.dumps(dataclasses.asdict(setting))
    command = [sys.executable, __file__, "--cell", method, "--setting", text]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    print(f"{method}: {process.stderr.strip().splitlines()[-1:] or process.returncode}", flush=True)
    return {"failed": f"exit status {process.returncode}"}  # killed for memory, for example


def _ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Compares the default with the floor and with the faster exact method that fitted into the memory."""
    over_floor = {name: rows[name]["over_floor"] for name in EXACT if "over_floor" in rows.get(name, {})}
    if not over_floor or "over_floor" not in rows.get(DEFAULT, {}):
        return {}
    exact = min(over_floor, key=lambda name: over_floor[name])
    return {
        "faster_exact_method": exact,
        "exact_over_default": over_floor[exact] / rows[DEFAULT]["over_floor"],
        "worst_autodiff_free_over_floor": max(
            rows[name]["over_floor"] for name in AUTODIFF_FREE if "over_floor" in rows.get(name, {})
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*METHODS, STORED),
        help="methods to run; the default is all but the stored graph",
    )
    parser.add_argument("--stored-graph", action="store_true", help="also run full back-propagation, all in memory")
    parser.add_argument("--retry-failed", action="store_true", help="try methods again that failed in an earlier run")
    parser.add_argument("--records", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        print(json.dumps(measure(Setting(**json.loads(options.setting)), options.cell)))
        return
    setting = Setting(options.device, options.dtype, options.steps, options.guidance_scale, rounds=options.rounds)
    if options.tiny:
        setting = dataclasses.replace(setting, steps=2, pixels=64, tiny=True)
    name = f"guidance_sd15_size_{options.device}_{options.dtype}"
    methods = tuple(options.methods or METHODS + ((STORED,) if options.tiny else ()))
    methods += (STORED,) if options.stored_graph and STORED not in methods else ()
    result = run(setting, methods, options.records or Path("outputs/benchmarks") / name, options.retry_failed)
    if not options.tiny:
        save(name, result)


if __name__ == "__main__":
    main()
