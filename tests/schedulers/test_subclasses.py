"""Classes over the Fisher schedulers behave as Python says; copies, pickles and saved folders restore the class."""

import copy
import pickle

import diffusers
import pytest
import tiny
import torch
from cases import OUTSIDE_CASES, Network, latents, relative, sampling_run

import diffusers_fisher
from diffusers_fisher import AutodiffFisher, DirectFisher, FisherDDIMScheduler, FisherSchedulerMixin, fisher_scheduler
from diffusers_fisher.schedulers import CATALOG

OUTSIDE_NAMES = sorted(
    {case.parent.__name__ for case in OUTSIDE_CASES if f"Fisher{case.parent.__name__}" not in CATALOG}
)


class Counted:
    """A user's mixin: it counts its calls and halves the model output."""

    def step(self, model_output, timestep, sample, *args, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(model_output / 2, timestep, sample, *args, **kwargs)

    def add_noise(self, *args, **kwargs):
        self.noises = getattr(self, "noises", 0) + 1
        return super().add_noise(*args, **kwargs)


class HalvedDDIMScheduler(Counted, diffusers.DDIMScheduler):
    """A user's scheduler."""


def subclass(name, *bases):
    """Makes a class of `bases` with the methods of `Counted` in its body, where `super()` is its parent."""

    class Mine(*bases):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(model_output / 2, timestep, sample, *args, **kwargs)

        def add_noise(self, *args, **kwargs):
            self.noises = getattr(self, "noises", 0) + 1
            return super().add_noise(*args, **kwargs)

    Mine.__name__ = name
    return Mine


OverFisher = subclass("OverFisher", FisherDDIMScheduler)
OverMixin = subclass("OverMixin", FisherSchedulerMixin, diffusers.DDIMScheduler)


class BesideFisher(Counted, FisherDDIMScheduler):
    pass


class MixinLast(HalvedDDIMScheduler, FisherSchedulerMixin):
    pass


class TwiceOver(OverFisher):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


SUBCLASSES = [OverFisher, OverMixin, BesideFisher, MixinLast, TwiceOver, fisher_scheduler(HalvedDDIMScheduler)]


@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("records", [False, True])
def test_a_subclass_runs_its_own_methods_once_per_step(cls, records):
    network, x = Network(), latents()
    expected, scheduler = sampling_run(HalvedDDIMScheduler(), network, x), cls()
    if records:
        with torch.no_grad(), scheduler.differentiable(DirectFisher()) as trajectory:
            samples = sampling_run(scheduler, network, x)
            scheduler.add_noise(x, x, scheduler.timesteps[:1])
        assert len(trajectory.states) == scheduler.steps
        assert trajectory.noised_sample is not None
    else:
        samples = sampling_run(scheduler, network, x)
        scheduler.add_noise(x, x, scheduler.timesteps[:1])
    assert all(torch.equal(a, b) for a, b in zip(samples, expected, strict=True))
    assert (scheduler.steps, scheduler.noises) == (len(scheduler.timesteps), 1)


@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda cls: cls.__name__)
def test_the_whole_of_a_subclasss_step_is_differentiated(cls):
    """The reference is back-propagation through the stock subclass in float64; only rounding differs."""
    network, weight = Network(dtype=torch.float64), latents(torch.float64).flip(-1)
    leaf = latents(torch.float64).requires_grad_()
    (sampling_run(HalvedDDIMScheduler(), network, leaf)[-1] * weight).sum().backward()
    scheduler = cls()
    with torch.no_grad(), scheduler.differentiable(AutodiffFisher(network)) as trajectory:
        last = sampling_run(scheduler, network, leaf.detach())[-1]
    assert relative(trajectory.gradient((last * weight).sum()), leaf.grad) < 1e-10


def test_a_step_that_fails_leaves_the_run_recordable():
    class Failing(FisherDDIMScheduler):
        def step(self, *args, **kwargs):
            raise RuntimeError("once")

    scheduler, x = Failing(), latents()
    scheduler.set_timesteps(4)
    with scheduler.differentiable(DirectFisher()) as trajectory, pytest.raises(RuntimeError, match="once"):
        try:
            scheduler.step(x, scheduler.timesteps[0], x)
        finally:
            assert scheduler._trajectory is trajectory


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
def test_a_class_outside_of_the_catalog_is_found_pickled_saved_and_loaded(name, tmp_path):
    cls = fisher_scheduler(getattr(diffusers, name))
    assert getattr(diffusers_fisher, f"Fisher{name}") is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
    pipe = tiny.stable_diffusion()
    pipe.scheduler = cls.from_config({"steps_offset": 1, "clip_sample": False})
    pipe.save_pretrained(tmp_path)
    loaded_pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded_pipe.scheduler) is cls
    assert type(pickle.loads(pickle.dumps(pipe.scheduler))) is cls


def test_a_scheduler_over_a_users_class_is_pickled_by_that_class():
    scheduler = fisher_scheduler(HalvedDDIMScheduler)(num_train_timesteps=500)
    scheduler.set_timesteps(5)
    for duplicate in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler), copy.copy(scheduler)):
        assert type(duplicate) is type(scheduler)
        assert duplicate.config == scheduler.config
        assert torch.equal(duplicate.timesteps, scheduler.timesteps)


def test_copies_leave_the_running_trajectory_out():
    scheduler = FisherDDIMScheduler()
    with scheduler.differentiable(DirectFisher()) as trajectory:
        for duplicate in (copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert duplicate._trajectory is None
        assert scheduler._trajectory is trajectory


def test_a_misspelt_scheduler_is_not_found():
    with pytest.raises(AttributeError, match="no attribute 'FisherDDlMScheduler'"):
        diffusers_fisher.FisherDDlMScheduler  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'FisherUNet2DModel'"):
        diffusers_fisher.FisherUNet2DModel  # noqa: B018


@pytest.mark.parametrize("name", [*CATALOG, *(f"Fisher{name}" for name in OUTSIDE_NAMES)])
def test_compatible_schedulers_are_those_of_the_parent(name):
    ours = getattr(diffusers_fisher, name)().compatibles
    theirs = getattr(diffusers, name.removeprefix("Fisher"))().compatibles
    assert set(ours) == set(theirs)
