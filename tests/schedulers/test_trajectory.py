"""The rules of a `differentiable` block: its errors, the changes that it follows, and that it leaves no trace."""

import diffusers
import pytest
import torch
from cases import (
    CASES,
    OUTSIDE_CASES,
    STABLE_DIFFUSION,
    Network,
    SchedulerCase,
    latents,
    relative,
    sampling_run,
)

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FisherDDIMScheduler,
    FisherDDPMScheduler,
    FisherEulerDiscreteScheduler,
    InputError,
    NumericalError,
    TrajectoryError,
    UnsupportedError,
    fisher_scheduler,
)

FIRST_CASES = list({case.name: case for case in reversed(CASES + OUTSIDE_CASES)}.values())


def ddim(**changes):
    return FisherDDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **changes})


def recorded_run(scheduler=None, estimator=None, dtype=torch.float64, mode="refuse", network=None, **options):
    """Runs the test network in a recorded run, and returns the trajectory and the result."""
    scheduler, estimator = scheduler or ddim(), estimator or DirectFisher()
    with torch.no_grad(), scheduler.differentiable(estimator, changed_latents=mode) as trajectory:
        result = sampling_run(scheduler, network or Network(dtype=dtype), latents(dtype), **options)[-1]
    return trajectory, result


def graphs_in(value):
    """Returns every tensor with a graph in a scheduler's attributes."""
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for entry in value for tensor in graphs_in(entry)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("case", FIRST_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("raises", [False, True], ids=["finished", "raised"])
def test_scheduler_keeps_no_graph_and_no_trajectory(case, raises):
    scheduler, error = fisher_scheduler(case.parent)(**case.config), KeyError("from a callback")

    def between(index, sample):
        if raises and index == 3:
            raise error
        return sample

    try:
        recorded_run(scheduler, between=between)
    except KeyError as raised_error:
        assert raises
        assert raised_error is error
    assert scheduler._trajectory is None
    assert graphs_in(vars(scheduler)) == []
    assert bool(torch.isfinite(sampling_run(scheduler, Network(), latents())[-1]).all())


def test_blocks_do_not_nest_and_the_outer_one_goes_on():
    scheduler = ddim()
    with torch.no_grad(), scheduler.differentiable(DirectFisher()) as trajectory:
        with (
            pytest.raises(TrajectoryError, match=r"already inside a `differentiable` block\. Blocks can't be nested"),
            scheduler.differentiable(DirectFisher()),
        ):
            raise AssertionError("the inner block was entered")
        result = sampling_run(scheduler, Network(), latents())[-1]
    other_trajectory, other_result = recorded_run()
    assert torch.equal(trajectory.gradient(result.sum()), other_trajectory.gradient(other_result.sum()))


def test_inference_mode_is_refused():
    scheduler = ddim()
    with (
        pytest.raises(TrajectoryError, match=r"can't record under torch.inference_mode.* use torch.no_grad instead"),
        torch.inference_mode(),
        scheduler.differentiable(DirectFisher()),
    ):
        sampling_run(scheduler, Network(), latents())


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        x = latents()
    scheduler = ddim()
    scheduler.set_timesteps(4)
    with (
        pytest.raises(TrajectoryError, match=r"can't record under torch.inference_mode"),
        torch.no_grad(),
        scheduler.differentiable(DirectFisher()),
    ):
        scheduler.step(x.clone(), 750, x)


def test_learned_variance_that_the_scheduler_does_not_use_is_refused():
    scheduler = FisherDDPMScheduler(variance_type="fixed_small")
    with (
        pytest.raises(
            TrajectoryError, match=r"shape \(2, 6, 2, 2\), the sample \(2, 3, 2, 2\): models with learned var"
        ),
        torch.no_grad(),
        scheduler.differentiable(DirectFisher()),
    ):
        sampling_run(scheduler, lambda x, t: torch.cat([x, x], dim=1), latents())


def test_unknown_scheduler_is_refused_inside_the_run():
    scheduler = fisher_scheduler(diffusers.CMStochasticIterativeScheduler)()
    with pytest.raises(UnsupportedError, match="Noise levels of FisherCMStochasticIterativeScheduler are not known"):
        recorded_run(scheduler)


def test_bad_estimator_is_refused():
    with pytest.raises(
        InputError, match=r"`estimator` is 'direct' \(str\); allowed: a Fisher estimator such as DirectFisher\(\)"
    ):
        ddim().differentiable("direct")


def test_bad_mode_is_refused():
    with pytest.raises(InputError, match="`changed_latents` is 'follow'; allowed: refuse, additive"):
        ddim().differentiable(DirectFisher(), changed_latents="follow")


CHANGES = {
    "added to": lambda index, sample: sample + 0.1,
    "scaled": lambda index, sample: 0.5 * sample,
    "blended": lambda index, sample: torch.where(sample > 0, sample, 0.0),
    "added to in place": lambda index, sample: sample.add_(0.1),
    "of another shape": lambda index, sample: sample[:1],
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_changed_latents_are_refused(name, dtype):
    with pytest.raises(TrajectoryError, match=r"Step 1 received other latents than step 0.*latents='additive'"):
        recorded_run(dtype=dtype, between=CHANGES[name])


@pytest.mark.parametrize("mode", ["refuse", "additive"])
def test_second_run_in_one_block_is_refused(mode):
    scheduler = ddim()
    with (
        pytest.raises(TrajectoryError, match="One `differentiable` block holds one run"),
        torch.no_grad(),
        scheduler.differentiable(DirectFisher(), changed_latents=mode),
    ):
        sampling_run(scheduler, Network(), latents())
        sampling_run(scheduler, Network(), latents(seed=2))


@pytest.mark.parametrize("mode", ["refuse", "additive"])
def test_equal_copies_of_the_latents_are_followed(mode):
    trajectory, result = recorded_run(
        mode=mode, between=lambda index, sample: sample if index == 5 else sample.clone()
    )
    other_trajectory, other_result = recorded_run()
    assert torch.equal(result, other_result)
    assert torch.equal(trajectory.gradient(result.sum()), other_trajectory.gradient(other_result.sum()))


ADDITIVE = ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete")


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in ADDITIVE])
def test_additive_changes_are_followed_with_the_gradient_of_back_propagation(name):
    case, network, weight = SchedulerCase(name, {}), Network(), latents(seed=5)

    def between(index, sample):
        return sample + 0.3 * latents(seed=100 + index)

    leaf = latents().requires_grad_()
    reference = sampling_run(case.parent(**case.config), network, leaf, between=between)[-1]
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    scheduler = fisher_scheduler(case.parent)(**case.config)
    trajectory, result = recorded_run(scheduler, AutodiffFisher(network), mode="additive", between=between)
    # returned + (incoming - returned) rounds once more than incoming
    torch.testing.assert_close(result.detach(), reference.detach(), rtol=1e-12, atol=1e-12)
    # What was added after the last step lies outside the graph and is constant.
    gradient = trajectory.gradient((weight * trajectory.final_sample).sum())
    assert relative(gradient, exact) < 1e-10


def test_no_recorded_step_has_no_gradient():
    scheduler = ddim()
    with scheduler.differentiable(DirectFisher()) as trajectory:
        pass
    with pytest.raises(TrajectoryError, match="No step was recorded: run the pipeline inside the"):
        trajectory.gradient(torch.ones((), requires_grad=True))
    with pytest.raises(TrajectoryError, match=r"The run has no steps yet\. Call `operator` after the pipeline"):
        trajectory.operator(0)


@pytest.mark.parametrize(
    ("loss", "description"),
    [
        (lambda result: result.detach().sum(), r"a tensor of shape \(\) with requires_grad=False"),
        (lambda result: result, r"a tensor of shape \(2, 3, 2, 2\) with requires_grad=True"),
        (lambda result: float(result.detach().sum()), "a float"),
    ],
    ids=["without a graph", "not a scalar", "a number"],
)
def test_loss_must_be_a_scalar_with_a_graph(loss, description):
    trajectory, result = recorded_run()
    with pytest.raises(TrajectoryError, match=f"scalar tensor that depends on the run's result, got {description}"):
        trajectory.gradient(loss(result))


def test_loss_of_something_else_is_refused():
    trajectory, _ = recorded_run()
    with pytest.raises(TrajectoryError, match="The loss does not depend on this run's result"):
        trajectory.gradient(torch.ones(3, requires_grad=True).sum())


def test_gradient_that_overflows_is_refused_with_what_to_do():
    def network(x, t):
        return x - 3.0  # far from the endpoint's direction, so that the uncentred form has large eigenvalues

    trajectory, result = recorded_run(estimator=EndpointFisher(), dtype=torch.float32, network=network, num_steps=100)
    with pytest.raises(NumericalError, match=r"through 100 steps is not finite with EndpointFisher.* use fewer steps"):
        trajectory.gradient(result.sum())


def test_initial_noise_scale_is_part_of_the_gradient():
    scheduler = FisherEulerDiscreteScheduler(**STABLE_DIFFUSION)
    trajectory, result = recorded_run(scheduler)
    (leaf,) = torch.autograd.grad(result.sum(), trajectory.initial_sample, retain_graph=True)
    scale = float(scheduler.init_noise_sigma)
    assert scale > 10
    assert torch.equal(trajectory.gradient(result.sum()), scale * leaf)


@pytest.mark.parametrize("return_dict", [True, False])
def test_step_returns_what_the_parents_does(return_dict):
    network, x = Network(), latents()
    ours, parent = ddim(), diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    for scheduler in (ours, parent):
        scheduler.set_timesteps(4)
    with torch.no_grad(), ours.differentiable(DirectFisher()):
        result = ours.step(network(x, 750), 750, sample=x, eta=0.5, variance_noise=x, return_dict=return_dict)
    expected = parent.step(network(x, 750), 750, sample=x, eta=0.5, variance_noise=x, return_dict=return_dict)
    assert type(result) is type(expected)
    values = result if isinstance(result, tuple) else result.to_tuple()
    targets = expected if isinstance(expected, tuple) else expected.to_tuple()
    assert all(torch.equal(value, target) for value, target in zip(values, targets, strict=True))
    assert values[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_latents_get_the_gradient_of_a_float32_chain(dtype):
    """DDIM steps with a constant output do not depend on the sample, so the float32 gradient is the reference."""
    weight = latents(seed=5).to(dtype)
    reference, full = recorded_run(dtype=torch.float32, num_steps=50)
    exact = reference.gradient((weight.float() * full).sum())
    trajectory, result = recorded_run(dtype=dtype, num_steps=50)
    assert result.dtype is dtype
    gradient = trajectory.gradient((weight * result).sum(), retain_graph=True)
    assert gradient.dtype is torch.float32
    assert relative(gradient, exact) < 1e-6  # float32 roundings of 50 steps; a chain in half precision is 1e-3 off
    tiny = trajectory.gradient(1e-7 * (weight.float() * trajectory.final_sample).sum())
    assert relative(tiny, 1e-7 * exact) < 1e-6  # below float16's smallest normal number


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_half_precision_denoisers_come_near_the_float32_gradient(name, dtype, tolerance):
    case, gradients = SchedulerCase(name, {}), []
    for kind in (torch.float32, dtype):
        network = Network(dtype=kind)

        def denoiser(x, t, network=network, kind=kind):
            return network(x.to(kind), t)

        trajectory, _ = recorded_run(fisher_scheduler(case.parent)(**case.config), AutodiffFisher(denoiser), kind)
        gradients.append(trajectory.gradient((latents(torch.float32, seed=5) * trajectory.final_sample).sum()))
    # Each step's output is rounded to eleven or eight bits, and the Jacobian is taken at that other point.
    assert relative(gradients[1], gradients[0]) < tolerance


def test_thresholding_works_on_half_precision_latents():
    changes = {"thresholding": True, "sample_max_value": 3.0}
    reference, full = recorded_run(ddim(**changes), dtype=torch.float32)
    trajectory, result = recorded_run(ddim(**changes), dtype=torch.float16)
    gradient = trajectory.gradient(result.float().sum())
    assert relative(gradient, reference.gradient(full.sum())) < 0.05  # which entries are clamped depends on roundings


def test_denoiser_runs_without_a_graph_and_backward_under_the_runs_autocast():
    network, modes = Network(dtype=torch.float32), []

    def record_mode(x, t):
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return network(x, t)

    scheduler, x = ddim(), latents(torch.float32)
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        scheduler.differentiable(AutodiffFisher(record_mode)) as trajectory,
    ):
        result = sampling_run(scheduler, record_mode, x)[-1]
    assert modes == [(False, True)] * 6
    trajectory.gradient(result.float().sum())
    assert modes[6:] == [(True, True)] * 6
    assert not torch.is_autocast_enabled("cpu")
