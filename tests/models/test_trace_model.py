"""The trace model is right at both ends of the noise and before training; its inputs, files and card."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from cases import STABLE_DIFFUSION, ZERO_SNR, SchedulerCase
from diffusers.utils import hub_utils
from safetensors import safe_open
from trace_cases import IMAGE, SMALL, TOKENS, GaussianData, GaussianDenoiser, disturb

from diffusers_fisher import (
    CheckpointError,
    DenoisingState,
    FisherTraceModel,
    InputError,
    NoiseLevel,
)
from diffusers_fisher.models import trace_inputs
from diffusers_fisher.noise import Prediction

KINDS = {
    "trace": (IMAGE, "pixel", {}),
    "trace, DCT prior": (IMAGE, "dct", {}),
    "trace of tokens": (TOKENS, "pixel", {}),
    "trace with features": (IMAGE, "pixel", {"feature_channels": 6}),
    "diagonal": (IMAGE, "pixel", {"output": "diagonal"}),
    "diagonal, patches": (IMAGE, "pixel", {"output": "diagonal", "patch_size": 2}),
    "diagonal in DCT": (IMAGE, "dct", {"output": "diagonal"}),
    "diagonal of tokens": (TOKENS, "pixel", {"output": "diagonal"}),
    "second moment": (IMAGE, "pixel", {"target": "norm"}),
    "second moment, DCT prior": (IMAGE, "dct", {"target": "norm"}),
}
SCHEDULERS = {
    "epsilon": SchedulerCase("DDIMScheduler", {}),
    "v_prediction": SchedulerCase("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "sample": SchedulerCase("DDIMScheduler", {"prediction_type": "sample"}),
    "k-diffusion": SchedulerCase("EulerDiscreteScheduler", {}),
    "flow": SchedulerCase("FlowMatchEulerDiscreteScheduler", {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def state_of(data, scheduler, timesteps, seed=1, dtype=torch.float64):
    """Returns a state of the ideal denoiser, with one timestep per sample."""
    denoiser = GaussianDenoiser(data, scheduler)
    timesteps = torch.tensor(timesteps, dtype=torch.float64)
    level = denoiser.level(timesteps)
    clean = data.sample(len(timesteps), seeded(seed))
    noise = torch.randn(clean.shape, generator=seeded(seed + 1), dtype=torch.float64)
    alpha, sigma = (value.view(-1, *[1] * len(data.shape)) for value in (level.alpha, level.sigma))
    return denoiser.state((alpha * clean + sigma * noise).to(dtype), timesteps)


def make(name, **changes):
    case = SCHEDULERS[name]
    return case.parent(**{**case.config, **changes})


# Before training, and at both ends of the noise


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_model_is_exact_on_gaussian_data(kind, scheduler):
    shape, basis, settings = KINDS[kind]
    data = GaussianData(shape, basis)
    state = state_of(data, make(scheduler), [200.0, 500.0, 900.0])
    r = data.model(**settings).unexplained_noise_fraction(state)
    assert r.shape == (3,)
    assert r.dtype is torch.float64
    # float32; from a second moment r is a difference of numbers 1/s^2 (here up to 3) times larger.
    assert torch.allclose(r, data.r(state.level, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [name for name in KINDS if "moment" not in name])
def test_both_ends_are_right_for_every_output_of_the_network(kind):
    shape, basis, settings = KINDS[kind]
    model = disturb(GaussianData(shape, basis).model(**settings), 1.0)
    noise_to_signal = torch.logspace(-5, 5, 11, dtype=torch.float64)
    level = NoiseLevel.from_log_noise_to_signal(noise_to_signal.log())
    x = torch.randn(11, *shape, generator=seeded(), dtype=torch.float64)
    state = DenoisingState(x, 0.3 * x, level, Prediction("v_prediction"))
    r = model.unexplained_noise_fraction(state)
    assert bool(((r > 0) & (r < 1)).all())
    variance = r / (1 - r) * noise_to_signal**2  # the effective variance lies within exp(+-12) of the prior's
    bound = torch.tensor(12.0).exp()
    assert bool(((variance > 0.02 / bound) & (variance < 1.1 * bound)).all())
    assert float(1 - r[0]) < 5e-9 * float(bound)  # s^2 = 1e-10 over the least variance
    assert float(r[-1]) < 2e-10 * float(bound)


def test_same_noised_sample_gives_the_same_r_in_every_scheduler():
    """A model knows only x_t divided by its norm and log(sigma/alpha) of the schedule."""
    data = GaussianData()
    model = disturb(data.model())
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    r = model.unexplained_noise_fraction(state)
    for factor, prediction in (
        (1 / state.level.alpha, "epsilon"),
        (1 / (state.level.alpha + state.level.sigma), "flow_prediction"),
    ):
        level = state.level.scaled(factor)
        sample = factor.view(-1, 1, 1, 1) * state.sample
        output = state.epsilon if prediction == "epsilon" else state.epsilon - state.pred_original_sample
        other = DenoisingState(sample, output, level, Prediction(prediction))
        assert torch.allclose(model.unexplained_noise_fraction(other), r, rtol=1e-5)  # float32


def test_diagonal_averages_to_r_and_one_network_gives_both():
    for basis in ("pixel", "dct"):
        data = GaussianData(basis=basis)
        model = disturb(data.model(output="diagonal"))
        state = state_of(data, make("epsilon"), [300.0, 700.0])
        logits = model.evaluate(state).logits
        assert logits.shape == state.sample.shape
        assert torch.allclose(
            model.unexplained_noise_fraction(state), logits.double().sigmoid().flatten(1).mean(1), rtol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_each_other(kind):
    shape, basis, settings = KINDS[kind]
    data = GaussianData(shape, basis)
    model = disturb(data.model(**settings))
    state = state_of(data, make("v_prediction"), [400.0, 600.0, 800.0])
    single = dataclasses.replace(
        state, sample=state.sample[1:2], model_output=state.model_output[1:2],
        level=NoiseLevel(state.level.alpha[1:2], state.level.sigma[1:2]),
    )  # fmt: skip
    assert torch.allclose(
        model.unexplained_noise_fraction(single), model.unexplained_noise_fraction(state)[1:2], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("output", ["trace", "diagonal"])
@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_other_sizes_take_interpolated_variances(basis, output):
    model = disturb(GaussianData(basis=basis).model(output=output), 0.1)
    for size in ((6, 8), (5, 3)):
        x = torch.randn(2, 2, *size, generator=seeded())
        state = DenoisingState(x, x, NoiseLevel.from_log_noise_to_signal(torch.zeros(())), Prediction("epsilon"))
        assert bool(
            ((model.unexplained_noise_fraction(state) > 0) & (model.unexplained_noise_fraction(state) < 1)).all()
        )
    flat = FisherTraceModel(**SMALL, in_channels=2, basis=basis, output=output, prior_shape=(2, 4, 4))
    flat.set_prior(0.0, 0.5)  # the interpolation of equal values is exact
    level = NoiseLevel.from_log_noise_to_signal(torch.zeros((), dtype=torch.float64))
    r = flat.unexplained_noise_fraction(DenoisingState(x, x, level, Prediction("epsilon")))
    assert torch.allclose(r, torch.full((2,), 1 / 3, dtype=torch.float64), rtol=1e-6)


def test_tokens_of_another_number_need_statistics_per_channel():
    data = GaussianData(TOKENS)
    x = torch.randn(2, 9, 3, generator=seeded())
    state = DenoisingState(x, x, NoiseLevel.from_log_noise_to_signal(torch.zeros(())), Prediction("epsilon"))
    with pytest.raises(
        InputError,
        match=r"statistics of 6 tokens of 3 channels, samples have 9 of 3; allowed: 6 tokens, so images of the size "
        r"it was trained on\. For other sizes train one with statistics per channel \(`prior: channel`\)",
    ):
        data.model().unexplained_noise_fraction(state)
    model = FisherTraceModel(**SMALL, in_channels=3, layout="tokens")
    model.set_prior(0.0, 0.5)
    assert torch.allclose(
        model.unexplained_noise_fraction(state), torch.full((2,), 1 / 3, dtype=torch.float64), rtol=1e-6
    )


# Inputs


def test_inputs_are_bounded_up_to_pure_noise():
    """This holds for every prediction type, and for pure noise (alpha = 0), where a model's output is not zero."""
    x = torch.randn(3, *IMAGE, generator=seeded())
    level = NoiseLevel(torch.tensor([0.0, 1e-6, 0.999]).double(), torch.tensor([1.0, 1.0, 0.04]).double())
    for kind in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        output = 0.9 * x
        state = DenoisingState(x, output, level, Prediction(kind))
        inputs = trace_inputs(state)
        assert all(bool(torch.isfinite(value).all()) for value in inputs.values())
        assert float(inputs["original"].abs().max()) < 50
        r = GaussianData().model().unexplained_noise_fraction(state)
        assert float(r[0]) < 1e-15


def test_zero_terminal_snr_ends_in_zero_r():
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, **ZERO_SNR)
    data = GaussianData()
    state = state_of(data, scheduler, [0.0, 999.0])
    assert float(data.model().unexplained_noise_fraction(state)[1]) < 1e-15


def test_prediction_and_sample_both_matter_to_a_trained_network():
    data = GaussianData()
    model, sample_model = disturb(data.model()), disturb(data.model(use_prediction=False))
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    other = dataclasses.replace(state, model_output=state.model_output + 0.5)
    assert not torch.equal(model.unexplained_noise_fraction(state), model.unexplained_noise_fraction(other))
    assert torch.equal(sample_model.unexplained_noise_fraction(state), sample_model.unexplained_noise_fraction(other))
    assert set(trace_inputs(state)) == {"sample", "log_noise", "original", "epsilon"}


def with_features(state, seed=3):
    features = 3 + 2 * torch.randn(len(state.sample), 6, generator=seeded(seed))
    return dataclasses.replace(state, features=features)


@pytest.mark.parametrize("kind", ["trace", "diagonal in DCT", "diagonal of tokens", "second moment"])
def test_features_change_the_output_if_the_state_has_some(kind):
    shape, basis, settings = KINDS[kind]
    data = GaussianData(shape, basis)
    model = disturb(data.model(feature_channels=6, **settings))
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    feature_state, other_state = with_features(state), with_features(state, 4)
    assert not torch.equal(
        model.unexplained_noise_fraction(feature_state), model.unexplained_noise_fraction(other_state)
    )
    assert not torch.equal(model.unexplained_noise_fraction(feature_state), model.unexplained_noise_fraction(state))
    single = dataclasses.replace(
        feature_state, sample=feature_state.sample[1:], model_output=feature_state.model_output[1:],
        level=NoiseLevel(feature_state.level.alpha[1:], feature_state.level.sigma[1:]),
        features=feature_state.features[1:],
    )  # fmt: skip
    assert torch.allclose(
        model.unexplained_noise_fraction(single),
        model.unexplained_noise_fraction(feature_state)[1:],
        rtol=1e-4,
        atol=1e-6,
    )  # float32, other batch
    featureless = disturb(data.model(**settings))
    assert torch.equal(
        featureless.unexplained_noise_fraction(feature_state), featureless.unexplained_noise_fraction(state)
    )


def test_features_are_standardised_at_their_own_level():
    """Average features at any level, also between two levels of the statistics, count as zero."""
    data = GaussianData()
    levels = torch.linspace(-4, 4, 48)
    mean, deviation = levels[:, None] * torch.arange(6), 0.1 + torch.rand(48, 6, generator=seeded())
    model = disturb(data.model(feature_channels=6))
    model.set_feature_statistics(levels, mean, deviation)
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    log_noise = state.level.log_noise_to_signal.float()
    average = log_noise[:, None] * torch.arange(6)
    head_inputs = []
    model.summaries.head.register_forward_pre_hook(lambda module, inputs: head_inputs.append(inputs[0]))
    model.unexplained_noise_fraction(dataclasses.replace(state, features=average))
    assert float(head_inputs[0].abs().max()) < 1e-4  # float32
    nodes = dataclasses.replace(state, level=NoiseLevel.from_log_noise_to_signal(levels[[2, 9]].double()))
    model.unexplained_noise_fraction(dataclasses.replace(nodes, features=mean[[2, 9]] + 0.5 * deviation[[2, 9]]))
    assert torch.allclose(head_inputs[1], torch.full((2, 6), 0.5), atol=1e-3)  # 1e-5 is added to deviations
    model.unexplained_noise_fraction(dataclasses.replace(nodes, features=mean[[2, 9]] + 1e4))
    assert torch.allclose(head_inputs[2], torch.full((2, 6), 8.0))
    low = NoiseLevel.from_log_noise_to_signal(torch.tensor([-9.0, 9.0], dtype=torch.float64))
    model.unexplained_noise_fraction(
        dataclasses.replace(state, level=low, features=mean[[0, 47]])
    )  # levels beyond the ends count as the ends
    assert float(head_inputs[3].abs().max()) < 1e-4


STATISTICS = {
    "shape": ({"mean": torch.zeros(48, 5)}, r"`mean` has shape \(48, 5\); allowed: \(48, 6\)"),
    "number": ({"deviation": torch.full((48, 6), torch.nan)}, "`deviation` holds NaN or infinity"),
    "order": ({"log_noise": torch.linspace(4, -4, 48)}, "rising `log_noise`"),
    "sign": ({"deviation": -torch.ones(48, 6)}, "`deviation` not below zero"),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_features_that_do_not_fit_are_refused(kind):
    changes, message = STATISTICS[kind]
    statistics = {"log_noise": torch.linspace(-4, 4, 48), "mean": torch.zeros(48, 6), "deviation": torch.ones(48, 6)}
    model = GaussianData().model(feature_channels=6)
    model.set_feature_statistics(**statistics)
    with pytest.raises(InputError, match=message):
        model.set_feature_statistics(**{**statistics, **changes})
    assert torch.equal(model.summaries.statistics.deviation, torch.ones(48, 6))
    with pytest.raises(InputError, match="takes no features"):
        GaussianData().model().set_feature_statistics(**statistics)


def test_features_of_another_width_are_refused():
    data = GaussianData()
    state = with_features(state_of(data, make("epsilon"), [300.0, 700.0]))
    with pytest.raises(InputError, match=r"`features` has shape \(2, 6\); allowed: \(2, 7\)"):
        data.model(feature_channels=7).unexplained_noise_fraction(state)


def test_pooled_vector_changes_the_output():
    data = GaussianData()
    model = disturb(data.model(pooled_channels=5))
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    pooled = torch.randn(2, 5, generator=seeded())
    r = model.unexplained_noise_fraction(state, pooled)
    assert not torch.equal(r, model.unexplained_noise_fraction(state, pooled.flip(0)))
    assert torch.equal(
        model.unexplained_noise_fraction(state, pooled[:1]),
        model.unexplained_noise_fraction(state, pooled[:1].expand(2, 5)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_agree_with_float32(dtype):
    data = GaussianData()
    state = state_of(data, make("epsilon"), [300.0, 700.0], dtype=torch.float32)
    model = disturb(data.model(), 0.1)
    r = model.unexplained_noise_fraction(state)
    low = model.to(dtype).unexplained_noise_fraction(state)
    assert low.dtype is torch.float64
    assert torch.allclose(low, r, rtol=0.05)  # bfloat16 has eight bits; the prior is evaluated in float32


def test_evaluation_builds_no_graph_and_training_does():
    data = GaussianData()
    model = data.model()
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    assert not model.evaluate(state).logits.requires_grad
    assert model(**trace_inputs(state)).logits.requires_grad


# Files


def test_a_saved_model_is_loaded_unchanged(tmp_path):
    for kind in ("trace", "diagonal in DCT", "diagonal of tokens", "trace with features"):
        shape, basis, settings = KINDS[kind]
        data = GaussianData(shape, basis)
        model = disturb(data.model(**settings))
        model.save_pretrained(tmp_path)
        loaded_model = FisherTraceModel.from_pretrained(tmp_path)
        state = with_features(state_of(data, make("epsilon"), [300.0, 700.0]))
        assert torch.equal(loaded_model.unexplained_noise_fraction(state), model.unexplained_noise_fraction(state))
        assert {k: loaded_model.config[k] for k in SMALL} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()
        }
        assert not loaded_model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_config_lies_in_the_safetensors_metadata_too(tmp_path):
    GaussianData().model(target="jacobian").save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == json.loads((tmp_path / "config.json").read_text())
    assert json.loads(metadata["config"])["target"] == "jacobian"
    assert json.loads(metadata["config"])["_class_name"] == "FisherTraceModel"


def test_loading_takes_a_dtype(tmp_path):
    GaussianData().model().save_pretrained(tmp_path)
    assert FisherTraceModel.from_pretrained(tmp_path, dtype=torch.float16).dtype is torch.float16


def test_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = GaussianData().model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers_fisher.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        disturb(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_processes_write_nothing(tmp_path):
    GaussianData().model().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_refused(tmp_path):
    GaussianData().model().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="may be truncated"):
        FisherTraceModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        FisherTraceModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="not the config of a trace model"):
        FisherTraceModel.from_pretrained(tmp_path)


def test_pickles_and_shards_are_refused(tmp_path):
    for options in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(InputError, match=f"one safetensors file; got .*{next(iter(options))}"):
            GaussianData().model().save_pretrained(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_push_to_hub_writes_the_model_card(monkeypatch):
    files = {}

    def upload(self, folder, repo_id, **kwargs):
        files.update({name: Path(folder, name).read_text() for name in ("README.md", "config.json")})
        return "https://example.com/" + repo_id

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **kwargs: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(FisherTraceModel, "_upload_folder", upload)
    model = GaussianData().model()
    model.set_fingerprint(tiny.stable_diffusion())
    assert model.push_to_hub("me/trace", description="Trained on tests.") == "https://example.com/me/trace"
    card = files["README.md"]
    for words in ("library_name: diffusers_fisher", "Target: `residual`", "the **data's** r", "Trained on tests.",
                  'from_pretrained("me/trace")', "UNet2DConditionModel"):  # fmt: skip
        assert words in card
    assert json.loads(files["config.json"])["fingerprint"]["denoiser"] == "UNet2DConditionModel"


def test_class_is_the_package_s_and_importing_the_package_loads_no_models():
    assert FisherTraceModel.__module__ == "diffusers_fisher"
    code = (
        "import sys, diffusers_fisher; from diffusers_fisher import TraceMatchingFisher;"
        "loaded = [name for name in sys.modules if name.startswith('diffusers.models')];"
        "from diffusers_fisher import FisherTraceModel;"
        "print(len(loaded), 'diffusers.models.modeling_utils' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["0", "True"]


# Bad input


def test_state_of_another_prediction_type_is_refused():
    model = GaussianData().model()
    model.set_fingerprint(tiny.stable_diffusion())
    state = state_of(GaussianData(), make("v_prediction"), [300.0])
    with pytest.raises(InputError, match="trained for prediction type 'epsilon', the state has 'v_prediction'"):
        model.unexplained_noise_fraction(state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "video"}, "`layout` is 'video'; allowed: image, tokens"),
        ({"target": "score"}, "`target` is 'score'; allowed: residual, jacobian, norm"),
        ({"output": "matrix"}, "`output` is 'matrix'; allowed: trace, diagonal"),
        ({"basis": "fft"}, "`basis` is 'fft'; allowed: pixel, dct"),
        ({"target": "norm", "output": "diagonal"}, "Target 'norm' gives the trace alone"),
        ({"layout": "tokens", "basis": "dct"}, "Packed tokens do not say how they lie"),
        ({"block_out_channels": ()}, r"`block_out_channels` is \[\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        FisherTraceModel(**settings)


@pytest.mark.parametrize(
    ("mean", "variance", "words"),
    [
        (torch.zeros(3, 1, 1), 1.0, r"mean has shape \(3, 1, 1\); allowed: what broadcasts to \(2, 4, 4\)"),
        (0.0, -1.0, "not negative"),
        (0.0, float("nan"), "must be finite"),
        (0.0, 0.0, "zero everywhere"),
    ],
)
def test_priors_that_do_not_fit_are_refused(mean, variance, words):
    with pytest.raises(InputError, match=words):
        GaussianData().model().set_prior(mean, variance)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2, 3, 4, 4), r"allowed: \(B, 2, H, W\)"), ((2, 6, 2), r"allowed: \(B, 2, H, W\)")],
)
def test_samples_that_do_not_fit_are_refused(shape, words):
    x = torch.zeros(shape)
    state = DenoisingState(x, x, NoiseLevel.from_log_noise_to_signal(torch.zeros(())), Prediction("epsilon"))
    with pytest.raises(InputError, match=words):
        GaussianData().model().unexplained_noise_fraction(state)


def test_other_inputs_that_do_not_fit_are_refused():
    data = GaussianData()
    state = state_of(data, make("epsilon"), [300.0, 700.0])
    with pytest.raises(InputError, match=r"`pooled` has shape \(2, 5\); allowed: None"):
        data.model().unexplained_noise_fraction(state, torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"`pooled` has shape None; allowed: \(2, 5\)"):
        data.model(pooled_channels=5).unexplained_noise_fraction(state)
    inputs = trace_inputs(state)
    with pytest.raises(InputError, match="takes the denoiser's predictions"):
        data.model()(inputs["sample"], inputs["log_noise"])
    x = torch.zeros(1, 2, 5, 4)
    odd_state = DenoisingState(x, x, NoiseLevel.from_log_noise_to_signal(torch.zeros(())), Prediction("epsilon"))
    with pytest.raises(InputError, match="multiples of the trace model's `patch_size`, 2"):
        data.model(patch_size=2).unexplained_noise_fraction(odd_state)
    tokens = GaussianData(TOKENS)
    x = torch.zeros(1, 5, 3)
    with pytest.raises(InputError, match="prior has statistics of 6 tokens"):
        tokens.model().unexplained_noise_fraction(
            DenoisingState(x, x, NoiseLevel.from_log_noise_to_signal(torch.zeros(())), Prediction("epsilon"))
        )
