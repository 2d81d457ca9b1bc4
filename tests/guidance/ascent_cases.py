"""A small sampling problem for ascents: a network, a scheduler, and its exact gradient."""

import dataclasses

import torch
from cases import Network, SchedulerCase, latents, sampling_run

from diffusers_fisher import AutodiffFisher, fisher_scheduler
from diffusers_fisher.guidance import AscentSettings, GuidedRun, ascend_noise

PROMPTS = ["one", "two"]
SHAPE = (2, 3, 2, 2)
WEIGHTS = latents(torch.float32, SHAPE[1:], seed=5)
STEPS = 5


def projection(images, prompts):
    """Returns a linear reward whose weights differ between pixels."""
    return (images * WEIGHTS).flatten(1).sum(1)


class Problem:
    """Samples with a small network on one scheduler, records each initial noise and counts evaluations."""

    def __init__(self, name="DDIMScheduler"):
        case = SchedulerCase(name, {})
        self.scheduler = fisher_scheduler(case.parent)(**case.config)
        self.noises, self.num_calls = [], 0
        self._network = Network(dtype=torch.float32)

    def network(self, x, t):
        self.num_calls += 1
        return self._network(x, t)

    def sample(self, noise):
        self.noises.append(noise)
        return self.run(noise)

    @torch.no_grad()
    def run(self, noise):
        return sampling_run(self.scheduler, self.network, noise, STEPS)[-1]

    def ascend(self, reward=projection, estimator=None, noise=None, decode=torch.sigmoid, sample=None, **options):
        names = {field.name for field in dataclasses.fields(AscentSettings)}
        arguments = {"num_guidance_steps": 4, "step_size": 0.2, **options}
        settings = AscentSettings(**{name: value for name, value in arguments.items() if name in names})
        options = {name: value for name, value in options.items() if name not in names and name != "on_run"}
        estimator = AutodiffFisher(self.network) if estimator is None else estimator
        noise = latents(torch.float32, SHAPE) if noise is None else noise
        run = GuidedRun(sample or self.sample, decode, reward, PROMPTS, self.scheduler, estimator, **options)
        return ascend_noise(run, noise, settings, arguments.get("on_run", lambda ascent: None))

    def exact_gradient(self, noise, reward=projection):
        """Returns the exact gradient, by automatic differentiation through the whole run."""
        leaf = noise.clone().requires_grad_()
        value = reward(torch.sigmoid(sampling_run(self.scheduler, self._network, leaf, STEPS)[-1]), PROMPTS).sum()
        return torch.autograd.grad(value, leaf)[0]


def norms(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def scripted(table):
    """Makes a reward that returns the rows of `table` in turn. Its small gradient gives each run another noise."""
    rows = iter(torch.tensor(table))
    return lambda images, prompts: next(rows) + 1e-6 * projection(images, prompts)
