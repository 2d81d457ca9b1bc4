"""How long a check takes, and how surely its calibration finds wrong settings; writes check_settings.json.

    python examples/benchmarks/check_settings.py [--seeds 10]

Both embedded checkpoints are checked whole on the package's test images. Then the calibration alone is repeated with
other draws: of the right checkpoints, which must not be blamed, and of five wrong settings, whose cause must be named.
The flow-matching checkpoint has no betas and no other prediction type, so that its wrong settings are the scalings of
its latents.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from common import save
from diffusers import DDIMScheduler
from embedded_pipelines import NAMES, embedded_pipeline

from diffusers_fisher import check, embedded_prompt, embedded_test_images


def with_scheduler(**changes: Any) -> Callable[[Any], None]:
    """Returns a change of a pipeline: another configuration of its scheduler."""

    def change(pipe: Any) -> None:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)

    return change


def scaled(factor: float) -> Callable[[Any], None]:
    """Returns a change of a pipeline: another scaling factor of its latents."""
    return lambda pipe: pipe.vae.register_to_config(scaling_factor=factor * pipe.vae.config.scaling_factor)


SCALINGS = {
    "scaling twice": (scaled(2.0), "The latents' scaling is 2 times"),
    "scaling half": (scaled(0.5), "The latents' scaling is 0.5 times"),
}
WRONG: dict[str, dict[str, tuple[Callable[[Any], None], str]]] = {
    "sd": {
        "prediction type": (
            with_scheduler(prediction_type="v_prediction"), "`prediction_type` is 'v_prediction', but the network",
        ),
        "betas twice": (with_scheduler(beta_start=0.0017, beta_end=0.024), "The betas are 0.0017 to 0.024"),
        "betas half": (with_scheduler(beta_start=0.000425, beta_end=0.006), "The betas are 0.000425 to 0.006"),
        **SCALINGS,
    },
    "sd3": SCALINGS,
}  # fmt: skip


def calibrations(name: str, seeds: int) -> dict[str, Any]:
    """Returns by setting how often the calibration was right, failed, and named the cause."""
    images, labels = embedded_test_images()
    prompts, result = [embedded_prompt(int(label)) for label in labels], {}
    for setting, (change, cause) in {"right": (lambda pipe: None, ""), **WRONG[name]}.items():
        with embedded_pipeline(name) as pipe:
            change(pipe)
            lines = [
                check(pipe, images, prompts, lines=["calibration"], seed=seed)["calibration"] for seed in range(seeds)
            ]
        result[setting] = {
            "seeds": seeds, "failed": sum(line.status == "failed" for line in lines),
            "cause_named": sum(bool(cause) and cause in line.cause for line in lines),
            "causes": sorted({line.cause for line in lines}), "seconds": sum(line.seconds for line in lines) / seeds,
        }  # fmt: skip
        print(name, setting, result[setting], flush=True)
    return result


def whole(name: str) -> dict[str, Any]:
    """Returns status and seconds of every line of a whole check."""
    images, labels = embedded_test_images()
    begin = time.perf_counter()
    with embedded_pipeline(name) as pipe:
        report = check(pipe, images, [embedded_prompt(int(label)) for label in labels])
    print(report, flush=True)
    return {
        "images": len(images), "status": {line.name: line.status for line in report.lines},
        "line_seconds": {line.name: line.seconds for line in report.lines}, "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    result = {name: {"check": whole(name), "calibration": calibrations(name, seeds)} for name in NAMES}
    save("check_settings", result)


if __name__ == "__main__":
    main()
