"""The estimator of Gaussian data: closed forms, fits, files, and its combination with a trace."""

import pytest
import torch
from cases import FunctionFisher, latents, relative

from diffusers_fisher import (
    CheckpointError,
    DenoisingState,
    DirectFisher,
    EndpointFisher,
    GaussianFisher,
    InputError,
    NoiseLevel,
    TraceCorrectedFisher,
    UnsupportedError,
)
from diffusers_fisher.distributions.covariance import Covariance, DCTBasis
from diffusers_fisher.files import save_tensors
from diffusers_fisher.noise import Prediction

SHAPE = (3, 2, 4)
EXACT = 1e-12  # float64, condition numbers of some hundreds


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(shape=(2, *SHAPE), alpha=0.8, sigma=0.5, kind="epsilon"):
    level = NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    return DenoisingState(latents(shape=shape), latents(shape=shape, seed=2), level, Prediction(kind), 300)


def covariances():
    variances = normal(1, *SHAPE).exp()
    return {
        "isotropic": Covariance.isotropic(0.3, SHAPE),
        "diagonal": Covariance.diagonal(variances),
        "DCT": Covariance.diagonal(variances, DCTBasis(SHAPE)),
        "low rank": Covariance.low_rank(variances, normal(1, *SHAPE, 3, seed=1)),
        "low rank in DCT": Covariance.low_rank(variances, normal(1, *SHAPE, 3, seed=1), DCTBasis(SHAPE)),
        "full": Covariance.full(torch.cov(normal(24, 60))[None], SHAPE),
    }


def reference(covariance, at):
    identity = torch.eye(24, dtype=torch.float64)
    return torch.linalg.inv(at.level.alpha**2 * covariance.dense()[0] + at.level.sigma**2 * identity)


@pytest.mark.parametrize("name", covariances())
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_operator_is_the_inverse_of_the_noised_covariance(name, kind):
    covariance, at = covariances()[name], state(kind=kind)
    operator, fisher, v = (
        GaussianFisher(covariance)(at),
        reference(covariances()[name], at),
        latents(shape=(2, *SHAPE)),
    )
    expected = (v.flatten(1) @ fisher).view_as(v)
    assert relative(operator.matvec(v), expected) < EXACT
    assert relative(operator.matmat(torch.stack([v, 2 * v]))[1], 2 * expected) < EXACT
    assert relative(operator.dense(), fisher.expand(2, 24, 24)) < EXACT
    assert relative(operator.trace().value, fisher.trace().expand(2)) < EXACT
    assert relative(operator.diagonal().value.flatten(1), fisher.diagonal().expand(2, 24)) < EXACT
    assert operator.trace().num_denoiser_calls == 0
    posterior = at.level.sigma**2 / at.level.alpha**2 * (torch.eye(24) - at.level.sigma**2 * fisher)
    assert relative(operator.covariance(v), (v.flatten(1) @ posterior).view_as(v)) < EXACT
    jacobian = at.level.alpha / at.level.sigma**2 * posterior
    assert relative(operator.original_jacobian(v), (v.flatten(1) @ jacobian).view_as(v)) < EXACT


@pytest.mark.parametrize("name", covariances())
def test_shifted_inverses_are_closed_forms(name):
    covariance, at, v = covariances()[name], state(), latents(shape=(2, *SHAPE))
    operator, fisher = GaussianFisher(covariance)(at), reference(covariance, at)
    assert relative(operator.matvec(operator.solve(v)), v) < EXACT
    shift = torch.tensor([0.3, 5.0], dtype=torch.float64)
    expected = torch.linalg.solve(fisher + shift[:, None, None] * torch.eye(24), v.flatten(1)[..., None])[..., 0]
    assert relative(operator.damped(shift).solve(v).flatten(1), expected) < EXACT


def test_pure_noise_is_an_ordinary_level():
    operator = GaussianFisher(covariances()["low rank"])(state(alpha=0.0, sigma=1.0, kind="v_prediction"))
    v = latents(shape=(2, *SHAPE))
    assert relative(operator.matvec(v), v) < EXACT
    dense = covariances()["low rank"].dense()[0]
    assert relative(operator.covariance(v), (v.flatten(1) @ dense).view_as(v)) < EXACT
    assert bool(torch.isfinite(operator.output_jacobian(v)).all())


def test_packed_samples_and_float32():
    covariance = Covariance.diagonal(normal(1, 4, 6).exp())
    v, at = latents(shape=(2, 4, 6)), state(shape=(2, 4, 6))
    product = GaussianFisher(covariance)(at).matvec(v)
    float32_state = DenoisingState(at.sample.float(), at.model_output.float(), at.level, at.prediction, 300)
    result = GaussianFisher(covariance)(float32_state).matvec(v.float())
    assert result.dtype is torch.float32
    assert relative(result, product) < 1e-6  # Inputs and result are rounded to float32; all else is float64.


# Fits

TRUE = {
    "isotropic": (Covariance.isotropic(0.3, SHAPE), lambda samples: GaussianFisher.fit_isotropic(samples)),
    "diagonal": (Covariance.diagonal(normal(1, *SHAPE).exp()), lambda samples: GaussianFisher.fit_diagonal(samples)),
    "DCT": (
        Covariance.diagonal(normal(1, *SHAPE).exp(), DCTBasis(SHAPE)),
        lambda samples: GaussianFisher.fit_diagonal(samples, dct=True),
    ),
    "low rank": (
        Covariance.low_rank(0.1 + 0.01 * normal(1, *SHAPE).exp(), 2 * normal(1, *SHAPE, 3, seed=1)),
        lambda samples: GaussianFisher.fit_low_rank(samples, 3),
    ),
}


@pytest.mark.parametrize("name", TRUE)
def test_fits_return_the_covariance_of_the_distribution(name):
    covariance, fit_estimator = TRUE[name]
    count, mean = 40000, normal(*SHAPE, seed=7)
    draws = covariance.draw(torch.zeros(count, dtype=torch.long), torch.Generator().manual_seed(3))
    samples = draws.view(count, *SHAPE) + mean
    estimator = fit_estimator(samples)
    # Variances from n draws scatter by sqrt(2/n) = 0.7%; five of these, more for the split into rank and rest.
    assert relative(estimator.covariance.dense(), covariance.dense()) < 0.05
    assert relative(estimator.mean, mean) < 0.05
    batches = fit_estimator(batch for batch in samples.split(999))
    assert relative(batches.covariance.dense(), estimator.covariance.dense()) < 1e-9  # sums in another order


def test_folder_of_latents_is_the_same_as_the_tensor(tmp_path):
    samples = normal(5000, *SHAPE)  # more than one slice
    for index, piece in enumerate(samples.split(3000)):
        save_tensors(tmp_path / f"latents-{index}.safetensors", {"latents": piece}, {})
    (tmp_path / "notes.txt").write_text("not a bank")
    estimator = GaussianFisher.fit_diagonal(tmp_path, dct=True)
    assert (
        relative(estimator.covariance.dense(), GaussianFisher.fit_diagonal(samples, dct=True).covariance.dense())
        < 1e-9
    )
    isotropic = GaussianFisher.fit_isotropic(tmp_path / "latents-0.safetensors")
    assert relative(isotropic.mean, samples[:3000].mean(0)) < 1e-9  # sums in another order


def test_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no samples; allowed: .npy, .safetensors files"):
        GaussianFisher.fit_diagonal(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing.safetensors' \(missing\) can't be read"):
        GaussianFisher.fit_diagonal(tmp_path / "missing.safetensors")


def test_constant_coordinates_do_not_make_the_covariance_singular():
    samples = normal(100, *SHAPE)
    samples[:, 0] = 2.5
    estimator = GaussianFisher.fit_diagonal(samples)
    assert bool((estimator.covariance.variances > 0).all())
    assert float(estimator.covariance.variances[0, 0]) < 1e-5


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "DCT", "low rank", "low rank in DCT"])
def test_saved_files_give_the_same_operator(name, tmp_path):
    estimator = GaussianFisher(covariances()[name], normal(*SHAPE))
    estimator.save(tmp_path / "gaussian.safetensors")
    loaded_estimator, at, v = (
        GaussianFisher.load(tmp_path / "gaussian.safetensors"),
        state(),
        latents(shape=(2, *SHAPE)),
    )
    assert torch.equal(loaded_estimator(at).matvec(v), estimator(at).matvec(v))
    assert torch.equal(loaded_estimator.mean, estimator.mean)


# Combination with a trace


def test_corrected_prior_has_the_directions_of_the_prior_and_the_trace_of_the_other():
    at, v = state(), latents(shape=(2, *SHAPE))
    prior, trace = GaussianFisher(covariances()["DCT"]), EndpointFisher(centred=True)
    endpoint = at.pred_original_sample + 0.1 * v
    operator = TraceCorrectedFisher(prior, FunctionFisher(lambda s, e: trace(s, endpoint)))(at)
    assert relative(operator.trace().value, trace(at, endpoint).trace().value) < EXACT
    ratio = operator.covariance(v) / prior(at).covariance(v)
    per_sample = ratio.flatten(1)
    assert relative(per_sample, per_sample[:, :1].expand_as(per_sample)) < 1e-9  # elementwise ratios near zeros
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)
    same = TraceCorrectedFisher(prior, prior)(at)
    assert relative(same.matvec(v), prior(at).matvec(v)) < EXACT
    # The closed form has the error of its condition number.
    assert relative(operator.matvec(operator.solve(v)), v) < 1e-9


def test_direct_prior_can_be_corrected_too():
    at, v = state(kind="v_prediction"), latents(shape=(2, *SHAPE))
    operator = TraceCorrectedFisher(DirectFisher(), GaussianFisher(covariances()["diagonal"]))(at)
    mean = GaussianFisher(covariances()["diagonal"])(at).trace().value / 24
    assert relative(operator.matvec(v), mean[:, None, None, None] * v) < EXACT  # a multiple of the identity


# Bad input


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="has 2 modes; GaussianFisher takes one"):
        GaussianFisher(Covariance.diagonal(torch.ones(2, *SHAPE, dtype=torch.float64)))
    with pytest.raises(InputError, match=r"The mean has shape \(2,\); allowed: \(3, 2, 4\)"):
        GaussianFisher(Covariance.isotropic(1.0, SHAPE), torch.zeros(2))
    with pytest.raises(InputError, match=r"sample of the state has shape \(3, 2, 2\); allowed: \(3, 2, 4\). Fit"):
        GaussianFisher(Covariance.isotropic(1.0, SHAPE))(state(shape=(2, 3, 2, 2)))
    with pytest.raises(InputError, match="No samples were given; a covariance needs at least two"):
        GaussianFisher.fit_diagonal(iter([]))
    with pytest.raises(InputError, match="1 samples were given; a covariance needs at least two"):
        GaussianFisher.fit_diagonal(normal(1, *SHAPE))
    with pytest.raises(InputError, match=r"batch of samples has shape \(5, 3, 2, 4\).* without NaN or infinity"):
        GaussianFisher.fit_low_rank(torch.full((5, *SHAPE), torch.nan), 2)
    with pytest.raises(InputError, match="the same in every batch"):
        GaussianFisher.fit_isotropic([normal(5, *SHAPE), normal(5, 2, 2)])
    with pytest.raises(InputError, match="`rank` is 24; allowed: 1 to 23"):
        GaussianFisher.fit_low_rank(normal(50, *SHAPE), 24)
    with pytest.raises(InputError, match=r"and d = 10000 \(limit 8192\); use fit_diagonal\(samples, dct=True\)"):
        GaussianFisher.fit_low_rank(torch.zeros(2, 1, 100, 100), 4)
    with pytest.raises(UnsupportedError, match="Full covariances are not saved"):
        GaussianFisher(covariances()["full"]).save(tmp_path / "full.safetensors")
    save_tensors(tmp_path / "other.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"holds no GaussianFisher; it holds \['x'\]"):
        GaussianFisher.load(tmp_path / "other.safetensors")
