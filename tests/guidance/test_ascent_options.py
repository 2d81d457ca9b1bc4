"""Options of ascents: held-out rewards, early stopping, optimisers of torch.optim, controls."""

import pytest
import torch
from cases import SchedulerCase, latents, relative, sampling_run

from diffusers_fisher import AutodiffFisher, DirectFisher, InputError
from diffusers_fisher.guidance.movers import optimizer_factory, shell_distance

from .ascent_cases import PROMPTS, SHAPE, STEPS, Problem, norms, projection, scripted

# Held-out rewards and reports


def test_held_out_reward_is_recorded_and_never_optimised():
    problem, calls = Problem(), []

    def held_out(images, prompts):
        calls.append((images.requires_grad, torch.is_grad_enabled(), tuple(images.shape), list(prompts)))
        return images.mean((1, 2, 3))

    ascent = problem.ascend(held_out_reward=held_out, num_guidance_steps=3)
    assert calls == [(False, False, SHAPE, PROMPTS)] * 5  # one is the trial
    for row, noise in zip(ascent.held_out_rewards, problem.noises, strict=True):
        assert torch.equal(row, torch.sigmoid(problem.run(noise)).mean((1, 2, 3)).double())
    assert torch.equal(torch.stack(ascent.rewards), torch.stack(Problem().ascend(num_guidance_steps=3).rewards))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [1, 3], ids=["at once", "later"])  # one call is the trial
def test_guidance_goes_on_when_the_held_out_reward_is_not_finite(value, first, caplog):
    problem, calls = Problem(), []

    def held_out(images, prompts):
        calls.append(None)
        values = images.mean((1, 2, 3))
        return values if len(calls) <= first else torch.where(torch.tensor([False, True]), value, values)

    ascent, reference = problem.ascend(held_out_reward=held_out), Problem().ascend()
    assert ascent.status == "completed"
    assert torch.equal(torch.stack(ascent.rewards), torch.stack(reference.rewards))
    assert torch.equal(ascent.best["images"], reference.best["images"])
    rows = torch.stack(ascent.held_out_rewards)
    assert bool(torch.isfinite(rows[:, 0]).all())
    assert torch.isnan(rows[:, 1]).tolist() == [run >= first - 1 for run in range(5)]
    (message,) = caplog.messages
    assert message.startswith(f"The held-out reward 'held_out' is not finite in run {first - 1}: [0.")
    assert message.endswith("Such values are recorded as NaN, here and in later runs; the guidance goes on.")


def test_held_out_reward_of_the_wrong_shape_is_refused_before_sampling():
    problem = Problem()

    def scalar(images, prompts):
        return images.mean()

    with pytest.raises(InputError, match=r"The reward 'scalar' returned shape \(\) for 2 images"):
        problem.ascend(held_out_reward=scalar)
    assert problem.num_calls == 0 and problem.noises == []
    nan_ascent = problem.ascend(held_out_reward=lambda images, prompts: images.mean((1, 2, 3)) * torch.nan)
    assert bool(
        torch.isnan(torch.stack(nan_ascent.held_out_rewards)).all()
    )  # the shape is right, though no value is finite


def test_shell_distance_is_the_distance_of_the_norm_in_standard_deviations():
    """|z| of d standard normal numbers has mean sqrt(d - 1/2) and standard deviation sqrt(1/2)."""
    noise = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    distances = shell_distance(noise)
    assert abs(float(distances.mean())) < 0.06  # four standard errors of 4000 samples
    assert float(distances.std()) == pytest.approx(1, abs=0.05)
    assert float(shell_distance(2 * noise).mean()) == pytest.approx(2**0.5 * 16, rel=0.01)
    problem = Problem()
    ascent = problem.ascend(num_guidance_steps=2)
    for row, noise in zip(ascent.shell_distances, problem.noises, strict=True):
        assert torch.equal(row, shell_distance(noise))


def test_patience_ends_the_ascent_when_no_sample_gains():
    problem = Problem()
    table = [[0.0, 0.0], [1.0, -1.0], [0.5, 1.0], [0.5, 0.5], [0.4, 0.9], [9.0, 9.0]]
    ascent = problem.ascend(scripted(table), num_guidance_steps=5, patience=2)
    assert len(problem.noises) == len(ascent.rewards) == 5  # runs 3 and 4 gave neither sample a new best
    assert ascent.status == "stopped after 2 runs without a new best"
    torch.testing.assert_close(ascent.best_rewards, torch.ones(2).double(), rtol=0, atol=1e-4)  # the slope
    assert Problem().ascend(scripted(table), num_guidance_steps=4, patience=2).status == "completed"  # the last run


# Optimisers of torch.optim


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop"])
def test_optimisers_follow_the_exact_gradient(name):
    problem, start = Problem(), latents(torch.float32, SHAPE)
    ascent = problem.ascend(num_guidance_steps=3, optimizer=optimizer_factory(name, 0.05))
    leaf = torch.nn.Parameter(start.clone())
    by_hand = getattr(torch.optim, name)([leaf], lr=0.05)
    for noise in problem.noises:
        # float32 through products in another order; Adam's first steps have the size of the rate whatever the slope
        torch.testing.assert_close(noise, leaf.detach(), rtol=0, atol=2e-4)
        leaf.grad = -problem.exact_gradient(leaf.detach())
        by_hand.step()
    assert bool((torch.stack(ascent.rewards)[-1] > ascent.rewards[0]).all())
    assert float((ascent.shell_distances[-1] - ascent.shell_distances[0]).abs().max()) > 1e-3  # nothing holds it


def test_samples_do_not_influence_each_other_under_an_optimiser():
    ascent = Problem().ascend(optimizer=optimizer_factory("Adam", 0.05))
    other_problem, sample = Problem(), latents(torch.float32, SHAPE)
    sample[1] = 3.0
    other_ascent = other_problem.ascend(noise=sample, optimizer=optimizer_factory("Adam", 0.05))
    # the same operations on row 0, in float32
    torch.testing.assert_close(
        torch.stack(ascent.rewards)[:, 0], torch.stack(other_ascent.rewards)[:, 0], rtol=1e-5, atol=1e-6
    )


BAD_OPTIMIZERS = {
    "name": ("Adman", "`optimizer` is 'Adman'; allowed: a name in torch.optim"),
    "module": ("lr_scheduler", "`optimizer` is 'lr_scheduler'; allowed: a name"),
    "closure": ("LBFGS", "`optimizer` makes a LBFGS; allowed: a torch.optim.Optimizer whose step needs no closure"),
    "no optimiser": (lambda parameters: parameters, "`optimizer` makes a list; allowed"),
    "fails": (lambda parameters: torch.optim.Adam(parameters, lr=-1), "`optimizer` can't be made: Invalid learning"),
}


@pytest.mark.parametrize("kind", BAD_OPTIMIZERS)
def test_unusable_optimisers_are_refused(kind):
    optimizer, message = BAD_OPTIMIZERS[kind]
    with pytest.raises(InputError, match=message):
        optimizer_factory(optimizer, 0.1)


# A control at every step


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_gradient_of_the_controls_is_that_of_automatic_differentiation(name):
    problem, noise = Problem(name), latents(torch.float32, SHAPE)
    controls = []
    with problem.scheduler.differentiable(AutodiffFisher(problem.network), controls=controls) as trajectory:
        result = problem.run(noise)
    of_noise, of_controls = trajectory.gradients(projection(torch.sigmoid(result), PROMPTS).sum())
    assert len(of_controls) == len(controls) == len(trajectory.states)

    leaves = [torch.zeros(SHAPE).requires_grad_() for _ in controls]
    calls = iter(leaves)
    scheduler = SchedulerCase(name, {})
    stock_scheduler = scheduler.parent(**scheduler.config)
    end = sampling_run(stock_scheduler, lambda x, t: problem._network(x, t) + next(calls), noise, STEPS)[-1]
    expected = torch.autograd.grad(projection(torch.sigmoid(end), PROMPTS).sum(), leaves)
    # float32, the same products in another order
    assert relative(torch.stack(of_controls), torch.stack(expected)) < 1e-5
    assert relative(of_noise, problem.exact_gradient(noise)) < 1e-5


def test_controls_are_added_to_the_models_output():
    problem, noise = Problem(), latents(torch.float32, SHAPE)
    controls = [0.1 * latents(torch.float32, SHAPE, seed).requires_grad_() for seed in range(STEPS)]
    with problem.scheduler.differentiable(DirectFisher(), controls=controls) as trajectory, torch.no_grad():
        result = problem.run(noise)
    case, control_iterator = SchedulerCase("DDIMScheduler", {}), iter(controls)
    stock_scheduler = case.parent(**case.config)
    expected = sampling_run(
        stock_scheduler, lambda x, t: problem._network(x, t) + next(control_iterator), noise, STEPS
    )[-1]
    assert torch.equal(result, expected)
    # What the estimators see is the network's own output, without the control.
    assert torch.equal(trajectory.states[0].model_output, problem._network(noise, stock_scheduler.timesteps[0]))


def test_control_alone_leaves_the_noise_where_it_is():
    problem = Problem()
    ascent = problem.ascend(optimise=["control"], num_guidance_steps=4)
    assert all(torch.equal(noise, problem.noises[0]) for noise in problem.noises)
    assert bool((ascent.rewards[-1] > ascent.rewards[0]).all())
    assert ascent.best["control"].shape == (2, STEPS, *SHAPE[1:])
    first = ascent.gradient_norms[0]
    joint_ascent = Problem().ascend(optimise=["noise", "control"], num_guidance_steps=4)
    of_noise = norms(problem.exact_gradient(problem.noises[0])).double()
    # the joint norm; float32
    assert relative(joint_ascent.gradient_norms[0], torch.hypot(first, of_noise)) < 1e-5
    assert not torch.equal(joint_ascent.best["noise"], problem.noises[0])
