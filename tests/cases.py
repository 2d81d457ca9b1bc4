"""The tables that the suite runs over: schedulers in every configuration, exact distributions, and a denoiser."""

import dataclasses
import inspect
from typing import Any

import diffusers
import torch

from diffusers_fisher import FisherEstimator
from diffusers_fisher.testing import MixtureOracle

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

EPSILON_V = ("epsilon", "v_prediction")
EPSILON_V_SAMPLE = (*EPSILON_V, "sample")
ALL_TYPES = (*EPSILON_V_SAMPLE, "flow_prediction")

PREDICTION_TYPES = {
    "DDIMScheduler": EPSILON_V_SAMPLE,
    "DDIMInverseScheduler": EPSILON_V_SAMPLE,
    "DDPMScheduler": EPSILON_V_SAMPLE,
    "DEISMultistepScheduler": ALL_TYPES,
    "DPMSolverMultistepScheduler": ALL_TYPES,
    "DPMSolverMultistepInverseScheduler": ALL_TYPES,
    "DPMSolverSinglestepScheduler": ALL_TYPES,
    "EDMEulerScheduler": EPSILON_V,
    "EulerAncestralDiscreteScheduler": EPSILON_V,
    "EulerDiscreteScheduler": EPSILON_V_SAMPLE,
    "FlowMatchEulerDiscreteScheduler": (None,),
    "FlowMatchHeunDiscreteScheduler": (None,),
    "HeunDiscreteScheduler": EPSILON_V_SAMPLE,
    "KDPM2DiscreteScheduler": EPSILON_V,
    "LCMScheduler": EPSILON_V_SAMPLE,
    "LMSDiscreteScheduler": EPSILON_V_SAMPLE,
    "PNDMScheduler": EPSILON_V,
    "SASolverScheduler": ALL_TYPES,
    "TCDScheduler": EPSILON_V_SAMPLE,
    "UniPCMultistepScheduler": ALL_TYPES,
}
"""The prediction types that each scheduler of the catalog accepts (None: it has no such setting)."""

CONTINUOUS = {
    "timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_min": 0.01,
    "sigma_max": 100.0,
}  # fmt: skip
KARRAS, SIGMA_MIN = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [ZERO_SNR, {"set_alpha_to_one": False}, {"clip_sample": True}, {"thresholding": True}],
    "DDPMScheduler": [ZERO_SNR],
    "DEISMultistepScheduler": [KARRAS],
    "DPMSolverMultistepScheduler": [
        KARRAS, SIGMA_MIN, {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", **SIGMA_MIN},
    ],
    "DPMSolverMultistepInverseScheduler": [KARRAS],
    "DPMSolverSinglestepScheduler": [KARRAS, SIGMA_MIN],
    "EDMEulerScheduler": [SIGMA_MIN],
    "EulerDiscreteScheduler": [KARRAS, SIGMA_MIN, {"use_exponential_sigmas": True}, CONTINUOUS],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, {"invert_sigmas": True}],
    "HeunDiscreteScheduler": [KARRAS],
    "KDPM2DiscreteScheduler": [KARRAS],
    "LMSDiscreteScheduler": [KARRAS],
    "PNDMScheduler": [{"skip_prk_steps": True}],
    "SASolverScheduler": [KARRAS],
    "UniPCMultistepScheduler": [KARRAS, SIGMA_MIN, {"predict_x0": False, **SIGMA_MIN}],
}  # fmt: skip

STEP_OPTIONS = {
    "DDIMScheduler": {"eta": 0.7},
    "EDMEulerScheduler": {"s_churn": 3.0},
    "EulerDiscreteScheduler": {"s_churn": 3.0},
}

OUTSIDE_CATALOG = {
    "CogVideoXDDIMScheduler": EPSILON_V_SAMPLE,
    "DDIMParallelScheduler": EPSILON_V_SAMPLE,
    "DDPMParallelScheduler": EPSILON_V_SAMPLE,
    "EDMDPMSolverMultistepScheduler": EPSILON_V,
    "FlowMatchLCMScheduler": (None,),
    "KDPM2AncestralDiscreteScheduler": EPSILON_V,
}
"""Schedulers that `fisher_scheduler` makes differentiable, with the prediction types they accept."""


@dataclasses.dataclass(frozen=True)
class SchedulerCase:
    """One scheduler in one configuration, and what its `step` is called with."""

    name: str
    changes: dict[str, Any]
    step: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parent(self) -> type:
        return getattr(diffusers, self.name)

    @property
    def config(self) -> dict[str, Any]:
        """Stable Diffusion's schedule without clipping, where the scheduler has these settings, then the changes."""
        parameters = inspect.signature(self.parent.__init__).parameters
        base = {**STABLE_DIFFUSION, "clip_sample": False}
        if self.name == "DDIMInverseScheduler":
            base["set_alpha_to_one"] = False  # its first sample is at the final level; sigma = 0 there has no epsilon
        return {**{key: value for key, value in base.items() if key in parameters}, **self.changes}

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in {**self.changes, **self.step}.items()]
        return " ".join([self.name.removesuffix("Scheduler"), *words])


def scheduler_cases(types: dict[str, tuple], options: dict[str, list]) -> list[SchedulerCase]:
    """Returns every prediction type of every scheduler, and each of its options once."""
    table = []
    for name, kinds in types.items():
        for kind in kinds:
            changes = {} if kind is None else {"prediction_type": kind}
            if kind == "flow_prediction":
                changes["use_flow_sigmas"] = True
            table.append(SchedulerCase(name, changes))
        table.extend(SchedulerCase(name, changes) for changes in options.get(name, ()))
    return table


CASES = scheduler_cases(PREDICTION_TYPES, OPTIONS)
CHURNED_CASES = [SchedulerCase(name, {}, step) for name, step in STEP_OPTIONS.items()]
OUTSIDE_CASES = scheduler_cases(OUTSIDE_CATALOG, {"CogVideoXDDIMScheduler": [ZERO_SNR]})


class Network:
    """A smooth denoiser `(x, t) -> output` whose Jacobian is of order one and not symmetric, as learned ones are."""

    def __init__(self, dimensions: int = 12, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64).to(dtype) / 3

    def __call__(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1) / 1000
        return (torch.tanh(x.flatten(1) @ self.weight + time) * 0.9).view_as(x) + 0.1 * x


def latents(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 2, 2), seed: int = 1) -> torch.Tensor:
    """Returns seeded standard normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model_input(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """Returns the model's input; flow-matching schedulers have no `scale_model_input`."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def sampling_run(scheduler: Any, network, x: torch.Tensor, num_steps: int = 6, between=None, **step: Any):
    """Runs a scheduler as a pipeline does; returns the samples after every step, the last one the result.

    Args:
        network: `(model_input, timestep) -> output`.
        between: `(index, sample) -> sample`, what a pipeline's callback does after each step.
        **step: passed to every `step`, beside a seeded generator where it takes one.
    """
    scheduler.set_timesteps(num_steps)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = torch.Generator().manual_seed(3)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    samples = []
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(model_input(scheduler, x, t), t), t, x, return_dict=False, **step)[0]
        x = x if between is None else between(index, x)
        samples.append(x)
    return samples


ORACLE_SHAPE = (1, 2, 3)


class FunctionFisher(FisherEstimator):
    """An estimator whose operators a function `(state, endpoint) -> FisherOperator` makes."""

    def __init__(self, function):
        self.function = function

    def __call__(self, state, endpoint=None):
        return self.function(state, endpoint)


def _covariances(count: int, generator: torch.Generator) -> torch.Tensor:
    factors = torch.randn(count, 6, 6, generator=generator, dtype=torch.float64)
    return 0.05 * factors @ factors.mT + 0.02 * torch.eye(6, dtype=torch.float64)


def _oracles() -> dict[str, MixtureOracle]:
    generator = torch.Generator().manual_seed(11)
    centres = torch.randn(5, *ORACLE_SHAPE, generator=generator, dtype=torch.float64)
    three = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    five = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    return {
        "gaussian": MixtureOracle.gaussian(centres[0], _covariances(1, generator)[0]),
        "mixture": MixtureOracle(centres[:3], _covariances(3, generator), three),
        "points": MixtureOracle.points(centres, five),
    }


ORACLES = _oracles()


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the norm of the difference relative to the reference's norm."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())
