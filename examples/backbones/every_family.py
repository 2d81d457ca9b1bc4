"""Runs likelihood and guidance of families of pipelines on tiny random components of their real classes.

    python examples/backbones/every_family.py --list
    python examples/backbones/every_family.py Flux wan21_euler ltx

Nothing is downloaded. The tiny pipelines and the arguments of their calls are those of the tests. Without names all
families run. The numbers mean nothing, because the networks are random: what runs on them runs on a checkpoint of the
family by the same lines, with `from_pretrained(...)` in the place of the maker.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from diffusers_fisher import FisherError, backbone_of, guide, log_likelihood

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from pipelines import backbones, outside

CLASSES = {**backbones.BACKBONES, **vars(backbones).get("FAMILIES", {})}
"""Families with a Fisher class, by the name of the stock class without its ending."""


def left_minus_right(images, conditions):
    """Returns the brightness of the left half minus that of the right half: a reward that needs no model."""
    left, right = images.chunk(2, dim=-1)
    return left.mean((1, 2, 3)) - right.mean((1, 2, 3))


def run_class(family):
    """Returns what to run for a family with a Fisher class: the pipeline, its likelihood and its guidance."""
    pipe = family.ours()
    return (
        pipe,
        lambda: family.score(pipe, latents=0.5 * family.noise()),
        lambda: family.guide(pipe, left_minus_right, num_guidance_steps=2, num_inference_steps=4),
    )


def run_stock(setup):
    """Returns the same for a stock pipeline of a family without a class, which is known by what its call says."""
    pipe, arguments = setup.pipe, setup.arguments()
    prompt = arguments.pop("prompt", None)
    return (
        pipe,
        lambda: log_likelihood(pipe, latents=0.5 * setup.noise(), num_inference_steps=4, **setup.conditions),
        lambda: guide(pipe, prompt, left_minus_right, num_guidance_steps=2, num_inference_steps=4, **arguments),
    )


def result_of(function):
    """Returns the numbers of a likelihood or a guidance, or the sentence by which it is refused."""
    try:
        output = function()
    except FisherError as error:
        return f"{type(error).__name__}: {error}"
    numbers = output.rewards.mean(1) if "rewards" in output else output.bits_per_dim
    return [round(float(number), 4) for number in numbers]


def main(arguments=None):
    """Runs the script; returns what it prints, by the families' names."""
    makers = {name: (run_class, lambda family=family: family) for name, family in CLASSES.items()}
    makers |= {name: (run_stock, make) for name, make in outside.SET_UPS.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="names of --list; none: all")
    parser.add_argument("--list", action="store_true", help="print the names, and run nothing")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.families) - set(makers))
    if unknown:
        parser.error(f"there is no family {', '.join(unknown)}; there are: {', '.join(makers)}")
    if options.list:
        print("\n".join(makers))
        return {}
    warnings.simplefilter("ignore")  # of few steps, and of networks that look distilled
    results = {}
    for name in options.families or makers:
        run, make = makers[name]
        pipe, likelihood, guidance = run(make())
        results[name] = {
            "pipeline": type(pipe).__name__, "backbone": type(backbone_of(pipe)).__name__,
            "bits_per_dim": result_of(likelihood), "rewards": result_of(guidance),
        }  # fmt: skip
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    return results


if __name__ == "__main__":
    main()
