"""Measures a likelihood by a trace model at Stable Diffusion 1.5's size, beside plain inversion, one
product by back-propagation and one difference per level.

    python examples/benchmarks/trace_cost.py

The networks have random weights of the true shapes (UNet 860 M, CLIP's text encoder, 64x64x4 latents), and the batch
is 1. The trace model is that of configs/trace_stable_diffusion_1_5.yaml, and is not checked here: its checks would
take a larger part of the few levels than of a likelihood's 33. Every way runs once in a process of its own for its
peak memory, and all run in turn for their times. "inversion" integrates the same ordinary differential equation
without any trace. The benchmark writes trace_cost.json. It takes ten minutes on two cores, and 12 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import paired_seconds, ratio, save
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    FiniteDifferenceFisher,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
)
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.training.trace_config import TraceMatchingConfig, make_trace_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from embedded_models import make_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "trace_stable_diffusion_1_5.yaml"
METHODS = ("inversion", "trace model", "1 probe", "1 difference")


def make_pipeline(tiny: bool) -> Any:
    """Makes Stable Diffusion 1.5 with random weights."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    sizes: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if tiny:
        sizes |= {"block_out_channels": (32, 32, 64, 64), "sample_size": 16}
    words = make_tokenizer()
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=1 if tiny else 12, num_attention_heads=12
    )
    vae = AutoencoderKL(  # only its factor is used, because the likelihood is of latents
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
    )  # fmt: skip
    pipe = StableDiffusionFisherPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=UNet2DConditionModel(**sizes),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


class Measurements:
    """Computes likelihoods of one random latent.

    Args:
        steps: number of steps of the integration.
    """

    def __init__(self, tiny: bool, steps: int):
        self.pipe, self.steps = make_pipeline(tiny), steps
        side = self.pipe.unet.config.sample_size
        config = load_config(CONFIG, TraceMatchingConfig)
        self.model = make_trace_model(config, self.pipe, (4, side, side)).eval().to(self.pipe.device)
        self.latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))

    def run(self, method: str) -> Any:
        estimator, probes = {
            "inversion": (DirectFisher(), None), "trace model": (TraceMatchingFisher(self.model), None),
            "1 probe": (AutodiffFisher(), 1), "1 difference": (FiniteDifferenceFisher(), 1),
        }[method]  # fmt: skip
        out = self.pipe.log_likelihood(
            latents=self.latents, prompt="a photo of a coat", estimator=estimator, num_probes=probes,
            num_inference_steps=self.steps, trace_checks=0,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return out

    def calls(self, rounds: int) -> dict[str, list[float]]:
        """Returns the seconds of one evaluation of the denoiser, and of the trace model at its state."""
        denoiser = PipelineDenoiser(self.pipe, prompt=["a photo of a coat"])
        latents = self.latents.to(self.pipe.device)
        state = denoiser.state(latents, 500)
        return paired_seconds(
            {
                "denoiser": lambda: float(denoiser.state(latents, 500).epsilon.sum()),
                "trace model": lambda: float(self.model.unexplained_noise_fraction(state).sum()),
            },
            rounds,
        )


def peak_bytes(method: str, arguments: argparse.Namespace) -> int:
    """Returns the peak memory of one likelihood in a process of its own."""
    command = [sys.executable, __file__, "--one", method, "--steps", "2", *(["--tiny"] if arguments.tiny else [])]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return json.loads(answer)["peak_bytes"]


def measure_peak(arguments: argparse.Namespace) -> None:
    measurements = Measurements(arguments.tiny, arguments.steps)
    measurements.run("inversion")  # as in plain inference
    measurements.run(arguments.one)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of every integration")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="trace_cost", help="name of the JSON file")
    arguments = parser.parse_args()
    if arguments.one:
        return measure_peak(arguments)
    memory = {method: peak_bytes(method, arguments) for method in METHODS}
    begin = time.perf_counter()
    measurements = Measurements(arguments.tiny, arguments.steps)
    calls = measurements.calls(2 * arguments.rounds)
    seconds = paired_seconds(
        {method: lambda method=method: measurements.run(method) for method in METHODS}, arguments.rounds
    )
    save(
        arguments.name,
        {
            "shape": list(measurements.latents.shape), "steps": arguments.steps, "threads": torch.get_num_threads(),
            "denoiser_parameters": measurements.pipe.unet.num_parameters(),
            "trace_parameters": measurements.model.num_parameters(),
            "call_seconds": calls, "trace_model_over_denoiser": ratio(calls, "trace model", "denoiser"),
            "likelihood_seconds": seconds,
            "trace_model_over_inversion": ratio(seconds, "trace model", "inversion"),
            "probe_over_trace_model": ratio(seconds, "1 probe", "trace model"),
            "difference_over_inversion": ratio(seconds, "1 difference", "inversion"),
            "difference_over_probe": ratio(seconds, "1 difference", "1 probe"),
            "peak_bytes": memory,
            "memory_over_inversion": {method: memory[method] / memory["inversion"] for method in METHODS},
            "wall_seconds": time.perf_counter() - begin,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
