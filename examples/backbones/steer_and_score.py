"""Samples from any backbone, guides the samples by a reward, and computes likelihoods of the best ones.

    python examples/backbones/steer_and_score.py StableDiffusionXL CHECKPOINT --condition "a red house"

The pipeline is one of `diffusers_fisher.pipelines.PIPELINES` without its ending: StableDiffusion, Flux, PixArtSigma,
DiT, DDPM and others. CHECKPOINT is a folder or a name on the Hub. Conditions are prompts, or class labels for DiT;
unconditional pipelines take none.
"""

import argparse
import json

import torch

import diffusers_fisher


def left_minus_right(images, conditions):
    """Returns the brightness of the left half minus that of the right half: a reward that needs no model."""
    left, right = images.chunk(2, dim=-1)
    return left.mean((1, 2, 3)) - right.mean((1, 2, 3))


def main(arguments=None):
    """Runs the script; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("checkpoint")
    parser.add_argument("--condition", nargs="*", default=[], help="prompts or class labels, one per image")
    parser.add_argument("--steps", type=int, default=20, help="steps of sampling and of the likelihood's integration")
    parser.add_argument("--guidance-steps", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(None, None))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of the call, in JSON")
    options = parser.parse_args(arguments)

    cls = getattr(diffusers_fisher, f"{options.pipeline}FisherPipeline")
    pipe = cls.from_pretrained(options.checkpoint, dtype=getattr(torch, options.dtype)).to(options.device)
    conditions = [int(text) if text.isdigit() else text for text in options.condition]
    conditions = [conditions] if conditions else []
    height, width = options.size

    best = pipe.guide(
        *conditions, left_minus_right, num_inference_steps=options.steps, num_guidance_steps=options.guidance_steps,
        height=height, width=width, generator=torch.Generator(options.device).manual_seed(options.seed),
        output_type="pt", **options.options,
    )  # fmt: skip
    scores = pipe.log_likelihood(
        best.images, *conditions, num_inference_steps=options.steps,
        generator=torch.Generator(options.device).manual_seed(options.seed), **options.options,
    )  # fmt: skip
    result = {
        "rewards": best.rewards.mean(1).tolist(), "bits_per_dim": scores.bits_per_dim.tolist(), "space": scores.space,
        "discretisation_error_nats": scores.discretisation_error.tolist(),
        "denoiser_calls": best.num_denoiser_calls + scores.num_denoiser_calls,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
