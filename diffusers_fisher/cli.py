"""The command `diffusers-fisher`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Exit, Option, Typer, echo
from typer.core import TyperGroup

from . import __version__
from .jobs.command import errors_in_words
from .settings import (
    ChainVariance,
    Dtype,
    Engine,
    GuidanceEstimator,
    LikelihoodMethod,
    NoiseProjection,
    RecordFile,
    TraceEstimator,
)

OUTPUTS = Path("outputs")
Seed = Annotated[int, Option(help="Seed of every random draw.")]
Checkpoint = Annotated[str, Option(help="Folder or Hub id of a pipeline; 'embedded' is the embedded one.")]
WeightDtype = Annotated[Dtype, Option(help="Dtype of the pipeline's weights.")]
ConfigFile = Annotated[Path, Option("--config", help="YAML file; see configs/ for examples.")]
Changes = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="A setting that replaces the file's; repeatable.")
]
RecordFormat = Annotated[RecordFile, Option(help="parquet: likelihoods.parquet beside likelihoods.jsonl.")]
RetryFailed = Annotated[bool, Option(help="Try again what failed before.")]


class Commands(TyperGroup):
    """The subcommands. Their errors are messages without a traceback, if the package raises them on purpose."""

    def invoke(self, ctx: Context) -> object:  # type: ignore[override]
        with errors_in_words():
            return super().invoke(ctx)


app = Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, Option("--version", help="Print the version and stop.")] = False) -> None:
    """Likelihood and reward guidance of pretrained diffusers checkpoints, without differentiating the denoiser."""
    if version:
        echo(__version__)
        raise Exit


@app.command()
def demo(
    output: Annotated[Path, Option(help="Folder for images, plots and report.json.")] = OUTPUTS / "demo",
    seed: Seed = 0,
) -> None:
    """Compute likelihoods of real images and guide by a reward, on the embedded checkpoint. Minutes on two cores."""
    from .demo import run_demo
    from .jobs.folder_lock import FolderLock

    with FolderLock(output):
        run_demo(output=output, seed=seed)


@app.command()
def examples(
    output: Annotated[Path, Option(help="Folder that gets the folders 'configs' and 'examples'.")] = Path("."),
) -> None:
    """Copy the examples and configurations that the documentation calls."""
    from .examples import copy_examples

    echo("\n".join(copy_examples(output)))


@app.command()
def check(
    model: Annotated[str, Argument(help="Folder or Hub id of a pipeline; 'embedded' is the embedded one.")],
    data: Annotated[
        str | None, Option(help="Folder of 64 or more images of the kind that the model was trained on.")
    ] = None,
    output: Annotated[Path, Option(help="Folder of index.html and check.json.")] = OUTPUTS / "check",
    reference: Annotated[
        Path | None, Option(help="Output of the command likelihood, among whose images those of --data are placed.")
    ] = None,
    caption_column: Annotated[str | None, Option(help="Column of captions or class labels.")] = None,
    prompt: Annotated[str | None, Option(help="One prompt for all images, instead of captions.")] = None,
    resolution: Annotated[int | None, Option(help="Resize and crop the images to this size.")] = None,
    limit: Annotated[int, Option(help="Number of images, the first of the data.")] = 64,
    dtype: WeightDtype = "float32",
    batch_size: Annotated[int, Option(help="Images that are evaluated at once.")] = 16,
) -> None:
    """Check a checkpoint: is it right here, what does it cost? A failed line ends the command with status 1."""
    from .checks.report import run_check
    from .data import ImageData
    from .jobs.folder_lock import FolderLock
    from .jobs.pipelines import DenoiserSettings

    images = None
    if data is not None:
        images = ImageData(path=data, caption_column=caption_column, resolution=resolution, limit=limit)
    with FolderLock(output):
        report = run_check(output, DenoiserSettings(path=model, dtype=dtype), images, prompt, reference, batch_size)
    if report.failed:
        raise Exit(1)


@app.command()
def transport(
    output: Annotated[Path, Option(help="Folder for the table, plots and transport.json.")] = OUTPUTS / "transport",
    runs: Annotated[int, Option(help="Random starts per map; 300 gives the standard errors of the docs.")] = 300,
    points: Annotated[
        str | None, Option(help='Your own points instead of the study\'s, such as "0.5,0; 0,-0.5; 0,0".')
    ] = None,
    learned: Annotated[bool, Option(help="Also study the embedded checkpoint's map, in 256 dimensions.")] = False,
    seed: Seed = 0,
) -> None:
    """Is the probability-flow ODE's map an optimal transport map? Under a minute; minutes more with --learned."""
    from .jobs.folder_lock import FolderLock
    from .studies.transport_study import parse_points, run_study

    with FolderLock(output):
        run_study(output=output, runs=runs, points=parse_points(points), learned=learned, seed=seed)


@app.command()
def guide(
    prompts: Annotated[Path, Option(help="Text file with one prompt per line.")],
    output: Annotated[Path, Option(help="Folder of records, pictures, index.html and gallery.png.")] = OUTPUTS
    / "guide",
    checkpoint: Checkpoint = "embedded",
    reward: Annotated[
        str,
        Option(
            help="classifier:PATH:CLASS, clip[:PATH], siglip[:PATH], pick_score[:PATH], blip[:PATH], "
            "aesthetic:HEAD_FILE[:CLIP_PATH] or python:MODULE:FUNCTION."
        ),
    ] = "classifier:embedded:ankle boot",
    held_out: Annotated[str | None, Option(help="Another reward, which is reported and not optimised.")] = None,
    estimator: Annotated[GuidanceEstimator, Option(help="Estimator of the Fisher.")] = "one-step",
    guidance_steps: Annotated[int, Option(help="Gradient steps per prompt.")] = 10,
    step_size: Annotated[float, Option(help="Size of the first step, relative to the norm of the noise.")] = 0.2,
    steps: Annotated[int | None, Option(help="Steps of a sampling run; unset: the pipeline's default.")] = None,
    guidance_scale: Annotated[float | None, Option(help="Guidance scale; unset: the pipeline's default.")] = None,
    cheap_steps: Annotated[
        int | None, Option(help="Steps of the runs that climb, such as 5; unset: all runs have --steps.")
    ] = None,
    full_iterations: Annotated[int, Option(help="Last guidance steps that are taken by full runs.")] = 0,
    unguided_iterations: Annotated[int, Option(help="First guidance steps without classifier-free guidance.")] = 0,
    candidates: Annotated[int, Option(help="Initial noises per prompt, of which the best is guided.")] = 1,
    noise_projection: Annotated[
        NoiseProjection | None, Option(help="Keep the noise white; unset: only its norm is kept.")
    ] = None,
    negative_prompt: Annotated[str | None, Option(help="Negative prompt for all prompts.")] = None,
    optimizer: Annotated[str | None, Option(help="Name in torch.optim; --step-size is its learning rate.")] = None,
    patience: Annotated[int | None, Option(help="Stop after so many runs without a new best.")] = None,
    likelihood: Annotated[bool, Option(help="Also compute bits/dim of every image before and after.")] = False,
    batch_size: Annotated[int, Option(help="Prompts that are guided at once.")] = 1,
    checkpoint_decoder: Annotated[bool, Option(help="Recompute the decoder's activations: less memory.")] = False,
    offload: Annotated[bool, Option(help="Keep a network on the accelerator only while it works.")] = False,
    dtype: WeightDtype = "float32",
    seed: Annotated[int, Option(help="Seed of the first prompt; every further prompt's is one more.")] = 0,
    retry_failed: RetryFailed = False,
) -> None:
    """Guide every prompt of a file by a reward. A stopped run goes on; `accelerate launch` runs several processes."""
    from .evaluation.guidance_gallery import GallerySettings, Memory, run_gallery

    settings = GallerySettings(
        checkpoint=checkpoint, reward=reward, held_out=held_out, estimator=estimator,
        num_guidance_steps=guidance_steps, step_size=step_size, num_inference_steps=steps,
        guidance_scale=guidance_scale, dtype=dtype, seed=seed, negative_prompt=negative_prompt, optimizer=optimizer,
        patience=patience, likelihood=likelihood, num_guidance_inference_steps=cheap_steps,
        num_full_iterations=full_iterations, num_unguided_iterations=unguided_iterations, num_candidates=candidates,
        noise_projection=noise_projection,
    )  # fmt: skip
    memory = Memory(batch_size=batch_size, checkpoint_decoder=checkpoint_decoder, offload=offload)
    summary = run_gallery(
        output=output, prompts_file=prompts, settings=settings, memory=memory, retry_failed=retry_failed
    )
    if summary["failed"] == summary["prompts"]:
        raise Exit(1)


@app.command()
def likelihood(
    data: Annotated[str, Option(help="Folder of images or of `save_to_disk`, a URL, or a dataset's name.")],
    output: Annotated[str, Option(help="Folder or URL of likelihoods.jsonl, summary.json and index.html.")] = str(
        OUTPUTS / "likelihood"
    ),
    model: Checkpoint = "embedded",
    revision: Annotated[str | None, Option(help="Revision of the pipeline on the Hub.")] = None,
    variant: Annotated[str | None, Option(help="Variant of the pipeline on the Hub.")] = None,
    dtype: WeightDtype = "float32",
    data_name: Annotated[str | None, Option(help="Configuration of the dataset.")] = None,
    data_revision: Annotated[str | None, Option(help="Revision of the dataset on the Hub.")] = None,
    split: Annotated[str, Option(help="Split of the dataset.")] = "train",
    image_column: Annotated[str, Option(help="Column of the images.")] = "image",
    caption_column: Annotated[str | None, Option(help="Column of captions or class labels.")] = None,
    key_column: Annotated[str | None, Option(help="Column of keys, which the records keep.")] = None,
    prompt: Annotated[str | None, Option(help="One prompt for all images, instead of captions.")] = None,
    resolution: Annotated[int | None, Option(help="Resize and crop the images to this size.")] = None,
    streaming: Annotated[bool, Option(help="Never download the whole dataset.")] = False,
    limit: Annotated[int | None, Option(help="Number of images, the first of the data.")] = None,
    max_pixels: Annotated[
        int | None, Option(help="Most pixels of an image; unset: 4194304, or what Pillow reads with --resolution.")
    ] = None,
    batch_size: Annotated[
        str, Option(metavar="INTEGER|auto", help="Images at once, or 'auto'; the numbers do not depend on it.")
    ] = "16",
    engine: Annotated[Engine, Option(help="Processes of this launch, or actors of Ray.")] = "processes",
    num_actors: Annotated[int | None, Option(help="Actors of Ray; unset: one per GPU.")] = None,
    decoding_threads: Annotated[int, Option(help="Threads that decode images while the device computes.")] = 2,
    device: Annotated[str | None, Option(help="Device that computes, such as cuda:1 or cpu.")] = None,
    offload: Annotated[bool, Option(help="Keep a network on the accelerator only while it works.")] = False,
    records: RecordFormat = "jsonl",
    retry_failed: RetryFailed = False,
    method: Annotated[LikelihoodMethod, Option(help="By the ODE, or a bound of -log p.")] = "ode",
    num_inference_steps: Annotated[
        int | None, Option(help="Steps of the integration (unset: 32), or of the bound's chain (unset: 20).")
    ] = None,
    tolerance: Annotated[
        float | None,
        Option(help="Refine an image's steps to this error, bits/dim; unset: 0.05, or one grid of the steps given."),
    ] = None,
    variance: Annotated[ChainVariance, Option(help="Variance of the bound's chain.")] = "optimal",
    num_draws: Annotated[int | None, Option(help="Noises per step of the bound: 1, 2, 6, 8, 10, ...")] = None,
    scheme: Annotated[str | None, Option(help="euler, trapezoid, adams3 or adams4 (default).")] = None,
    estimator: Annotated[TraceEstimator, Option(help="Estimator of the trace.")] = "auto",
    num_probes: Annotated[int, Option(help="Random directions per level; 0: the exact trace.")] = 1,
    bins: Annotated[int | None, Option(help="Values of a pixel (256 for 8 bits), for pipelines in pixels.")] = None,
    seed: Annotated[int, Option(help="Seed of probes, dequantisation and sampled latents.")] = 0,
    sample_latents: Annotated[
        bool, Option("--sample-latents", help="Draw latents from the encoder's posterior instead of taking its mean.")
    ] = False,
    shard_index: Annotated[
        int | None, Option(help="Evaluate one part of the images alone, 0 to --num-shards - 1; see `merge`.")
    ] = None,
    num_shards: Annotated[int | None, Option(help="Number of parts, each with an output folder of its own.")] = None,
    shards_from_environment: Annotated[bool, Option(help="Take the part from the task of a SLURM job array.")] = False,
) -> None:
    """Log-likelihoods of a dataset, or bounds. A stopped run goes on; `accelerate launch` runs several processes."""
    from .data import ImageData
    from .evaluation.dataset_likelihood import evaluate_dataset
    from .evaluation.dataset_settings import DatasetSettings
    from .evaluation.execution import Execution, parse_batch_size
    from .jobs.pipelines import DenoiserSettings
    from .jobs.shards import chosen_shard
    from .likelihood import DEFAULT_SCHEME

    shard = chosen_shard(shard_index, num_shards, shards_from_environment)
    settings = DatasetSettings(
        denoiser=DenoiserSettings(path=model, revision=revision, variant=variant, dtype=dtype),
        data=ImageData(
            path=data, name=data_name, split=split, revision=data_revision, image_column=image_column,
            caption_column=caption_column, resolution=resolution, streaming=streaming, limit=limit,
            max_pixels=max_pixels, key_column=key_column,
        ),
        prompt=prompt, method=method, num_inference_steps=num_inference_steps, scheme=scheme or DEFAULT_SCHEME,
        estimator=estimator, num_probes=num_probes, bins=bins, seed=seed, sample_latents=sample_latents,
        variance=variance, num_draws=num_draws, tolerance=tolerance,
    )  # fmt: skip
    execution = Execution(
        engine=engine, num_actors=num_actors, decoding_threads=decoding_threads, device=device, offload=offload
    )
    size = parse_batch_size(batch_size)
    evaluate_dataset(output, settings, size, retry_failed, shard, execution, parquet=records == "parquet")


@app.command()
def merge(
    output: Annotated[str, Argument(help="Folder or URL of likelihoods.jsonl, summary.json and index.html.")],
    folders: Annotated[list[str], Argument(help="Output folders of all shards, or their URLs.")],
    records: RecordFormat = "jsonl",
) -> None:
    """Make one report of the shards of a dataset's likelihoods, which `likelihood --num-shards` has computed."""
    from .evaluation.likelihood_shards import merge_likelihoods

    merge_likelihoods(output, folders, parquet=records == "parquet")


@app.command("fit-variance")
def fit_variance(
    data: Annotated[str, Option(help="Folder of images or of `save_to_disk`, or a dataset's name.")],
    output: Annotated[Path, Option(help="Folder of scheduler_config.json and variance.json.")] = OUTPUTS / "variance",
    model: Checkpoint = "embedded",
    dtype: WeightDtype = "float32",
    caption_column: Annotated[str | None, Option(help="Column of captions or class labels.")] = None,
    resolution: Annotated[int | None, Option(help="Resize and crop the images to this size.")] = None,
    limit: Annotated[int, Option(help="Number of images, the first of the data.")] = 256,
    batch_size: Annotated[int, Option(help="Images at once.")] = 16,
    num_levels: Annotated[int, Option(help="Noise levels of the table.")] = 40,
    seed: Seed = 0,
) -> None:
    """Fit the variance of a stochastic sampler to images by squared errors, and write its scheduler."""
    from .data import ImageData
    from .evaluation.variance_table import VarianceSettings, fit_variance as fit
    from .jobs.pipelines import DenoiserSettings

    images = ImageData(path=data, caption_column=caption_column, resolution=resolution, limit=limit)
    settings = VarianceSettings(DenoiserSettings(path=model, dtype=dtype), images, num_levels, seed)
    fit(output, settings, batch_size)


@app.command()
def train(config: ConfigFile, changes: Changes = None) -> None:
    """Train a trace model for a frozen denoiser. A stopped run goes on; see docs/training.md."""
    from .training.trace_matching import train_file

    train_file(config=config, changes=changes or ())


@app.command("cache-latents")
def cache_latents(
    config: ConfigFile,
    changes: Changes = None,
    batch_size: Annotated[int, Option(help="Images that are encoded at once.")] = 16,
) -> None:
    """Encode the images of a training configuration once, so that training reads latents."""
    from .training.cache_latents import cache_latents_of_file

    cache_latents_of_file(config=config, changes=changes or (), batch_size=batch_size)


if __name__ == "__main__":
    app()
