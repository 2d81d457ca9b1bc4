"""The trace model: a small network that knows the trace of the diffusion Fisher without differentiating the denoiser.

Notation: x_t = alpha x_0 + sigma eps, s = sigma/alpha, r(x, t) = tr Cov[eps|x_t]/d, so that tr F = d (1 - r)/sigma^2
(Wang et al., ICML 2025, arXiv 2505.23264, DF-TM; per-pixel residuals: Bao et al., 2206.07309).
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, BaseOutput

from ..denoiser import Denoiser
from ..errors import CheckpointError, InputError, check_shape
from ..files import check_safetensors, read_table, save_tensors, write_text
from ..fisher.calibration import TraceCalibration
from ..fisher.trace_matching import LOG_NOISE_RANGE, noise_shares
from ..noise import DenoisingState, NoiseLevel, expand
from .card import model_card
from .encoders import FeatureEncoder, ImageEncoder, NoiseEmbedding, PixelHead, SpectralHead, TokenEncoder, TraceHead
from .fingerprint import check_fingerprint, denoiser_fingerprint
from .prior import GaussianPrior

TARGETS = ("residual", "jacobian", "norm")
LAYOUTS = ("image", "tokens")
OUTPUTS = ("trace", "diagonal")
BASES = ("pixel", "dct")

MAX_LOG_RATIO = 12.0  # largest |g|: by so much log v may differ from the prior's
LEAST_ALPHA = 1e-3  # relative to the level's norm, where x_0 is computed
FADING_NOISE = 10.0  # the predicted x_0 is divided by sqrt(1 + (s/10)^2)
MIXED_FREQUENCIES = 16


@dataclasses.dataclass
class FisherTraceOutput(BaseOutput):
    """The trace model's output for a batch, float32. One of the two fields is set.

    Args:
        logits: logits of r, (B,), or logits of the diagonal of Cov[eps|x_t] in the model's basis, (B, ...).
        second_moment: E[|x_0|^2/d | x_t], (B,), from models of target "norm".
    """

    logits: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None


class FisherTraceModel(ModelMixin, ConfigMixin):
    """Estimates r(x, t) = tr Cov[eps|x_t]/d from a noisy sample, its noise level and the denoiser's prediction there.

    The model computes an effective variance v: r = v/(v + s^2) with v = v_0 exp(g). v_0 belongs to independent
    Gaussian coordinates with the data's variances (`set_prior`). g is the network's output, which starts at zero. So r
    goes to 1 as s -> 0 and to v/s^2 as s -> infinity for every output of the network, and an untrained model is right
    on Gaussian data. With `output="diagonal"` every coordinate has its own v, and r is the mean.

    Some values are limited: r stays in (0, 1), though the true r may exceed 1 between two modes; |g| < 12; the network
    takes log s in [-8, 8] (the prior takes all of it); variances of the prior are at least 1e-6 of their mean. Models
    of target "norm" give E[|x_0|^2/d | x_t] as the sum of the prior's and the network's, trained by the squared error
    as in the paper; their r has no limits.

    The model depends on log(sigma/alpha) and not on the timestep, so it serves every sampler and schedule of the
    denoiser.

    Args:
        in_channels: C of samples (B, C, H, W), or of packed tokens (B, N, C).
        layout: "image" or "tokens".
        target: what the model is trained on: "residual" (the data's r, from squared errors of the denoiser),
            "jacobian" (the denoiser's own r, from random probes) or "norm" (the paper's target).
        output: "trace", or "diagonal".
        basis: coordinates of the prior's variances and of the diagonal: "pixel" (the sample's own) or "dct" (discrete
            cosine transform over the image).
        block_out_channels: channels of every stage; each stage has half the size of the one before. Encoders of
            tokens take the first number as their width, and have as many stages.
        layers_per_block: number of blocks per stage.
        patch_size: side of the square patches that the first layer takes (images).
        head_channels, time_channels: widths of the head and of the embedding of the noise level.
        pooled_channels: length of an additional vector per sample, such as a pooled text embedding; None means that
            the model takes none.
        use_prediction: also take the denoiser's predicted noise and x_0, which every step of a sampler knows.
        feature_channels: count of numbers per sample that sum up the denoiser's last hidden layer, which its Jacobian
            goes through (`DenoisingState.features`, by `PipelineDenoiser`); None means that the model takes none.
            States without features are taken too, with the accuracy of a model that takes none.
        prior_shape: shape of the prior's statistics; None means one number per channel. With (N, C), for tokens, the
            model takes samples of N tokens alone.
        fingerprint: fingerprint of the denoiser, see `diffusers_fisher.models.denoiser_fingerprint`; None means that
            the model serves every denoiser.
        calibration: errors of the trained model on held-out images, the fields of `TraceCalibration`; None before
            they are measured (`calibrate_trace_model`).
    """

    config_name = "config.json"  # type: ignore[assignment]
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["prior", "statistics"]  # type: ignore[assignment]  # noqa: RUF012 - diffusers' attribute

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        layout: str = "image",
        target: str = "residual",
        output: str = "trace",
        basis: str = "pixel",
        block_out_channels: Sequence[int] = (32, 64, 128),
        layers_per_block: int = 1,
        patch_size: int = 1,
        head_channels: int = 128,
        time_channels: int = 64,
        pooled_channels: int | None = None,
        use_prediction: bool = True,
        feature_channels: int | None = None,
        prior_shape: Sequence[int] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        _check_choices(layout, target, output, basis)
        channels = list(block_out_channels)
        if not channels or min(channels) < 1 or patch_size < 1 or layers_per_block < 1:
            raise InputError(
                f"`block_out_channels` is {channels}, `patch_size` {patch_size}, `layers_per_block` "
                f"{layers_per_block}; allowed: one stage or more, all positive."
            )
        inputs = in_channels * (3 if use_prediction else 1)
        self.embedding = NoiseEmbedding(time_channels, pooled_channels)
        kind = ImageEncoder if layout == "image" else TokenEncoder
        self.encoder = kind(inputs, channels, layers_per_block, patch_size, time_channels)
        spectral = output == "diagonal" and basis == "dct"
        numbers = 1 + (MIXED_FREQUENCIES if spectral else 0)
        self.summaries = (
            None if feature_channels is None else FeatureEncoder(feature_channels, time_channels, head_channels)
        )
        width = self.encoder.features + inputs + (0 if feature_channels is None else head_channels)
        self.head = TraceHead(width, time_channels, head_channels, numbers)
        self.map: PixelHead | SpectralHead | None = None
        if spectral:
            self.map = SpectralHead(in_channels, MIXED_FREQUENCIES)
        elif output == "diagonal":
            self.map = PixelHead(self.encoder, head_channels, in_channels)
        default = (in_channels, 1, 1) if layout == "image" else (1, in_channels)
        self.prior = GaussianPrior(tuple(prior_shape) if prior_shape is not None else default, basis)

    @property
    def target(self) -> str:
        """The target of the training: "residual", "jacobian" or "norm"."""
        return self.config["target"]

    def set_prior(self, mean: torch.Tensor | float, variance: torch.Tensor | float) -> None:
        """Sets the data's mean (in the sample's own coordinates) and variances (in `basis`), before training.

        Both broadcast to `prior_shape`. `GaussianFisher.fit_diagonal(samples, dct=...)` measures them.

        Raises:
            InputError: shapes do not fit, or values are no mean and variance.
        """
        self.prior.set(mean, variance)

    def set_feature_statistics(self, log_noise: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Sets the statistics of the denoiser's features on training data by level, before training.

        Args:
            log_noise: (48,) rising log(sigma/alpha).
            mean, deviation: (48, feature_channels).

        Raises:
            InputError: the model takes no features, or values do not fit.
        """
        if self.summaries is None:
            raise InputError("This trace model takes no features; make it with `feature_channels`.")
        self.summaries.statistics.set(log_noise, mean, deviation)

    def forward(
        self,
        sample: torch.Tensor,
        log_noise: torch.Tensor,
        original: torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
    ) -> FisherTraceOutput:
        """Evaluates the network; `trace_inputs(state)` gives all arguments but `pooled`.

        Args:
            sample: (B, ...), variance preserving: x_t/sqrt(alpha^2 + sigma^2).
            log_noise: (B,) log(sigma/alpha), float32.
            original, epsilon: (B, ...) the denoiser's predictions; x_0 is divided as by `trace_inputs`.
            features: (B, feature_channels) of the denoiser's last hidden layer. Models that take none ignore them.
            pooled: (B, pooled_channels).

        Raises:
            InputError: the model does not take the shape of an input, or an input is missing.
        """
        x = self._input(sample, original, epsilon)
        width = self.config["pooled_channels"]
        got = None if pooled is None else tuple(pooled.shape)
        allowed = None if width is None else (len(sample), width)
        if got != allowed:
            raise InputError(f"`pooled` has shape {got}; allowed: {allowed}, by the trace model's `pooled_channels`.")
        embedding = self.embedding(log_noise, pooled)
        vector, stem, h = self.encoder(x, embedding)
        axes = (2, 3) if self.config["layout"] == "image" else (1,)
        energies = (x.float().square().mean(axes) + 1e-6).log().to(x.dtype)
        vectors = [vector, energies]
        if self.summaries is not None:
            if features is not None:
                sizes = (len(sample), self.config["feature_channels"])
                check_shape("`features`", features.shape, sizes, "Use the denoiser that the model was trained for.")
            vectors.append(self.summaries(features, log_noise, embedding))
        numbers = self.head(torch.cat(vectors, dim=1), embedding)
        shape = sample.shape[1:]
        if self.config["target"] == "norm":
            moment = self.prior.second_moment(sample, log_noise)
            scale = (self.prior.mean.float().square() + self.prior.variance.float()).mean()
            return FisherTraceOutput(second_moment=moment + scale * numbers[:, 0].float())
        if self.map is None:
            return FisherTraceOutput(logits=self.prior.mean_logit(log_noise, shape) + _limit(numbers[:, 0]))
        common = numbers[:, 0].view(-1, *[1] * len(shape))
        deviations = self.map(numbers[:, 1:], shape) if isinstance(self.map, SpectralHead) else self.map(stem, h)
        return FisherTraceOutput(logits=self.prior.logits(log_noise, shape) + _limit(common + deviations))

    def evaluate(self, state: DenoisingState, pooled: torch.Tensor | None = None) -> FisherTraceOutput:
        """Returns the output at a denoising state, without a graph.

        Cost: one evaluation of this model, none of the denoiser.

        Raises:
            InputError: the model does not take the sample or `pooled`, or was trained for another prediction type.
        """
        expected = (self.config["fingerprint"] or {}).get("prediction_type")
        if expected is not None and expected != state.prediction.kind:
            raise InputError(
                f"The trace model was trained for prediction type '{expected}', the state has "
                f"'{state.prediction.kind}'. Use the denoiser it was trained for, or set the scheduler's "
                "`prediction_type` right."
            )
        inputs = {name: value.to(self.device) for name, value in trace_inputs(state).items()}
        if pooled is not None:
            pooled = pooled.to(self.device).expand(len(state.sample), -1)
        with torch.no_grad():
            return self.forward(**inputs, pooled=pooled)

    def unexplained_noise_fraction(self, state: DenoisingState, pooled: torch.Tensor | None = None) -> torch.Tensor:
        """Returns tr Cov[eps|x_t]/d at a state, (B,) float64. Cost and errors are those of `evaluate`."""
        return noise_shares(self.evaluate(state, pooled), state)[0].reshape(len(state.sample), -1).mean(1)

    # Denoisers

    def set_fingerprint(self, denoiser: Denoiser | DiffusionPipeline) -> None:
        """Stores the fingerprint of `denoiser` (a pipeline or `PipelineDenoiser`) in the config."""
        self.register_to_config(fingerprint=denoiser_fingerprint(denoiser))

    def set_calibration(self, calibration: TraceCalibration) -> None:
        """Stores the errors of the trained model on held-out images in the config."""
        self.register_to_config(calibration=dataclasses.asdict(calibration))

    def check_fingerprint(self, denoiser: Denoiser | DiffusionPipeline) -> None:
        """Refuses a denoiser that this model was not trained for. A model without a fingerprint takes every denoiser.

        Raises:
            InputError: says what differs.
        """
        check_fingerprint(self.config["fingerprint"], denoiser)

    # Files

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes `diffusion_pytorch_model.safetensors` (config in its metadata) and `config.json`, each atomically.

        Raises:
            InputError: an option differs from diffusers' `safe_serialization=True` and `variant=None`.
        """
        defaults = {"safe_serialization": True, "variant": None, "save_function": None, "push_to_hub": False}
        options = sorted(key for key, value in kwargs.items() if key not in defaults or value != defaults[key])
        if options:
            raise InputError(
                f"Trace models are saved as one safetensors file; got {options}. Leave these out, and use push_to_hub "
                "to publish."
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(self.to_json_string())
        config.pop("_name_or_path", None)  # the folder on this machine that the model was loaded from
        metadata = {"format": "pt", "config": json.dumps(config)}
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, self.state_dict(), metadata)
        write_text(folder / self.config_name, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> FisherTraceModel:
        """Loads a model as `ModelMixin.from_pretrained` of diffusers does, from a folder or from the Hub.

        Raises:
            CheckpointError: a file of a local folder is missing or truncated.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if Path(pretrained_model_name_or_path).is_dir():
            if "in_channels" not in read_table(folder / cls.config_name):
                raise CheckpointError(f"'{folder / cls.config_name}' is not the config of a trace model.")
            if not kwargs.get("variant"):
                check_safetensors(folder / SAFETENSORS_WEIGHTS_NAME)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        description: str = "",
    ) -> str:
        """Publishes the model with a card that says what it estimates and for which denoiser.

        Args:
            description: text for the card: the denoiser's name, data, training, measured errors.
        """
        from diffusers.utils.hub_utils import create_repo

        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            if not subfolder:
                card = model_card(repo_id, dict(self.config), description)
                Path(folder, "README.md").write_text(card, encoding="utf-8")
            return self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
            )

    def _input(
        self, sample: torch.Tensor, original: torch.Tensor | None, epsilon: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the encoder's input in its dtype, with all channels side by side."""
        config = self.config
        layout, channels = config["layout"], config["in_channels"]
        axis, count = (1, 4) if layout == "image" else (2, 3)
        if sample.ndim != count or sample.shape[axis] != channels:
            allowed = f"(B, {channels}, H, W)" if layout == "image" else f"(B, N, {channels})"
            raise InputError(
                f"The trace model got samples of shape {tuple(sample.shape)}; allowed: {allowed}, its layout "
                f"'{layout}'."
            )
        parts = [sample]
        if config["use_prediction"]:
            if original is None or epsilon is None:
                raise InputError(
                    "This trace model takes the denoiser's predictions; pass `original` and `epsilon`, as "
                    "trace_inputs(state) gives them, or make it with use_prediction=False."
                )
            parts += [original, epsilon]
        return torch.cat([part.to(self.dtype) for part in parts], dim=axis)


def trace_inputs(state: DenoisingState) -> dict[str, torch.Tensor]:
    """Returns the arguments of `FisherTraceModel.forward` at a state, detached, float32 or the state's own dtype.

    All are of order one at every level: x_t divided by its norm, the predicted noise, and the predicted x_0 divided by
    sqrt(1 + (s/10)^2), since it has s times the error of the predicted noise.
    """
    sample = state.sample.detach()
    level = state.level
    norm = level.norm
    safe_state = dataclasses.replace(
        state, sample=sample, model_output=state.model_output.detach(),
        level=NoiseLevel(level.alpha.clamp_min(LEAST_ALPHA * norm), level.sigma),
    )  # fmt: skip
    fading = 1 / torch.hypot(torch.ones_like(norm), safe_state.level.noise_to_signal / FADING_NOISE)
    log_noise = level.log_noise_to_signal.clamp(-LOG_NOISE_RANGE, LOG_NOISE_RANGE)
    features = {} if state.features is None else {"features": state.features}
    return features | {
        "sample": sample / expand(norm, sample),
        "log_noise": log_noise.to(sample.device, torch.float32).expand(len(sample)),
        "original": safe_state.pred_original_sample * expand(fading, sample),
        "epsilon": safe_state.epsilon,
    }


def _limit(g: torch.Tensor) -> torch.Tensor:
    """Returns g for small g, and at most `MAX_LOG_RATIO` in magnitude."""
    return MAX_LOG_RATIO * torch.tanh(g.float() / MAX_LOG_RATIO)


def _check_choices(layout: str, target: str, output: str, basis: str) -> None:
    for name, value, allowed in (
        ("layout", layout, LAYOUTS), ("target", target, TARGETS), ("output", output, OUTPUTS), ("basis", basis, BASES)
    ):  # fmt: skip
        if value not in allowed:
            raise InputError(f"`{name}` is '{value}'; allowed: {', '.join(allowed)}.")
    if target == "norm" and output == "diagonal":
        raise InputError("Target 'norm' gives the trace alone; use output='trace', or target 'residual'.")
    if layout == "tokens" and basis == "dct":
        raise InputError("Packed tokens do not say how they lie in the image; use basis='pixel'.")


FisherTraceModel.__module__ = "diffusers_fisher"
