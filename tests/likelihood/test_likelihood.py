"""The likelihood integral over perfect denoisers, against densities in closed form."""

import dataclasses
import math

import diffusers
import pytest
import torch
from cases import ORACLE_SHAPE, ORACLES, STABLE_DIFFUSION, ZERO_SNR, relative

from diffusers_fisher import (
    AutodiffFisher,
    FiniteDifferenceFisher,
    InputError,
    LikelihoodOutput,
    NoiseLevel,
    NumericalError,
)
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.likelihood.draws import ImageDraws
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

DIMENSIONS = math.prod(ORACLE_SHAPE)
BIT = DIMENSIONS * math.log(2)  # nats of one bit/dim
LOWEST, HIGHEST = 0.02916715815172007, 14.614641229333612  # sigma/alpha of Stable Diffusion's timesteps 0 and 999


def vp(**changes):
    return diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, **changes})


def draws(oracle, count=4):
    return oracle.sample(count, torch.Generator().manual_seed(5))


def likelihood(oracle, samples, scheduler=None, num_steps=20, num_probes=None, **options):
    denoiser = OracleDenoiser(oracle, scheduler or vp())
    return integrate_log_likelihood(
        denoiser, samples, AutodiffFisher(denoiser), Integration(num_steps, num_probes, **options)
    )


def exact(oracle, samples, out):
    """Returns the oracle's density, smoothed with the output's lowest noise."""
    return oracle.log_density(samples, NoiseLevel(torch.ones((), dtype=torch.float64), out.noise_to_signal[0]))


def without_prior(oracle, out):
    """Returns the log-likelihood with the oracle's own density at the noise end. Its error is the integral's alone."""
    level = NoiseLevel(torch.ones((), dtype=torch.float64), out.noise_to_signal[-1])
    return out.trace_log_prob + oracle.log_density(out.final_latents, level)


def moments(oracle):
    """Returns the mean and the variance of each element of the oracle's data."""
    mean = oracle.weights @ oracle.means
    spread = oracle.covariances.diagonal(dim1=1, dim2=2) + (oracle.means - mean).square()
    return {"prior_mean": mean.view(ORACLE_SHAPE), "prior_variance": (oracle.weights @ spread).view(ORACLE_SHAPE)}


# The largest errors of four draws from both oracles are 0.0011 bits/dim at 20 steps and 0.00001 at 80.
@pytest.mark.parametrize(("num_steps", "bits"), [(20, 0.003), (100, 0.0001)])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_density_equals_the_oracles_density(name, num_steps, bits):
    oracle = ORACLES[name]
    samples = draws(oracle)
    out = likelihood(oracle, samples, num_steps=num_steps, **moments(oracle))
    error = (without_prior(oracle, out) - exact(oracle, samples, out)).abs() / BIT
    assert float(error.max()) < bits
    # The prior has no off-diagonal covariances and no modes: at s_T they leave up to 0.004 bits/dim.
    assert float(((out.log_prob - exact(oracle, samples, out)).abs() / BIT).max()) < bits + 0.005


@pytest.mark.parametrize("num_steps", [20, 40, 100])
def test_discretisation_error_covers_the_true_error(num_steps):
    true, estimate = [], []
    for name in ("gaussian", "mixture"):
        oracle = ORACLES[name]
        samples = draws(oracle, 16)
        out = likelihood(oracle, samples, num_steps=num_steps)
        true.append((without_prior(oracle, out) - exact(oracle, samples, out)).abs())
        estimate.append(out.discretisation_error)
        assert not out.halved
    true, estimate = torch.cat(true), torch.cat(estimate)
    assert float((estimate >= true).double().mean()) >= 0.95
    assert float(true.median()) < float(estimate.median()) < 10 * float(true.median())


def test_discretisation_error_can_be_measured_by_half_the_steps():
    oracle = ORACLES["mixture"]
    full, half = (likelihood(oracle, draws(oracle), num_steps=steps) for steps in (21, 10))
    out = likelihood(oracle, draws(oracle), num_steps=21, step_halving=True)
    assert torch.equal(out.discretisation_error, (full.log_prob - half.log_prob).abs())
    assert torch.equal(out.log_prob, full.log_prob)
    assert (out.halved, full.halved) == (True, False)


def test_isotropic_gaussian_in_closed_form():
    variance = 0.3
    oracle = MixtureOracle.gaussian(
        torch.zeros(ORACLE_SHAPE, dtype=torch.float64), variance * torch.eye(DIMENSIONS, dtype=torch.float64)
    )
    out = likelihood(oracle, draws(oracle), num_steps=200, prior_mean=0.0, prior_variance=variance)
    s = out.noise_to_signal
    # Float32 timesteps between the table's entries move s by 1e-7 relative.
    assert relative(out.unexplained_noise_fraction, (variance / (variance + s**2))[:, None].expand(201, 4)) < 1e-6
    integral = DIMENSIONS / 2 * math.log((variance + float(s[-1]) ** 2) / (variance + float(s[0]) ** 2))
    # Trapezoidal rule, d h^2/12 times the difference of the integrand's slopes at the ends, which are 0.003 or less.
    assert bool(((out.trace_log_prob - integral).abs() < 1e-5).all())
    carried = ((variance + s[-1] ** 2) / (variance + s[0] ** 2)).sqrt() * draws(oracle)
    assert relative(out.final_latents, carried) < 5e-4  # order two with steps of h = 0.031: measured 1.4e-4


def test_exact_trace_at_the_first_node_equals_the_oracles_trace():
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    out = likelihood(oracle, samples)
    level = NoiseLevel.from_log_noise_to_signal(out.noise_to_signal[0].log())
    trace = oracle.trace(level.alpha * samples, level)
    # By autodiff in float64; 1 - r is formed from terms of order one.
    assert relative(1 - out.unexplained_noise_fraction[0], level.sigma**2 * trace / DIMENSIONS) < 1e-10


def test_r_is_zero_where_the_noise_is_known_and_nearly_one_where_it_is_unknown():
    """r is 0 where x_0 is one of a few distant points or where the noise is large; at small noise it is nearly 1."""
    points, gaussian = (likelihood(ORACLES[name], draws(ORACLES[name])) for name in ("points", "gaussian"))
    assert (
        float(points.unexplained_noise_fraction[0].abs().max()) < 1e-12
    )  # 1 minus one, in float64: the next point is 80 s away
    assert bool(
        (points.unexplained_noise_fraction[-1] < 0.01).all()
    )  # v/(v + s^2) at unit variance and s = 14.6: 0.005
    assert bool((gaussian.unexplained_noise_fraction[-1] < 0.01).all())
    assert bool(
        (gaussian.unexplained_noise_fraction[0] > 0.97).all()
    )  # the smallest of six variances is 0.02, 24 times s^2


class TestHutchinson:
    COPIES = 256

    def outputs(self, num_probes, fixed_probes=False, num_steps=10):
        oracle = ORACLES["mixture"]
        samples = draws(oracle, 1).expand(self.COPIES, *ORACLE_SHAPE)
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.COPIES)]
        options = {"num_steps": num_steps, "fixed_probes": fixed_probes}
        out = likelihood(oracle, samples, num_probes=num_probes, generator=generators, **options)
        return out, likelihood(oracle, samples[:1], **options)

    @pytest.mark.parametrize(("num_probes", "fixed"), [(8, True), (1, False), (8, False)])
    def test_it_is_unbiased_with_the_right_standard_error(self, num_probes, fixed):
        out, reference = self.outputs(num_probes, fixed)
        spread = out.log_prob.std()
        deviation = (out.log_prob.mean() - reference.log_prob) / (spread / self.COPIES**0.5)
        assert 1e-3 < abs(float(deviation)) < 4  # four standard deviations; exactly zero would mean no randomness
        standard_error = out.standard_error.square().mean().sqrt()
        # The spread of 256 copies scatters by 1/sqrt(2 * 255) = 4.4%; four of these.
        assert abs(float(standard_error / spread) - 1) < 0.18

    def test_the_path_hardly_depends_on_the_probes(self):
        """The evaluations lie on a path that does not depend on the probes, which only correct the path's end."""
        out, reference = self.outputs(2)
        change = float((out.prior_log_prob - reference.prior_log_prob).abs().max())
        assert 0 < change < 0.1 * float((out.trace_log_prob - reference.trace_log_prob).abs().max())

    def test_mean_of_the_trace_by_probe_is_the_trace(self):
        out, reference = self.outputs(8)
        assert relative(out.trace_by_probe.mean(0), out.trace_log_prob) < 1e-12  # sums in another order
        assert reference.trace_by_probe.shape == (0, 1)

    def test_error_is_infinite_with_one_fixed_probe_and_zero_with_the_exact_trace(self):
        out, reference = self.outputs(1, fixed_probes=True)
        assert bool(torch.isinf(out.standard_error).all())
        assert not reference.standard_error.any()
        assert (out.trace, reference.trace) == ("AutodiffFisher, 1 probe for all levels", "AutodiffFisher, no probes")


def test_prior_is_standard_or_moment_matched():
    oracle = ORACLES["gaussian"]
    samples = draws(oracle)
    prior = moments(oracle)
    standard, moment_matched = likelihood(oracle, samples), likelihood(oracle, samples, **prior)
    assert (standard.prior, moment_matched.prior) == ("standard", "moment-matched")
    end = float(standard.noise_to_signal[-1]) ** 2
    for out, mean, variance in (
        (standard, 0.0, torch.ones((), dtype=torch.float64)),
        (moment_matched, *prior.values()),
    ):
        normal = torch.distributions.Normal(mean, (variance + end).sqrt())
        # A sum of six float64 terms.
        assert relative(out.prior_log_prob, normal.log_prob(out.final_latents).sum((1, 2, 3))) < 1e-12
        assert torch.equal(out.log_prob, out.prior_log_prob + out.trace_log_prob)
    assert torch.equal(standard.trace_log_prob, moment_matched.trace_log_prob)
    floor = [
        (out.log_prob - without_prior(oracle, out)).abs().max() for out in (standard, moment_matched)
    ]  # the mean of the data is about 1, so the standard prior is 0.5 nats off
    assert float(floor[0]) > 0.1
    assert float(floor[1]) < 0.02


def test_prior_takes_numbers_and_what_broadcasts():
    oracle = ORACLES["gaussian"]
    samples = draws(oracle)
    number = likelihood(oracle, samples, prior_mean=0.2, prior_variance=2)
    tensors = likelihood(oracle, samples, prior_mean=torch.full((3,), 0.2), prior_variance=torch.full((2, 1), 2.0))
    assert relative(number.log_prob, tensors.log_prob) < 1e-7  # 0.2 in float32


def test_noised_density_is_at_a_noised_point():
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    out = likelihood(oracle, samples, noised=True, generator=torch.Generator().manual_seed(3))
    noise = ImageDraws(samples, torch.Generator().manual_seed(3)).normal("noise")
    same = likelihood(oracle, samples + LOWEST * noise)
    assert relative(out.log_prob, same.log_prob) < 1e-12  # one rounding of the start
    assert (out.density, same.density) == ("noised", "smoothed")
    assert float((out.log_prob - likelihood(oracle, samples).log_prob).abs().min()) > 1e-3


SAME_GRID = {
    "DDIM v": vp(prediction_type="v_prediction"),
    "DDIM x0": vp(prediction_type="sample"),
    "DPM++ Karras": diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True),
    "Euler": diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION),
    "Euler v": diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
    "EDM": diffusers.EDMEulerScheduler(sigma_min=LOWEST, sigma_max=HIGHEST),
    "EDM v": diffusers.EDMEulerScheduler(sigma_min=LOWEST, sigma_max=HIGHEST, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SAME_GRID)
def test_density_does_not_depend_on_the_family(name):
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    reference, out = likelihood(oracle, samples), likelihood(oracle, samples, SAME_GRID[name])
    # EDM's timesteps are other float32 numbers: s is off by 1e-7 relative. Else the algebra's rounding remains,
    # a difference of float64 terms 1/s^2 = 1e3 times its size.
    tolerance = 1e-6 if name.startswith("EDM") else 1e-10
    assert relative(out.log_prob, reference.log_prob) < tolerance
    assert relative(out.unexplained_noise_fraction, reference.unexplained_noise_fraction) < tolerance
    assert relative(out.noise_to_signal, reference.noise_to_signal) < 1e-12
    assert out.num_denoiser_calls == reference.num_denoiser_calls


# Range of sigma/alpha: flow stops at 0.001 and 0.999 of pure noise, zero terminal SNR below 0.999 at its one end.
OTHER_GRIDS = {
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(), (1 / 999, 999)),
    "flow, shifted": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (1 / 999, 999)),
    "flow by DPM++": (
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), (1 / 999, 999),
    ),
    "EDM": (diffusers.EDMEulerScheduler(), (0.002, 80)),
    "zero terminal SNR": (vp(**ZERO_SNR), (LOWEST, 747.9958)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_GRIDS)
def test_every_family_gives_the_density_at_its_own_lowest_noise(name):
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    scheduler, ends = OTHER_GRIDS[name]
    out = likelihood(oracle, samples, scheduler, num_steps=100, **moments(oracle))
    assert out.noise_to_signal[[0, -1]].tolist() == pytest.approx(ends, rel=1e-6)
    error = (out.log_prob - exact(oracle, samples, out)).abs() / BIT
    assert float(error.max()) < 0.01  # order two over ranges twice as long as Stable Diffusion's: up to 0.0072


@pytest.mark.parametrize(
    ("num_steps", "halving", "evaluations"), [(20, True, 21 + 11), (20, False, 21), (21, True, 22 + 11), (2, True, 5)]
)
def test_each_node_has_one_call_and_one_notification(num_steps, halving, evaluations):
    oracle, steps = ORACLES["gaussian"], []
    samples = draws(oracle)
    for num_probes in (None, 3):
        steps.clear()
        options = {"step_halving": halving, "on_step": lambda: steps.append(1)}
        out = likelihood(oracle, samples, num_steps=num_steps, num_probes=num_probes, **options)
        assert out.num_denoiser_calls == evaluations
        assert len(steps) == evaluations
        assert out.unexplained_noise_fraction.shape == (num_steps + 1, 4)


@pytest.mark.parametrize(("central", "products"), [(False, 1), (True, 2)])
def test_finite_differences_need_no_graph_and_are_counted(central, products):
    oracle = ORACLES["mixture"]
    denoiser = OracleDenoiser(oracle, vp())
    denoiser(draws(oracle), 500)  # earlier calls do not count
    estimator = FiniteDifferenceFisher(denoiser, relative_step=1e-5, central=central)
    out = integrate_log_likelihood(denoiser, draws(oracle), estimator, Integration(10, None))
    assert out.num_denoiser_calls == 11 * (1 + products * DIMENSIONS)
    reference = likelihood(oracle, draws(oracle), num_steps=10)
    assert relative(out.log_prob, reference.log_prob) < 1e-3  # O(h) and O(h^2) with h = 1e-5 |x| against s_0 = 0.03
    assert relative(out.final_latents, reference.final_latents) < 1e-3  # the trace corrects the path's end


def test_output_has_these_fields():
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    out = likelihood(oracle, samples, num_probes=2, space="pixel", generator=torch.Generator().manual_seed(0))
    assert isinstance(out, LikelihoodOutput)
    tensors = {
        "log_prob": (4,), "prior_log_prob": (4,), "trace_log_prob": (4,), "standard_error": (4,),
        "trace_error": (4,), "prior_error": (4,), "discretisation_error": (4,),
        "unexplained_noise_fraction": (21, 4), "unexplained_noise_error": (21, 4), "noise_to_signal": (21,),
        "final_latents": (4, *ORACLE_SHAPE),
        "trace_by_level": (21, 2, 4), "trace_weights": (21,),
    }  # fmt: skip
    words = {
        "dims": 6, "num_denoiser_calls": 21, "space": "pixel", "prior": "standard", "density": "smoothed",
        "trace": "AutodiffFisher, 2 probes per level", "halved": False, "fixed_probes": False,
        "denoiser_calls_per_image": None, "status": None, "latents": "given", "trace_check": None,
        "guidance_scale": None,
        "trace_difference": None, "trace_difference_error": None,
        "scheme": "adams4", "offset_bits": 0.0,
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(out)} == {*tensors, *words}
    for name, shape in tensors.items():
        value = getattr(out, name)
        assert (value.shape, value.dtype, value.device.type) == (shape, torch.float64, "cpu")
        assert not value.requires_grad
        assert bool(torch.isfinite(value).all())
    assert {name: getattr(out, name) for name in words} == words
    assert bool((out.noise_to_signal.diff() > 0).all())
    assert out.noise_to_signal[[0, -1]].tolist() == pytest.approx([LOWEST, HIGHEST], rel=1e-12)
    assert torch.equal(out.nll, -out.log_prob)
    assert relative(out.bits_per_dim, -out.log_prob / BIT) < 1e-15  # one float64 division


def test_samples_do_not_influence_each_other():
    oracle = ORACLES["mixture"]
    samples = draws(oracle)
    batch = likelihood(oracle, samples)
    for index in range(4):
        single = likelihood(oracle, samples[index : index + 1])
        assert relative(batch.log_prob[index : index + 1], single.log_prob) < 1e-12  # rounding differs between batches


# The samples' own rounding, 6e-8, 5e-4 and 4e-3 of their size, times the density's slope.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_samples_in_half_precision(dtype, tolerance):
    oracle, dtypes = ORACLES["gaussian"], set()

    class Recording(Denoiser):
        def model_output(self, x, timestep):
            dtypes.add(x.dtype)
            self.num_calls += 1
            return OracleDenoiser(oracle, self.scheduler).model_output(x.double(), timestep).to(x.dtype)

    denoiser = Recording(vp())
    out = integrate_log_likelihood(denoiser, draws(oracle).to(dtype), AutodiffFisher(denoiser), Integration(20, None))
    assert dtypes == {torch.float32}  # half precision is left to the network
    assert out.log_prob.dtype == torch.float64
    assert 0 < relative(out.log_prob, likelihood(oracle, draws(oracle)).log_prob) < tolerance


def test_packed_samples():
    oracle = ORACLES["mixture"]
    packed_oracle = MixtureOracle(oracle.means.view(3, 2, 3), oracle.covariances, oracle.weights)
    samples = draws(oracle)
    reference = likelihood(oracle, samples, **moments(oracle))
    prior = {name: value.view(2, 3) for name, value in moments(oracle).items()}
    out = likelihood(packed_oracle, samples.view(4, 2, 3), **prior)
    assert relative(out.log_prob, reference.log_prob) < 1e-12  # the same sums in another layout
    assert out.final_latents.shape == (4, 2, 3)
    assert out.dims == 6


def test_randomness_comes_from_the_generator_alone():
    oracle = ORACLES["mixture"]
    samples = draws(oracle)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return likelihood(oracle, samples, num_probes=2, noised=True, generator=generator).log_prob

    before = torch.get_rng_state()
    first, repeat, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, repeat)
    assert float((first - other).abs().min()) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "enable_grad"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_trace_is_left(grad, requires_grad):
    oracle, scheduler = ORACLES["mixture"], vp()
    scheduler.set_timesteps(4)
    samples = draws(oracle).requires_grad_(requires_grad)
    values, attributes = samples.detach().clone(), dict(vars(scheduler))
    with torch.set_grad_enabled(grad):
        out = likelihood(oracle, samples, scheduler, num_probes=2)
        assert torch.is_grad_enabled() is grad
    assert torch.equal(samples.detach(), values)
    assert samples.requires_grad is requires_grad
    assert samples.grad is None
    assert all(value is attributes[name] for name, value in vars(scheduler).items())
    assert not any(value.requires_grad for value in vars(out).values() if isinstance(value, torch.Tensor))


class Breaking(Denoiser):
    """A perfect denoiser whose evaluation number `bad_call` is NaN."""

    def __init__(self, bad_call):
        super().__init__(vp())
        self.inner, self.bad_call = OracleDenoiser(ORACLES["gaussian"], self.scheduler), bad_call

    def model_output(self, x, timestep):
        self.num_calls += 1
        return self.inner.model_output(x, timestep) * (math.nan if self.num_calls == self.bad_call else 1.0)


@pytest.mark.parametrize(
    ("bad_call", "message"),
    [
        (
            3,
            r"Log-likelihoods are not finite: \[nan, nan, nan, nan\]; unexplained noise fractions by noise "
            r"level: \[\[",
        ),
        (11, "Log-likelihoods are not finite"),  # the last node
        (14, "half as many steps are not finite, .* or pass `step_halving=False`"),
    ],
)
def test_nan_never_leaves_silently(bad_call, message):
    denoiser = Breaking(bad_call)
    with pytest.raises(NumericalError, match=message):
        integrate_log_likelihood(
            denoiser, draws(ORACLES["gaussian"]), AutodiffFisher(denoiser), Integration(10, None, step_halving=True)
        )


BAD_SAMPLES = torch.zeros(2, *ORACLE_SHAPE)
MISTAKES = {
    "one step": ({"num_steps": 1}, "`num_steps` is 1; allowed: at least 2"),
    "no step": ({"num_steps": 0}, "`num_steps` is 0; allowed: at least 2"),
    "scheme": ({"scheme": "rk4"}, "`scheme` is 'rk4'; allowed: euler, trapezoid, adams3, adams4"),
    "one bin": ({"bins": 1}, "`bins` is 1 on .*; allowed: at least 2"),
    "no probe": ({"num_probes": 0}, "`num_probes` is 0; allowed: at least 1, or None for the exact trace"),
    "integers": ({"samples": BAD_SAMPLES.long()}, r"shape \(2, 1, 2, 3\) and dtype torch.int64 must be finite"),
    "NaN": ({"samples": BAD_SAMPLES / 0}, "must be finite floating-point numbers; NaN usually comes from"),
    "infinity": ({"samples": BAD_SAMPLES + math.inf}, "must be finite floating-point numbers"),
    "no sample": ({"samples": BAD_SAMPLES[:0]}, r"shape \(0, 1, 2, 3\); allowed: \(B, ...\), a batch of at least one"),
    "no batch": ({"samples": torch.zeros(6)}, r"shape \(6,\); allowed: \(B, ...\)"),
    "mean alone": ({"prior_mean": 0.0}, "Give both `prior_mean` and `prior_variance`"),
    "variance alone": ({"prior_variance": 1.0}, "Give both `prior_mean` and `prior_variance`"),
    "prior of a batch": (
        {"prior_mean": torch.zeros(2, *ORACLE_SHAPE), "prior_variance": 1.0},
        r"`prior_mean` has shape \(2, 1, 2, 3\); allowed: a number, or what broadcasts to \(1, 2, 3\)",
    ),
    "prior of another size": (
        {"prior_mean": 0.0, "prior_variance": torch.ones(4)}, r"`prior_variance` has shape \(4,\); allowed",
    ),
    "negative variance": ({"prior_mean": 0.0, "prior_variance": -1.0}, "`prior_variance` finite and not negative"),
    "NaN mean": ({"prior_mean": math.nan, "prior_variance": 1.0}, "`prior_mean` must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_any_evaluation(name):
    changes, message = MISTAKES[name]
    denoiser = OracleDenoiser(ORACLES["gaussian"], vp())
    arguments = {"samples": BAD_SAMPLES.double(), "num_steps": 4, "num_probes": None, **changes}
    samples = arguments.pop("samples")
    with pytest.raises(InputError, match=message):
        integrate_log_likelihood(denoiser, samples, AutodiffFisher(denoiser), Integration(**arguments))
    assert denoiser.num_calls == 0


def test_inference_mode_is_refused_where_a_graph_is_needed():
    oracle = ORACLES["gaussian"]
    denoiser = OracleDenoiser(oracle, vp())
    with (
        torch.inference_mode(),
        pytest.raises(InputError, match=r"AutodiffFisher differentiates .* use torch.no_grad instead, or FiniteDiff"),
    ):
        integrate_log_likelihood(denoiser, draws(oracle), AutodiffFisher(denoiser), Integration(4, None))
    assert denoiser.num_calls == 0
    estimator = FiniteDifferenceFisher(denoiser)
    with torch.inference_mode():
        inside, samples = (
            integrate_log_likelihood(denoiser, draws(oracle), estimator, Integration(4, None)),
            draws(oracle),
        )
    assert torch.equal(
        inside.log_prob, integrate_log_likelihood(denoiser, draws(oracle), estimator, Integration(4, None)).log_prob
    )
    # Samples that were made in inference mode are fine outside it.
    assert torch.equal(likelihood(oracle, samples).log_prob, likelihood(oracle, draws(oracle)).log_prob)


def test_estimator_without_a_denoiser_uses_the_evaluation_of_the_solver():
    oracle = ORACLES["gaussian"]
    denoiser = OracleDenoiser(oracle, vp())
    out = integrate_log_likelihood(denoiser, draws(oracle), AutodiffFisher(), Integration(20, None))
    assert torch.equal(out.log_prob, likelihood(oracle, draws(oracle)).log_prob)
