"""Ascent on the initial noise: its results, what it keeps and counts, and what it refuses."""

import pytest
import torch
from cases import latents, relative

from diffusers_fisher import DirectFisher, InputError, NumericalError, TrajectoryError, WeightedReward
from diffusers_fisher.guidance.checks import check_differentiable, checked_reward

from .ascent_cases import PROMPTS, SHAPE, STEPS, Problem, norms, projection, scripted


@pytest.mark.parametrize("estimator", [None, DirectFisher()], ids=["autodiff", "direct"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_every_samples_reward_goes_up(name, estimator):
    ascent = Problem(name).ascend(estimator=estimator)
    rewards = torch.stack(ascent.rewards)
    assert bool((rewards[1:] > rewards[0]).all())
    assert torch.equal(ascent.best_rewards, rewards.max(0).values)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_first_step_follows_the_exact_gradient_on_the_noises_sphere(name):
    problem = Problem(name)
    start = latents(torch.float32, SHAPE)
    ascent = problem.ascend(num_guidance_steps=1, step_size=0.3)
    gradient = problem.exact_gradient(start)
    # float32, the same products in another order through five steps: measured 3e-7.
    assert relative(ascent.gradient_norms[0], norms(gradient)) < 1e-5
    length = norms(start)[:, None, None, None]
    target = start + 0.3 * length * gradient / norms(gradient)[:, None, None, None]
    expected = target * length / norms(target)[:, None, None, None]
    assert relative(problem.noises[1] - start, expected - start) < 1e-5
    assert torch.equal(problem.noises[0], start)


def test_steps_stay_on_each_samples_own_sphere():
    problem, start = Problem(), latents(torch.float32, SHAPE)
    start[1] *= 3
    problem.ascend(noise=start, num_guidance_steps=6)
    for noise in problem.noises:
        torch.testing.assert_close(norms(noise), norms(start), rtol=1e-6, atol=0)  # float32 rounding of a quotient
    assert all(
        relative(after, before) > 0.05 for before, after in zip(problem.noises, problem.noises[1:], strict=False)
    )


def test_step_is_halved_for_each_sample_without_a_new_best_reward():
    problem = Problem()
    table = [[0.0, 0.0], [1.0, -1.0], [2.0, 3.0], [3.0, 3.0 - 1e-3], [4.0, 5.0]]
    problem.ascend(reward=scripted(table), num_guidance_steps=4, step_size=0.2)
    lengths = [[0.2, 0.2], [0.2, 0.1], [0.2, 0.1], [0.2, 0.05]]  # the best of sample 1 are runs 0, 2 and 4
    size = norms(problem.noises[0])[:, None, None, None]
    for length, noise, next_noise in zip(lengths, problem.noises, problem.noises[1:], strict=False):
        gradient = problem.exact_gradient(noise)
        step = torch.tensor(length)[:, None, None, None] * size
        target = noise + step * gradient / norms(gradient)[:, None, None, None]
        expected = target * size / norms(target)[:, None, None, None]
        assert relative(next_noise - noise, expected - noise) < 1e-4  # float32, and the direction of a tiny gradient


def test_best_is_kept_sample_by_sample():
    problem = Problem()
    ascent = problem.ascend(scripted([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [2.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(ascent.best_rewards, torch.tensor([3.0, 2.0]).double(), rtol=0, atol=1e-4)  # the slope
    assert torch.equal(ascent.best["noise"], torch.stack([problem.noises[2][0], problem.noises[1][1]]))
    images = [torch.sigmoid(problem.run(noise)) for noise in problem.noises[:3]]
    assert torch.equal(ascent.best["images"], torch.stack([images[2][0], images[1][1]]))


def test_first_of_equal_rewards_is_kept():
    problem = Problem()

    def constant(images, prompts):
        values = projection(images, prompts)
        return 1 + (values - values.detach())  # the gradient is not zero

    ascent = problem.ascend(constant)
    assert torch.equal(ascent.best["noise"], problem.noises[0])
    assert not torch.equal(problem.noises[1], problem.noises[0])


def test_history_and_call_counts():
    problem, reports, calls = Problem(), [], []

    def reward(images, prompts):
        calls.append((tuple(images.shape), list(prompts), images.requires_grad))
        return projection(images, prompts)

    ascent = problem.ascend(reward, num_guidance_steps=3, on_run=lambda ascent: reports.append(ascent.rewards[-1]))
    assert [tuple(row.shape) for row in ascent.rewards] == [(2,)] * 4
    assert [tuple(row.shape) for row in ascent.gradient_norms] == [(2,)] * 3
    assert {row.dtype for row in [*ascent.rewards, *ascent.gradient_norms, ascent.best_rewards]} == {torch.float64}
    assert len(ascent.seconds) == 4
    assert min(ascent.seconds) > 0
    assert all(torch.equal(row, report) for row, report in zip(ascent.rewards, reports, strict=True))
    assert calls == [(SHAPE, PROMPTS, True)] * 3 + [(SHAPE, PROMPTS, False)]  # no gradient of the last run
    assert ascent.num_sampling_calls == 4 * STEPS
    assert problem.num_calls == 4 * STEPS + 3 * STEPS  # the estimator makes one call per step of each backward pass
    for row, noise in zip(ascent.rewards, problem.noises, strict=True):
        assert torch.equal(row, projection(torch.sigmoid(problem.run(noise)), PROMPTS).double())


def test_direct_estimator_calls_the_network_for_sampling_only():
    problem = Problem()
    ascent = problem.ascend(estimator=DirectFisher(), num_guidance_steps=3)
    assert problem.num_calls == ascent.num_sampling_calls == 4 * STEPS


def test_without_guidance_steps_the_run_is_sampled_and_scored():
    problem = Problem()
    ascent = problem.ascend(lambda images, prompts: images.detach().sum((1, 2, 3)), num_guidance_steps=0)
    assert len(problem.noises) == len(ascent.rewards) == len(ascent.seconds) == 1
    assert ascent.gradient_norms == []
    assert torch.equal(ascent.best["noise"], problem.noises[0])
    assert torch.equal(ascent.best_rewards, ascent.rewards[0])


def test_sample_with_zero_gradient_does_not_move(caplog):
    problem = Problem()

    def second_only(images, prompts):
        return projection(images, prompts) * torch.tensor([0.0, 1.0])

    ascent = problem.ascend(second_only, num_guidance_steps=2)
    for noise in problem.noises[1:]:
        assert torch.equal(noise[0], problem.noises[0][0])
        assert not torch.equal(noise[1], problem.noises[0][1])
    assert torch.stack(ascent.gradient_norms)[:, 0].tolist() == [0.0, 0.0]
    (warning,) = caplog.records  # only the first run warns
    assert warning.getMessage().startswith(
        "The gradient of the reward 'second_only' is zero for samples [0], which do"
    )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_size_of_the_gradient_does_not_matter(scale):
    """The squares of such gradients are zero or infinite in float32."""
    reference_problem, problem = Problem(), Problem()
    reference = reference_problem.ascend(num_guidance_steps=1)
    ascent = problem.ascend(lambda images, prompts: scale * projection(images, prompts), num_guidance_steps=1)
    assert relative(problem.noises[1], reference_problem.noises[1]) < 1e-6  # float32 rounding
    assert relative(ascent.gradient_norms[0] / scale, reference.gradient_norms[0]) < 1e-5


def test_noise_and_grad_mode_of_the_caller_do_not_change():
    noise = latents(torch.float32, SHAPE)
    with torch.no_grad():
        ascent = Problem().ascend(noise=noise)
        assert not torch.is_grad_enabled()
    assert torch.equal(noise, latents(torch.float32, SHAPE))
    tensors = [ascent.best["images"], ascent.best["noise"], *ascent.rewards, *ascent.gradient_norms]
    assert not any(tensor.requires_grad for tensor in tensors)


# What is refused


BAD_VALUES = {
    "one number": (lambda images: images.mean(), r"returned shape \(\) for 2 images"),
    "a column": (lambda images: images.mean((1, 2, 3))[:, None], r"returned shape \(2, 1\) for 2 images"),
    "too many": (lambda images: images.mean((1, 2, 3)).repeat(2), r"returned shape \(4,\) for 2 images"),
    "a float": (lambda images: images.mean().item(), "returned a float for 2 images"),
    "a list": (lambda images: images.mean((1, 2, 3)).tolist(), "returned a list for 2 images"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("entry", ["checked_reward", "check_differentiable", "ascend_noise"])
def test_reward_of_the_wrong_kind(kind, entry):
    value, message = BAD_VALUES[kind]

    def score(images, prompts):
        return value(images)

    with pytest.raises(InputError, match=f"The reward 'score' {message}; it must return a tensor of shape .2,."):
        if entry == "checked_reward":
            checked_reward(score, torch.rand(SHAPE), PROMPTS)
        elif entry == "check_differentiable":
            check_differentiable(score, SHAPE, PROMPTS, torch.device("cpu"))
        else:
            Problem().ascend(score)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_reward_that_is_not_finite_at_first_is_refused(value):
    problem = Problem()
    with pytest.raises(NumericalError, match=rf"The reward '<lambda>' is not finite: \[0.4\d*, {value}\]"):
        problem.ascend(scripted([[0.5, value]]))
    assert len(problem.noises) == 1


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("run", [1, 2, 4])
def test_reward_that_is_not_finite_later_stops_with_the_best_so_far(value, run, caplog):
    problem = Problem()
    table = [[0.5, float(row)] for row in range(5)]
    table[run][1] = value
    ascent = problem.ascend(scripted(table))
    assert len(problem.noises) == run + 1
    assert len(ascent.rewards) == len(ascent.gradient_norms) == len(ascent.seconds) == run
    assert float(ascent.best_rewards[1]) == pytest.approx(run - 1, abs=1e-4)  # the slope
    assert torch.equal(ascent.best["noise"][1], problem.noises[run - 1][1])
    assert ascent.status.startswith(f"stopped in run {run}: The reward '<lambda>' is not finite: [0.")
    assert [record.getMessage() for record in caplog.records] == [
        f"Guidance {ascent.status} The best so far is returned."
    ]


def test_gradient_that_is_not_finite_later_stops_with_that_runs_reward():
    problem = Problem()

    def reward(images, prompts):
        values = projection(images, prompts)
        infinite_slope = (images - images.detach()).sum((1, 2, 3)).abs().sqrt()  # 0, with an infinite slope
        return values + (infinite_slope if len(problem.noises) == 3 else 0)

    ascent = problem.ascend(reward)
    assert (len(ascent.rewards), len(ascent.gradient_norms), len(ascent.seconds)) == (3, 2, 3)
    words = "stopped in run 2: The gradient of the reward 'reward' with respect to the images of run 2 is not finite"
    assert ascent.status.startswith(words)
    assert torch.equal(ascent.best_rewards, torch.stack(ascent.rewards).max(0).values)


class Judge:
    def __init__(self, error):
        self.calls, self.error = 0, error

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return projection(images, prompts)


@pytest.mark.parametrize("error", [ZeroDivisionError("no judge"), KeyboardInterrupt()], ids=type)
def test_rewards_own_exception_comes_through_and_the_scheduler_can_be_used_again(error):
    problem = Problem()
    with pytest.raises(type(error)) as raised_error:
        problem.ascend(Judge(error))
    assert raised_error.value is error
    assert len(problem.noises) == 3
    assert torch.equal(problem.ascend().best_rewards, Problem().ascend().best_rewards)


def test_gradient_that_is_not_finite_in_the_first_run_returns_that_run():
    def root(images, prompts):
        return (images - images.detach()).sum((1, 2, 3)).sqrt()  # 0, with an infinite slope

    problem = Problem()
    ascent = problem.ascend(root)
    words = "stopped in run 0: The gradient of the reward 'root' with respect to the images of run 0 is not finite"
    assert ascent.status.startswith(words)
    assert (len(ascent.rewards), len(ascent.gradient_norms), len(ascent.seconds)) == (1, 0, 1)
    assert torch.equal(ascent.best["noise"], problem.noises[0])


def test_images_that_are_not_finite():
    def overflow(latents):
        return torch.where(latents == latents.max(), torch.nan, latents)

    with pytest.raises(NumericalError, match=r"The images of run 0 are not finite; their latents are, up to"):
        Problem().ascend(lambda images, prompts: torch.zeros(2), decode=overflow)


def test_reward_that_loses_its_graph_in_a_later_run_is_refused():
    def score(images, prompts):
        values = projection(images, prompts)
        return values if len(problem.noises) < 2 else values.detach()

    problem = Problem()
    with pytest.raises(InputError, match="The reward 'score' is not differentiable with respect to the images"):
        problem.ascend(score)
    assert len(problem.noises) == 2


def test_latents_replaced_after_the_last_step():
    problem = Problem()
    with pytest.raises(TrajectoryError, match="In run 0, something replaced the latents after the scheduler's last"):
        problem.ascend(sample=lambda noise: problem.run(noise).detach() + 1)


def test_noise_that_is_all_zero_is_refused():
    problem, noise = Problem(), latents(torch.float32, SHAPE)
    noise[1] = 0
    with pytest.raises(InputError, match="A sample of the initial noise is all zero"):
        problem.ascend(noise=noise)
    assert problem.noises == []
    assert problem.ascend(noise=noise, num_guidance_steps=0).rewards[0].shape == (2,)


# The trial before sampling


def contrast(images, prompts):
    """Returns rewards that are finite only for images of more than one colour."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return -centred.square().mean((1, 2, 3)).log()


@pytest.mark.parametrize("reward", [projection, contrast])
@pytest.mark.parametrize("grad", [True, False], ids=["enable_grad", "no_grad"])
def test_trial_passes_differentiable_rewards(reward, grad):
    with torch.set_grad_enabled(grad):
        check_differentiable(reward, SHAPE, PROMPTS, torch.device("cpu"))
        assert torch.is_grad_enabled() is grad


def test_trial_gives_the_reward_images_in_range_and_all_prompts():
    calls = []

    def reward(images, prompts):
        calls.append((images.detach(), prompts))
        return projection(images, prompts)

    check_differentiable(reward, SHAPE, PROMPTS, torch.device("cpu"))
    ((images, prompts),) = calls
    assert (images.shape, images.dtype, prompts) == (SHAPE, torch.float32, PROMPTS)
    assert 0 < float(images.min()) < float(images.max()) < 1


SCALE = torch.nn.Parameter(torch.ones(2))
DETACHED_REWARDS = {
    "detach": lambda images: images.detach().mean((1, 2, 3)),
    "numpy": lambda images: torch.from_numpy(images.detach().numpy().mean((1, 2, 3))),
    "item": lambda images: torch.tensor([image.mean().item() for image in images]),
    "argmax": lambda images: images.flatten(1).argmax(1).float(),
    "no_grad": torch.no_grad()(lambda images: images.mean((1, 2, 3))),
    "constant": lambda images: torch.zeros(2),
    "graph to parameters alone": lambda images: SCALE * images.detach().mean((1, 2, 3)),
}


@pytest.mark.parametrize("kind", DETACHED_REWARDS)
def test_trial_refuses_rewards_whose_graph_is_cut(kind):
    def score(images, prompts):
        return DETACHED_REWARDS[kind](images)

    message = (
        r"The reward 'score' is not differentiable .* go through PIL or numpy, `.item\(\)`, `.detach\(\)`, argmax"
    )
    with pytest.raises(InputError, match=message):
        check_differentiable(score, SHAPE, PROMPTS, torch.device("cpu"))
    assert SCALE.grad is None
    with pytest.raises(InputError, match=message):  # whatever other terms have a graph
        check_differentiable(WeightedReward((1.0, projection), (10.0, score)), SHAPE, PROMPTS, torch.device("cpu"))


def test_messages_name_a_class_whose_object_is_the_reward():
    class Aesthetics:
        def __call__(self, images, prompts):
            return torch.zeros(2)

    with pytest.raises(InputError, match="The reward 'Aesthetics' is not differentiable"):
        check_differentiable(Aesthetics(), SHAPE, PROMPTS, torch.device("cpu"))


def test_error_names_inference_mode_and_not_the_reward():
    calls = []
    with (
        torch.inference_mode(),
        pytest.raises(TrajectoryError, match=r"which torch.inference_mode forbids .* use torch.no_grad instead"),
    ):
        check_differentiable(lambda *arguments: calls.append(arguments), SHAPE, PROMPTS, torch.device("cpu"))
    assert calls == []
