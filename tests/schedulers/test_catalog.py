"""Outside a `differentiable` block every Fisher scheduler is its parent, bit for bit."""

import inspect
import json
import pickle

import diffusers
import pytest
import torch
from cases import CASES, CHURNED_CASES, OUTSIDE_CASES, PREDICTION_TYPES, Network, latents, sampling_run

import diffusers_fisher
from diffusers_fisher import DirectFisher, FisherSchedulerMixin, UnsupportedError, fisher_scheduler
from diffusers_fisher.schedulers import CATALOG

ALL_CASES = CASES + CHURNED_CASES + OUTSIDE_CASES
FIRST_CASES = {case.name: case for case in reversed(ALL_CASES) if not case.step}  # one case per scheduler


def assert_same_runs(scheduler, parent, case):
    for dtype in (torch.float32, torch.float16):
        network, x = Network(dtype=dtype), latents(dtype)
        ours = sampling_run(scheduler, network, x, **case.step)
        theirs = sampling_run(parent, network, x, **case.step)
        assert len(ours) == len(theirs) >= 6
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_run_without_recording_is_the_parents_bit_for_bit(case):
    assert_same_runs(fisher_scheduler(case.parent)(**case.config), case.parent(**case.config), case)


@pytest.mark.parametrize("case", FIRST_CASES.values(), ids=str)
def test_run_after_a_recorded_one_is_the_parents_bit_for_bit(case):
    scheduler = fisher_scheduler(case.parent)(**case.config)
    with torch.no_grad(), scheduler.differentiable(DirectFisher()):
        sampling_run(scheduler, Network(), latents())
    assert_same_runs(scheduler, case.parent(**case.config), case)


def test_table_covers_the_catalog():
    assert {f"Fisher{name}" for name in PREDICTION_TYPES} == set(CATALOG)


@pytest.mark.parametrize("name", CATALOG)
def test_class_is_public_picklable_and_named_after_its_parent(name):
    cls = CATALOG[name]
    assert cls.__name__ == name
    assert getattr(diffusers_fisher, name) is cls
    assert cls.__module__ == "diffusers_fisher"
    parent = getattr(diffusers, name.removeprefix("Fisher"))
    assert cls.__mro__[1:3] == (FisherSchedulerMixin, parent)
    assert pickle.loads(pickle.dumps(cls)) is cls


@pytest.mark.parametrize("name", FIRST_CASES)
def test_signatures_are_the_parents(name):
    """Pipelines pass `generator`, `eta`, `sigmas` and `mu` only where the signature has them."""
    parent = getattr(diffusers, name)
    cls = fisher_scheduler(parent)
    for method in ("__init__", "step", "set_timesteps"):
        assert inspect.signature(getattr(cls, method)) == inspect.signature(getattr(parent, method))


def comparable(scheduler):
    return {key: value for key, value in scheduler.config.items() if key not in ("_class_name", "_use_default_values")}


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_config_makes_the_parent_and_the_fisher_scheduler(case):
    cls, parent = fisher_scheduler(case.parent), case.parent(**case.config)
    ours = cls.from_config(parent.config)
    back = case.parent.from_config(ours.config)
    assert type(ours) is cls
    assert type(back) is case.parent
    assert comparable(ours) == comparable(back) == comparable(parent) == comparable(cls(**case.config))
    assert_same_runs(ours, back, case)


@pytest.mark.parametrize("case", FIRST_CASES.values(), ids=str)
def test_saved_folders_are_read_both_ways(case, tmp_path):
    cls, parent = fisher_scheduler(case.parent), case.parent(**case.config)
    cls(**case.config).save_pretrained(tmp_path / "ours")
    parent.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())["_class_name"] == cls.__name__
    for folder in ("ours", "theirs"):
        for kind in (cls, case.parent):
            result = kind.from_pretrained(tmp_path / folder)
            assert type(result) is kind
            assert comparable(result) == comparable(parent)


def test_prediction_type_survives_the_way_to_another_scheduler():
    pipe_scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    ours = CATALOG["FisherDPMSolverMultistepScheduler"].from_config(pipe_scheduler.config)
    assert (ours.config.prediction_type, ours.config.beta_schedule) == ("v_prediction", "scaled_linear")


@pytest.mark.parametrize("name", FIRST_CASES)
def test_fisher_scheduler_finds_the_catalogs_class_and_is_idempotent(name):
    parent = getattr(diffusers, name)
    cls = fisher_scheduler(parent)
    assert cls is CATALOG.get(f"Fisher{name}", cls)
    assert issubclass(cls, parent)
    assert fisher_scheduler(cls) is cls
    assert fisher_scheduler(parent) is cls


def test_subclass_of_a_catalog_scheduler_keeps_its_own_step():
    class HalvedDDIMScheduler(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output / 2, timestep, sample, **kwargs)

    cls = fisher_scheduler(HalvedDDIMScheduler)
    assert cls.__name__ == "FisherHalvedDDIMScheduler"
    scheduler, parent, x = cls(), HalvedDDIMScheduler(), latents()
    for each in (scheduler, parent):
        each.set_timesteps(4)
    expected = parent.step(x, 750, x).prev_sample
    assert torch.equal(scheduler.step(x, 750, x).prev_sample, expected)
    with torch.no_grad(), scheduler.differentiable(DirectFisher()):
        assert torch.equal(scheduler.step(x, 750, x).prev_sample, expected)


@pytest.mark.parametrize("value", [diffusers.DDIMScheduler(), torch.nn.Module, "DDIMScheduler", None], ids=type)
def test_objects_that_are_no_scheduler_classes_are_refused(value):
    with pytest.raises(UnsupportedError, match=r"(?s)takes a diffusers scheduler class, got .*Pass the class"):
        fisher_scheduler(value)
