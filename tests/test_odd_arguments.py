"""A seeded table of odd values for the public functions: each is used, or refused in the package's own words."""

import contextlib
import random
import warnings

import numpy
import tiny
import torch
from PIL import Image

import diffusers_fisher as df
from diffusers_fisher.fisher import estimate
from diffusers_fisher.likelihood.squared_error import squared_error_log_likelihood

SEED, VALUES_PER_ARGUMENT = 0, 6
NAN = float("nan")


OWN_ERRORS = {
    "AutodiffFisher(denoiser)", "FiniteDifferenceFisher(denoiser)", "MeasurementReward(operator)",
    "guide(callback_on_guidance_step)",
}  # fmt: skip
"""Arguments that are functions of the user: such a function's own errors come through as they are."""


class Empty:
    pass


ODD = {
    "None": None, "no text": "", "text": "x", "bytes": b"x", "True": True, "0": 0, "-1": -1, "3": 3, "2.0": 2.0,
    "half": 0.5, "NaN": NAN, "infinity": float("inf"), "a huge number": 10**12, "beyond floats": 10**400,
    "a NumPy integer": numpy.int64(2), "a NumPy float": numpy.float32(0.5), "a NumPy truth": numpy.bool_(False),
    "complex": 1j, "no entries": [], "[1]": [1], "mixed list": ["a", 3], "three numbers": (1, 2, 3), "{}": {},
    "a mapping": {"a": 1}, "a set": {"a"}, "an object": Empty(), "a class": Empty, "a kind": df.DirectFisher,
    "a function": len, "a tensor's number": torch.tensor(3), "integers": torch.zeros(2, dtype=torch.int64),
    "complex numbers": torch.zeros(1, 4, 8, 8, dtype=torch.complex64), "a half": torch.zeros(1, 4, 8, 8).half(),
    "NaN tensor": torch.full((1, 4, 8, 8), NAN), "another shape": torch.zeros(2, 3), "empty": torch.zeros(0),
    "an array": numpy.zeros((1, 4, 8, 8)), "a dtype": torch.float16, "text list": ["a", "b", "c"],
    "a generator": torch.Generator(), "two generators": [torch.Generator(), torch.Generator()],
    "a Python generator": (number for number in (1, 2)), "an estimator": df.DirectFisher(), "range": range(2),
    "picture": Image.new("L", (3, 5)),
}  # fmt: skip


def seeded():
    return torch.Generator().manual_seed(0)


def bright(images, prompts):
    return images.mean((1, 2, 3))


def guide_step_by_step(pipe, reward=bright, **arguments):
    with df.posterior_guidance(pipe, reward, **arguments) as guidance:
        pipe("a", num_inference_steps=2, output_type="latent", callback_on_step_end=guidance, generator=seeded())


def run(scheduler, estimator, **arguments):
    scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    with torch.no_grad(), scheduler.differentiable(estimator, **arguments) as trajectory:
        for timestep in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), timestep, x).prev_sample
    trajectory.gradient(x.sum())


def public_functions():
    """Returns functions by name with valid arguments, of which the test replaces one at a time by an odd value."""
    pipe = tiny.stable_diffusion(df.StableDiffusionFisherPipeline)
    images, x = torch.rand(1, 3, 16, 16, generator=seeded()), torch.randn(1, 4, 8, 8, generator=seeded())
    denoiser = df.PipelineDenoiser(pipe, prompt="a")
    state = denoiser.state(x, 500)
    operator = df.DirectFisher()(state)
    points = torch.randn(3, 4, 8, 8, generator=seeded())
    guide_by_labels, stock_pipe = tiny.dit(df.DiTFisherPipeline).guide, tiny.stable_diffusion()
    bank, level = df.DiracMixture(points), df.NoiseLevel.from_alpha_bar(0.5)
    gauss = df.GaussianMixture(points, df.Covariance.isotropic(0.5, (4, 8, 8)))
    integration = {
        "num_steps": 2, "num_probes": 1, "prior_mean": 0.0, "prior_variance": 1.0, "noised": False,
        "step_halving": False, "generator": seeded(), "scheme": "euler", "bins": None, "space": "latent",
    }  # fmt: skip

    def log_likelihood(images=images, prompt="a", **arguments):
        return pipe.log_likelihood(images, prompt, **arguments)

    def call(scale=1.0, x=x, timestep=500, **arguments):
        return df.PipelineDenoiser(pipe, scale, **arguments).state(x, timestep)

    def integrate(denoiser, samples, estimator, **options):
        return df.integrate_log_likelihood(denoiser, samples, estimator, df.Integration(**{**integration, **options}))

    def likelihood_of_latents(**arguments):
        return pipe.log_likelihood(prompt="a", **arguments)

    quick = {"num_inference_steps": 2, "generator": seeded()}
    call_arguments = {
        "negative_prompt": None, "prompt_embeds": None, "clip_skip": None, "guidance_rescale": 0.0,
        "num_images_per_prompt": 1, "cross_attention_kwargs": None, "eta": 0.0, "return_dict": True,
    }  # fmt: skip
    table = {
        "log_likelihood": (log_likelihood, {
            **quick, "images": images, "prompt": "a", "estimator": df.DirectFisher(), "num_probes": 1, "noised": False,
            "step_halving": False, "prior_mean": None, "prior_variance": None, "scheme": "euler",
            "data_range": (0, 1), "bins": None, **dict.fromkeys(["guidance_scale"], 1.0),
            **{name: call_arguments[name] for name in ("negative_prompt", "clip_skip", "guidance_rescale")},
        }),
        "log_likelihood of latents": (likelihood_of_latents, {**quick, "latents": x, "estimator": df.DirectFisher()}),
        "compare_likelihood": (lambda images=images, prompts=("a",), **arguments: pipe.compare_likelihood(
            images, prompts, **arguments), {"images": images, "prompts": ["a", "b"], "latents": None,
            "method": "squared error", "num_levels": 4, "generator": seeded(), "prior_mean": None,
            "data_range": (0, 1), "bins": None, "clip_skip": None}),
        "guide": (lambda prompt="a", reward=bright, **arguments: pipe.guide(prompt, reward, **arguments), {
            **quick, **call_arguments, "prompt": "a", "reward": bright, "num_guidance_steps": 1, "step_size": 0.1,
            "estimator": df.DirectFisher(), "height": 16, "width": 16, "guidance_scale": 2.0, "latents": None,
            "output_type": "pt", "optimise": ["noise"], "optimizer": None, "patience": None, "held_out_reward": None,
            "noise_projection": None, "regulariser": None, "num_guidance_inference_steps": 2,
            "guidance_scheduler": None, "num_full_iterations": 0, "num_unguided_iterations": 0, "reward_downscale": 1,
            "num_candidates": 2, "callback_on_guidance_step": None,
            "adjoint_guidance_scale": None, "decoder": None, "checkpoint_decoder": False,
        }),
        "posterior_guidance": (lambda pipe=stock_pipe, **arguments: guide_step_by_step(pipe, **arguments), {
            "reward": bright, "prompts": "a", "strength": 0.1, "estimator": df.DirectFisher(), "decode": None,
            "denoiser": None}),
        "PipelineDenoiser": (call, {"scale": 1.0, "x": x, "timestep": 500, "prompt": "a", **call_arguments}),
        "integrate_log_likelihood": (integrate, {**integration, "denoiser": denoiser, "samples": x,
            "estimator": df.DirectFisher()}),
        "squared errors": (squared_error_log_likelihood, {"denoiser": denoiser, "samples": x, "num_levels": 4,
            "prior_mean": None, "prior_variance": None, "generator": seeded(), "bins": None}),
        "differentiable": (lambda **arguments: run(df.FisherDDIMScheduler(), **arguments), {
            "estimator": df.DirectFisher(), "changed_latents": "refuse", "controls": None}),
        "noise_level": (lambda **arguments: df.noise_level(pipe.scheduler, **arguments), {"timestep": 500}),
        "DenoisingState": (df.DenoisingState, {"sample": x, "model_output": x, "level": level,
            "prediction": denoiser.prediction}),
        "guide by labels": (guide_by_labels, {**quick, "class_labels": 3, "reward": bright,
            "num_guidance_steps": 0, "output_type": "pt"}),
    }  # fmt: skip
    table |= {
        f"operator.{name}": (getattr(operator, name), arguments)
        for name, arguments in {
            "matvec": {"v": x}, "covariance": {"v": x}, "output_jacobian": {"v": x}, "matmat": {"vectors": x[None]},
            "trace": {"probes": x[None], "sketch": None}, "diagonal": {"probes": x[None]},
            "solve": {"v": x, "tolerance": 1e-3, "max_iterations": 3}, "damped": {"damping": 0.1},
            "__mul__": {"factor": 2.0}, "__add__": {"other": operator}, "eigenpairs": {"count": 1, "largest": True},
        }.items()
    }  # fmt: skip
    makers = {
        df.AutodiffFisher: {"denoiser": denoiser, "forward_mode": False, "chunk_size": 1},
        df.FiniteDifferenceFisher: {"denoiser": denoiser, "relative_step": 0.01, "central": False},
        df.OneStepFisher: {"jacobian": None, "noise_to_signal": 1.0}, df.EndpointFisher: {"centred": False},
        df.ExactFisher: {"distribution": bank}, df.TraceMatchingFisher: {"trace_model": None},
        df.TraceCorrectedFisher: {"prior": df.DirectFisher(), "trace": df.DirectFisher()},
        df.GaussianFisher: {"covariance": df.Covariance.isotropic(1.0, (4, 8, 8)), "mean": None},
    }  # fmt: skip

    def product(maker):
        def make(endpoint=x, state=state, **arguments):
            return maker(**arguments)(state, endpoint).matvec(x)

        return make

    table |= {maker.__name__: (product(maker), {**arguments, "state": state}) for maker, arguments in makers.items()}
    table |= {
        "DiracMixture": (df.DiracMixture, {"points": points, "weights": None, "memory": 2**28, "chunk_rows": None}),
        "GaussianMixture": (df.GaussianMixture, {"means": points, "covariance": gauss.covariance, "weights": None}),
        "bank.posterior": (bank.posterior, {"x": x, "level": level}),
        "bank.sample": (bank.sample, {"count": 2, "generator": seeded()}),
        "gauss.score": (gauss.score, {"x": x, "level": level}),
        "gauss.sample": (gauss.sample, {"count": 2, "generator": seeded()}),
        "isotropic": (df.Covariance.isotropic, {"variances": 1.0, "shape": (4, 8, 8)}),
        "diagonal": (df.Covariance.diagonal, {"variances": points.square() + 1, "basis": None}),
        "rademacher": (estimate.rademacher, {"count": 2, "like": x, "generator": seeded()}),
        "orthogonal": (estimate.orthogonal, {"count": 2, "like": x, "generator": seeded(), "group": 1}),
        "Probes": (df.Probes, {"vectors": x[None], "group": 1}),
        "residual bound": (df.residual_trace_error_bound, {"level": level, "dimensions": 4, "target_error": 0.1,
            "epsilon_error": 0.1}),
        "LinearReward": (lambda weights: df.LinearReward(weights)(images, ["a"]), {"weights": torch.ones(16, 16)}),
        "left_minus_right": (df.LinearReward.left_minus_right, {"height": 4, "width": 4}),
        "MeasurementReward": (lambda **arguments: df.MeasurementReward(**arguments)(images, ["a"]), {
            "target": images[0], "mask": None, "operator": None}),
        "gaussian_blur": (lambda std: df.gaussian_blur(std)(images), {"std": 1.0}),
        "named_reward": (df.named_reward, {"name": "classifier:embedded:coat"}),
        "WeightedReward": (lambda weight, reward: df.WeightedReward((weight, reward))(images, ["a"]), {
            "weight": 1.0, "reward": bright}),
    }  # fmt: skip
    return pipe, table


def draw_inputs():
    """Returns function, argument and odd value of every input, the same in every run of the suite."""
    pick = random.Random(SEED)
    table = public_functions()[1]
    return [
        (function_name, name, value)
        for function_name, (_, arguments) in table.items()
        for name in arguments
        for value in pick.sample(sorted(ODD), VALUES_PER_ARGUMENT)
    ]


def test_odd_arguments_are_used_or_refused_in_the_packages_words():
    pipe, table = public_functions()
    with contextlib.suppress(AttributeError):  # the first call with `clip_skip` adds hooks of transformers
        pipe.encode_prompt("a", "cpu", 1, False, clip_skip=0)
    before = state_of(pipe)
    raw, inputs = [], draw_inputs()
    for function_name, name, value in inputs:
        function, arguments = table[function_name]
        try:
            with warnings.catch_warnings(), contextlib.suppress(df.FisherError):
                warnings.simplefilter("ignore")
                function(**{**arguments, name: ODD[value]})
        except Exception as error:
            if value == "a function" and f"{function_name}({name})" in OWN_ERRORS:
                continue
            raw.append(f"{function_name}({name}={value}): {type(error).__name__}: {str(error)[:90]}")
        if state_of(pipe) != before:
            raw.append(f"{function_name}({name}={value}) changed the pipeline")
            before = state_of(pipe)
    assert len(inputs) >= 1000
    assert not raw, "\n".join(raw)


def state_of(pipe):
    """Returns the pipeline's snapshot without the state of random numbers, which calls change."""
    snapshot = tiny.snapshot(pipe)
    del snapshot["random numbers"]
    return snapshot
