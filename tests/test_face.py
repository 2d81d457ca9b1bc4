"""The public face as type checkers see it: right code passes, misspelt names do not."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_fisher

ROOT = Path(__file__).parents[1]
STUB = Path(diffusers_fisher.__file__).with_suffix(".pyi")

RIGHT = """
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from diffusers_fisher import (
    DDPMFisherPipeline,
    DirectFisher,
    FisherEstimator,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    backbone_of,
    fisher_pipeline,
    guide,
    log_likelihood,
)


def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


pipe = StableDiffusionFisherPipeline.from_pretrained("folder").to("cpu")
bits: torch.Tensor = pipe.log_likelihood(torch.rand(1, 3, 64, 64), "a coat").bits_per_dim
images: torch.Tensor = pipe.guide("a coat", reward, num_guidance_steps=2).images
stock = StableDiffusionPipeline.from_pretrained("folder")
likelihood = log_likelihood(stock, torch.rand(1, 3, 64, 64), "a coat", estimator=DirectFisher()).log_prob + 1.0
best: torch.Tensor = guide(stock, "a coat", reward).images
latents: torch.Tensor = backbone_of(stock).encode(torch.rand(1, 3, 64, 64))[0]
estimator: FisherEstimator = DirectFisher()
denoiser = PipelineDenoiser(stock, prompt="a coat")
product: torch.Tensor = estimator.bind(denoiser)(denoiser.state(latents, 500)).matvec(latents)
DDPMFisherPipeline.from_pretrained("folder").log_likelihood(torch.rand(1, 1, 8, 8))
"""

WRONG = {
    "from diffusers_fisher import DirecFisherr": "DirecFisherr",
    "from diffusers_fisher import StableDiffusionFisherPipeline as P; P.from_pretrained('x').log_likelihod()": (
        '"StableDiffusionFisherPipeline" has no attribute "log_likelihod"'
    ),
    "from diffusers_fisher import LikelihoodOutput; f = lambda out: out; x: LikelihoodOutput; x.bits_per_dims": (
        '"LikelihoodOutput" has no attribute "bits_per_dims"'
    ),
    "from diffusers_fisher import StableDiffusionFisherPipeline as P; P.from_pretrained('x').guide('a', 3)": (
        'Argument 2 has incompatible type "int"'
    ),
    "from diffusers_fisher import DDPMFisherPipeline as P; P.from_pretrained('x').unett": (
        '"DDPMFisherPipeline" has no attribute "unett"'
    ),
}


def check(folder, name, code):
    """Runs mypy on a file with `code`, with the project's settings and cache."""
    file = folder / f"{name}.py"
    file.write_text(code + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_type_checker_accepts_right_code_and_refuses_misspelt_names(tmp_path):
    right_check = check(tmp_path, "right", RIGHT)
    assert right_check.returncode == 0, right_check.stdout + right_check.stderr
    misspelt_check = check(
        tmp_path, "wrong", "\n".join(f"def wrong_{i}() -> None:\n    {code}" for i, code in enumerate(WRONG))
    )
    assert misspelt_check.returncode == 1, misspelt_check.stdout + misspelt_check.stderr
    for line, (code, message) in zip(range(2, 2 + 2 * len(WRONG), 2), WRONG.items(), strict=True):
        messages = [each for each in misspelt_check.stdout.splitlines() if f"wrong.py:{line}:" in each]
        assert any(message in each for each in messages), (code, misspelt_check.stdout)


def test_names_of_the_stub_are_those_of_the_package():
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    names = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert None not in names  # `X as X` alone is exported to type checkers
    assert names == set(diffusers_fisher.__all__) | {"ModelMixin", "SchedulerMixin"}


@pytest.mark.parametrize("name", diffusers_fisher.__all__)
def test_public_names_have_docstrings_of_their_own(name):
    value = getattr(diffusers_fisher, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
