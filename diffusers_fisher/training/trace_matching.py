"""Trains a trace model (DF-TM; Wang et al., ICML 2025, arXiv 2505.23264) for a frozen denoiser.

    accelerate launch -m diffusers_fisher.training.trace_matching --config configs/trace_embedded.yaml

The same command resumes a killed run. It writes to the config's `output`: `trace_model/` (the finished model with
averaged parameters), `loss.jsonl`, `validation.jsonl`, `validation.png`, `report.json` and `checkpoints/`. Every draw
depends on the seed, the step and the sample's place in the batch alone.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..backbones import backbone_of
from ..data import CachedLatents, Images, open_images
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..files import check_writable, write_json
from ..fisher import AutodiffFisher, FiniteDifferenceFisher, FisherEstimator
from ..fisher.calibration import TraceCalibration
from ..jobs.command import config_parser, errors_in_words
from ..jobs.config import flat_settings, load_config
from ..jobs.folder_lock import locked_folder
from ..jobs.identity import autoencoder_note, data_note, note_differences, refuse_differences
from ..jobs.pipelines import load_pipeline
from ..jobs.processes import WAIT, check_process_number, uses_cpu
from ..likelihood.calibration import LEAST_IMAGES, TraceErrors
from ..models import FisherTraceModel
from ..noise import log_noise_to_signal_range, timestep_at
from ..seeds import step_generator
from .checkpoints import TrainingFolder
from .paths import Paths, follow_paths
from .pieces import BatchShare, Piece, TrainingData
from .samples import SampleSpace, drop_captions
from .schedule import learning_rates
from .statistics import fit_features, fit_prior
from .trace_config import TraceMatchingConfig, check_trackers, make_trace_model
from .trace_losses import TraceObjective, draw_trace_batch
from .trace_validation import Validation, plot_validation, validate

logger = get_logger(__name__)

CHANGEABLE_SETTINGS = (
    "output", "trackers", "validation.every", "optimisation.keep_checkpoints", "optimisation.workers",
    "optimisation.gradient_accumulation", "optimisation.save_every", "optimisation.log_every", "denoiser.compile",
)  # fmt: skip
"""Settings that a resumed run may change: the parameters do not depend on them, apart from rounding."""

FEATURELESS_EVERY = 8  # every 8th step is without the denoiser's features, which the states of samplers lack
FEATURE_SAMPLES, FEATURE_PIECE = 64, 8  # samples for the features' statistics, and samples per denoiser call
AUTOENCODER_TOLERANCE = 1e-2  # half precision moves the autoencoder's weights


class TraceMatching:
    """One training run. Everything that can be wrong is checked when the object is made.

    Args:
        config: configuration of the run.
        accelerator: an accelerator with the config's mixed precision.

    Raises:
        InputError: the config, the data or the denoiser can't be used, or the folder holds another run.
        UnsupportedError: the denoiser's schedule is not known.
    """

    def __init__(self, config: TraceMatchingConfig, accelerator: Accelerator):
        config.check(accelerator.num_processes)
        self.config, self.accelerator = config, accelerator
        settings, num_checkpoints = dataclasses.asdict(config), config.optimisation.keep_checkpoints
        self.folder = TrainingFolder(Path(config.output), settings, CHANGEABLE_SETTINGS, num_checkpoints)
        if accelerator.is_main_process:
            check_writable(self.folder.path)
            self.folder.check_settings()
        self.pipe = load_pipeline(config.denoiser).to(accelerator.device)
        self.data = TrainingData(self._source(), config.optimisation, config.validation.samples, config.seed)
        size = config.piece_size(accelerator.num_processes)
        self.space = SampleSpace(self.pipe, config.latents is not None, size)
        self.held_out = self.data.held_out()
        self.space.denoiser(self.held_out.captions, self.held_out.samples)  # refuses wrong captions
        self.model = self._make_model()
        if accelerator.is_main_process:
            self.folder.write_notes(data_note(self.data.source), self.model.config["fingerprint"])
        self.skipped = set(self.folder.skipped)
        if isinstance(self.data.source, CachedLatents):
            self.skipped.update(self.data.source.skipped_images)
        self._note(self.held_out)

    def _make_model(self) -> FisherTraceModel:
        """Makes an untrained trace model and tries it on a sample of the data. Sets `shape`, the shape of a sample."""
        data = self.held_out.samples[:1]
        sample = self.space.pack(data).cpu()
        self.shape = tuple(sample.shape[1:])
        denoiser = self.space.denoiser(self.held_out.captions[:1], data)
        pooled = denoiser.pooled_condition() if self.config.model.pooled else None
        features = features_of(denoiser, self.space.pack(data)).cpu() if self.config.model.features else None
        model = make_trace_model(self.config, denoiser, self.shape, _width(pooled), _width(features))
        with torch.no_grad():
            model.forward(
                sample, torch.zeros(1), original=sample, epsilon=sample, features=features,
                pooled=None if pooled is None else pooled.cpu(),
            )  # fmt: skip
        return model

    def _note(self, piece: Piece) -> Piece:
        """Logs the names of images of a piece that could not be read, each of them once. Returns the piece."""
        for name in piece.skipped:
            if name not in self.skipped:
                logger.warning(f"Image '{name}' can't be read; another image replaces it.", main_process_only=False)
                self.skipped.add(name)
        return piece

    def _source(self) -> Images | CachedLatents:
        config = self.config
        if config.latents is not None:
            cache = CachedLatents(config.latents)
            check_cache(cache, self.pipe)
            return cache
        assert config.data is not None  # checked
        backbone = backbone_of(self.pipe)
        # The other processes use the files that the main process has downloaded.
        with self.accelerator.main_process_first():
            return open_images(config.data, backbone.image_channels, backbone.takes_text)

    def run(self) -> FisherTraceModel:
        """Trains to the end, from the newest checkpoint if there is one; returns the averaged model.

        Raises:
            NumericalError: a loss or gradient is not finite; says which checkpoint is the last good one.
            CheckpointError: a checkpoint can't be written or read.
        """
        config, accelerator, settings = self.config, self.accelerator, self.config.optimisation
        self.model.to(accelerator.device)
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
        )
        average = EMAModel(parameters, decay=settings.ema_decay) if settings.ema_decay else None
        shadow = average.shadow_params if average else []
        modules: dict[str, torch.nn.Module] = {"model": cast(torch.nn.Module, self.model)}
        start = self.folder.resume(modules, optimizer, shadow)
        if average:
            average.optimization_step = start
        if start == 0:
            pieces = self.data.some(config.prior_samples, settings.batch_size)
            fit_prior(self.model, config, map(self._note, pieces), self.space)
            if config.model.features:
                pieces = self.data.some(FEATURE_SAMPLES, FEATURE_PIECE)
                fit_features(self.model, config, map(self._note, pieces), self.space)
        self.paths = self._follow_paths() if config.target == "jacobian" and config.on_path else None
        if accelerator.is_main_process:
            for curve in ("loss", "validation"):
                self.folder.cut(curve, start)
        model, optimizer = accelerator.prepare(self.model.train(), optimizer)
        accelerator.init_trackers("trace_matching", config=_tracker_settings(config))
        try:
            for step in self._steps(model, optimizer, start):
                if average:
                    average.step(parameters)
                num_steps = step + 1
                if num_steps % config.validation.every == 0 and num_steps < settings.steps:
                    self._validate(average, parameters, num_steps)
                if num_steps % settings.save_every == 0 or num_steps == settings.steps:
                    self.skipped.update(gather_object(sorted(self.skipped)))
                    # Save last: a curve ahead of the checkpoint is cut, but a curve behind it would miss an entry.
                    if accelerator.is_main_process:
                        self.folder.skipped = sorted(self.skipped)
                        self.folder.save(modules, optimizer.optimizer, shadow, num_steps)
        except NumericalError as error:
            raise NumericalError(f"{error} Training stopped; {self.folder.last_good}.") from error
        if average:
            average.copy_to(parameters)
        if accelerator.is_main_process:  # before the validation, because that may fail
            self._save_model()
        self._report(self._validate(None, parameters, settings.steps))
        if accelerator.is_main_process and len(self.held_out.captions) >= LEAST_IMAGES:
            self.model.set_calibration(self._calibration())
            self._save_model()
        accelerator.wait_for_everyone()  # the others must not end the group meanwhile
        accelerator.end_training()
        return self.model.eval()

    def _follow_paths(self) -> Paths:
        """Returns the paths. The main process integrates them for all, if the run's folder does not have them yet."""
        path, config = self.folder.path / "paths.safetensors", self.config
        with self.accelerator.main_process_first():
            if not path.exists() and self.accelerator.is_main_process:
                size = config.optimisation.batch_size
                pieces = map(self._note, self.data.some(config.path_images, size))
                progress = tqdm(pieces, "paths", math.ceil(config.path_images / size))
                paths = follow_paths(self.space, progress, config.caption_dropout, config.path_change, config.seed)
                with self.folder.writing(path.name):
                    paths.save(path)
            return Paths.load(path)

    def _steps(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer, start: int) -> Iterator[int]:
        """Takes the steps from `start` on and yields the number of each."""
        accelerator, settings = self.accelerator, self.config.optimisation
        rates = learning_rates(optimizer.optimizer, settings, start)
        share = BatchShare(
            settings.batch_size, accelerator.num_processes, accelerator.process_index, settings.gradient_accumulation
        )
        pieces = iter(self.data.pieces(share, start, settings.workers))
        total = torch.zeros((), device=accelerator.device)
        hidden, steps = not accelerator.is_main_process, range(start, settings.steps)
        progress = tqdm(steps, "trace matching", settings.steps, initial=start, disable=hidden)
        for step in progress:
            for number, part in enumerate(share.slices):
                with accelerator.no_sync(model) if number + 1 < len(share.slices) else contextlib.nullcontext():
                    loss = self._loss(model, next(pieces), step, part) / len(share.slices)
                    accelerator.backward(loss)
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
            if not math.isfinite(float(norm)):
                raise NumericalError(f"The gradient is not finite at step {step}.")
            (rate,) = rates.get_last_lr()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            if (step + 1) % settings.log_every == 0:
                mean = float(accelerator.reduce(total, "mean")) / settings.log_every
                total.zero_()
                progress.set_postfix(loss=f"{mean:.4f}")
                accelerator.log({"loss": mean, "learning_rate": rate}, step=step + 1)
                if accelerator.is_main_process:
                    self.folder.append("loss", {"step": step + 1, "loss": mean})
            yield step

    def _loss(self, model: torch.nn.Module, piece: Piece, step: int, part: slice) -> torch.Tensor:
        config = self.config
        self._note(piece)
        jacobian = config.target == "jacobian"
        draw = draw_trace_batch(
            self.pipe.scheduler, self.shape, config.optimisation.batch_size, step, config.seed, part,
            mirrored=config.target == "residual", with_probes=jacobian,
        )  # fmt: skip
        dropout = torch.rand(config.optimisation.batch_size, generator=step_generator(config.seed, "captions", step))
        captions = drop_captions(piece.captions, dropout[part] < config.caption_dropout)
        rows = range(step * config.optimisation.batch_size, (step + 1) * config.optimisation.batch_size)[part]
        samples = self.space.draw(piece.samples, [step_generator(config.seed, "posterior", row) for row in rows])
        if self.paths is not None:
            draw, samples, captions = self.paths.mix(
                draw, samples, captions, config.on_path, step_generator(config.seed, "paths", step),
                config.optimisation.batch_size, part,
            )  # fmt: skip
        denoiser = self.space.denoiser(captions, piece.samples, draw.copies)
        estimator = jacobian_estimator(config, denoiser) if jacobian else None
        objective = TraceObjective(self.model.config, estimator, config.squared_weight)
        pooled = denoiser.pooled_condition() if self.model.config["pooled_channels"] else None
        if pooled is not None:
            pooled = pooled[: len(samples)]  # the draw repeats it
        with_features = (step + 1) % FEATURELESS_EVERY != 0
        return objective(model, denoiser, samples, draw, pooled, with_features=with_features).mean()

    def _validate(
        self, average: EMAModel | None, parameters: list[torch.nn.Parameter], step: int
    ) -> Validation | None:
        """Measures the averaged model on held-out data. The main process does it, and the others wait."""
        result = None
        if self.accelerator.is_main_process:
            if average:
                average.store(parameters)
                average.copy_to(parameters)
            try:
                result = validate(self.model.eval(), self.space, self.held_out, self.config)
            finally:
                self.model.train()
                if average:
                    average.restore(parameters)
            self.accelerator.log(result.summary(), step=step)
            self.folder.cut("validation", step - 1)  # a resumed run may have the entry already
            self.folder.append("validation", {"step": step, **result.summary()})
            with self.folder.writing("validation.png"):
                plot_validation(result, self.folder.path / "validation.png")
        self.accelerator.wait_for_everyone()
        return result

    def _save_model(self) -> None:
        with self.folder.writing("trace_model"):
            self.model.save_pretrained(self.folder.path / "trace_model")

    def _calibration(self) -> TraceCalibration:
        """Measures the trained model's error on the held-out data, on the paths of likelihoods."""
        model, data, size = self.model.eval(), self.held_out, self.space.piece_size
        parts = []
        for start in range(0, len(data.captions), size):
            part = slice(start, start + size)
            denoiser = self.space.denoiser(data.captions[part], data.samples[part])
            generator = torch.Generator().manual_seed(self.config.seed)
            parts.append(
                TraceErrors.measure(denoiser, self.space.pack(data.samples[part]), model, generator=generator)
            )
        return TraceErrors.join(parts).calibration()

    def _report(self, result: Validation | None) -> None:
        if result is None:
            return
        config, skipped = self.config, sorted(self.skipped)
        report = {"steps": config.optimisation.steps, "target": config.target, "skipped_images": skipped}
        with self.folder.writing("report.json"):
            write_json(self.folder.path / "report.json", {**report, "validation": result.report()})


def jacobian_estimator(config: TraceMatchingConfig, denoiser: Denoiser) -> FisherEstimator:
    """Returns the estimator of the products for target "jacobian", according to the config's `product`."""
    if config.product != "finite_difference":
        return AutodiffFisher(denoiser, forward_mode=config.product == "forward")
    return FiniteDifferenceFisher(denoiser)


def features_of(denoiser: Denoiser, sample: torch.Tensor) -> torch.Tensor:
    """Returns the denoiser's features at a sample. Raises `InputError` if there are none."""
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    middle = timestep_at(denoiser.scheduler, torch.tensor((low + high) / 2, dtype=torch.float64))
    with torch.no_grad():
        features = denoiser.state(sample, middle.to(torch.float32)).features
    if features is None:
        raise InputError(
            "`model.features` needs the denoiser's last hidden layer, but for this network the layer is not known. "
            "Leave `model.features` out."
        )
    return features


def _width(values: torch.Tensor | None) -> int | None:
    return None if values is None else values.shape[1]


def check_cache(cache: CachedLatents, pipe: DiffusionPipeline) -> None:
    """Refuses latents of another autoencoder. Raises `InputError` that says what differs."""
    before, now = cache.space, autoencoder_note(pipe)
    differences = note_differences(before, now, tolerance=AUTOENCODER_TOLERANCE, absent_is_null=True)
    advice = "Make the cache of latents again."
    refuse_differences(cache.folder, "was made with another autoencoder", differences, advice)


def _tracker_settings(config: TraceMatchingConfig) -> dict[str, Any]:
    """Returns the settings as trackers take them: flat, with numbers and strings."""
    flat = flat_settings(dataclasses.asdict(config))
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat.items()}


def train(config: TraceMatchingConfig) -> FisherTraceModel:
    """Trains the trace model of `config`, or resumes its training. Raises the errors of `TraceMatching`."""
    check_trackers(config.trackers)
    accelerator = make_accelerator(config)
    check_process_number(accelerator)
    with locked_folder(Path(config.output), accelerator):
        return TraceMatching(config, accelerator).run()


def make_accelerator(config: TraceMatchingConfig) -> Accelerator:
    """Makes an accelerator whose processes wait while the main process validates and follows paths."""
    is_parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision=config.optimisation.mixed_precision or "no",
        log_with=config.trackers or None,
        project_dir=config.output,
        cpu=is_parallel and uses_cpu(),  # otherwise each process would assume that it is the only one
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )


def main() -> None:
    """Runs the command."""
    arguments = config_parser(__doc__).parse_args()
    with errors_in_words():
        train_file(arguments.config, arguments.set)


def train_file(config: str | os.PathLike, changes: Sequence[str]) -> None:
    """Trains the trace model that a config file describes.

    Args:
        changes: entries "key.key=value" that replace what the file says.
    """
    train(load_config(config, TraceMatchingConfig, changes))


if __name__ == "__main__":
    main()
