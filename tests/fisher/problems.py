"""States of ideal denoisers in every scheduler's coordinates with the exact answers; operators of given matrices."""

import torch
from cases import ORACLES, Network, SchedulerCase, latents

from diffusers_fisher import DenoisingState, FisherOperator, NoiseLevel, noise_level
from diffusers_fisher.noise import Prediction, input_scale, state_of
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
COORDINATES = {
    "epsilon": (SchedulerCase("DDIMScheduler", {"prediction_type": "epsilon"}), 500),
    "epsilon at low noise": (SchedulerCase("DDIMScheduler", {"prediction_type": "epsilon"}), 30),
    "v_prediction": (SchedulerCase("DDIMScheduler", {"prediction_type": "v_prediction"}), 300),
    "sample": (SchedulerCase("DDIMScheduler", {"prediction_type": "sample"}), 300),
    "flow in DPM-Solver": (SchedulerCase("DPMSolverMultistepScheduler", FLOW), 400.0),
    "flow matching": (SchedulerCase("FlowMatchEulerDiscreteScheduler", {}), 600.0),
    "k-diffusion epsilon": (SchedulerCase("EulerDiscreteScheduler", {}), 400),
    "k-diffusion v_prediction": (SchedulerCase("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}), 600),
    "EDM": (SchedulerCase("EDMEulerScheduler", {}), -0.1),
    "EDM v_prediction": (SchedulerCase("EDMEulerScheduler", {"prediction_type": "v_prediction"}), 0.2),
}
PACKED = (2, 3)  # (N, C): the layout of transformers such as Flux


class Problem:
    """Holds a state of an ideal denoiser in one scheduler's coordinates, with the exact answers.

    Args:
        shape: shape of one sample, in place of the oracle's own (C, H, W).
    """

    def __init__(self, oracle_name: str, coordinates: str, batch: int = 2, shape: tuple[int, ...] | None = None):
        case, self.timestep = COORDINATES[coordinates]
        self.oracle, self.scheduler = ORACLES[oracle_name], case.parent(**case.config)
        if shape is not None:
            means = self.oracle.means.view(-1, *shape)
            self.oracle = MixtureOracle(means, self.oracle.covariances, self.oracle.weights)
        self.denoiser = OracleDenoiser(self.oracle, self.scheduler)
        self.level = noise_level(self.scheduler, self.timestep)
        generator = torch.Generator().manual_seed(5)
        self.endpoint = self.oracle.sample(batch, generator)
        noise = torch.randn(self.endpoint.shape, generator=generator, dtype=torch.float64)
        self.sample = self.level.alpha * self.endpoint + self.level.sigma * noise
        self.state = self.state_at(self.sample)
        self.fisher = self.oracle.fisher(self.sample, self.level)

    def state_at(self, sample):
        scaled = input_scale(self.scheduler, self.level) * sample
        output = self.denoiser.model_output(scaled, self.timestep)
        return state_of(self.scheduler, sample, output, self.timestep)

    def vector(self, seed=8):
        return latents(shape=tuple(self.sample.shape), seed=seed)


def apply(matrix, v):
    """Returns the products of matrices (B, d, d) with one vector per sample."""
    return torch.einsum("bde,be->bd", matrix, v.flatten(1)).view_as(v)


def state_of_network(network=None, dtype=torch.float64, x=None):
    """Returns a state of a network whose Jacobian is not symmetric, at alpha 0.8 and sigma 0.6."""
    network = network or Network(dtype=dtype)
    level = NoiseLevel(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    x = latents(dtype) if x is None else x
    return DenoisingState(x, network(x, 300), level, Prediction("epsilon"), 300)


class MatrixOperator(FisherOperator):
    """Represents a Fisher by one matrix per sample, (B, d, d); None: symmetric, with eigenvalues of both signs."""

    def __init__(self, state, matrix=None):
        super().__init__(state)
        if matrix is None:
            matrix = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            matrix = matrix + matrix.mT + torch.eye(12, dtype=torch.float64)
        self.matrix = matrix
        self.symmetric = bool(torch.equal(matrix, matrix.mT))

    def covariance(self, v):
        alpha, sigma = self.state.level.alpha, self.state.level.sigma
        return (v / sigma**2 - apply(self.matrix, v)) * sigma**4 / alpha**2
