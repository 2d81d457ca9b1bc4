"""The command `diffusers-fisher`."""

from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .errors import FisherError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Likelihood and reward guidance of pretrained diffusers checkpoints, without differentiating the denoiser."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for images, plots and report.json.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:
    """Likelihood of real images and guidance by a reward, on the embedded checkpoint. Minutes on two cores."""
    from .demo import run_demo

    try:
        run_demo(output, seed)
    except FisherError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def transport(
    output: Annotated[Path, typer.Option(help="Folder for the table, plots and transport.json.")] = Path(
        "outputs/transport"
    ),
    runs: Annotated[int, typer.Option(help="Random starts a map; 300 gives the standard errors of the docs.")] = 300,
    points: Annotated[
        str | None, typer.Option(help='Your own points instead of the study\'s, such as "0.5,0; 0,-0.5; 0,0".')
    ] = None,
    learned: Annotated[bool, typer.Option(help="Also the embedded checkpoint's own map, in 256 dimensions.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:
    """Is the probability-flow ODE's map an optimal transport map? Under a minute; minutes more with --learned."""
    from .studies.transport_study import parse_points, run_study

    try:
        run_study(output, runs, parse_points(points), learned, seed)
    except FisherError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def guide(
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line.")],
    output: Annotated[Path, typer.Option(help="Folder of records, pictures, index.html and gallery.png.")] = Path(
        "outputs/guide"
    ),
    checkpoint: Annotated[str, typer.Option(help="A pipeline's folder or id; 'embedded' is the embedded one.")] = (
        "embedded"
    ),
    reward: Annotated[
        str,
        typer.Option(
            help="classifier:PATH:CLASS, clip[:PATH], siglip[:PATH], pick_score[:PATH], "
            "aesthetic:HEAD_FILE[:CLIP_PATH] or python:MODULE:FUNCTION."
        ),
    ] = "classifier:embedded:ankle boot",
    held_out: Annotated[str | None, typer.Option(help="Another reward, reported and not optimised.")] = None,
    estimator: Annotated[
        str, typer.Option(help="one-step, direct, finite-difference, autodiff, endpoint-centred or endpoint.")
    ] = "one-step",
    guidance_steps: Annotated[int, typer.Option(help="Gradient steps a prompt.")] = 10,
    step_size: Annotated[float, typer.Option(help="Of the first, relative to the noise's norm.")] = 0.2,
    steps: Annotated[int | None, typer.Option(help="Steps of a sampling run; the pipeline's own default.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of classifier-free guidance; the pipeline's own default.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="For all prompts; the pipeline's own default.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="A name in torch.optim, such as Adam, with --step-size as its learning rate.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many runs without a new best.")] = None,
    likelihood: Annotated[bool, typer.Option(help="Also bits/dim of every image before and after.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    checkpoint_decoder: Annotated[
        bool, typer.Option(help="Recompute the decoder's activations: less memory.")
    ] = False,
    offload: Annotated[bool, typer.Option(help="A network is on the accelerator only while it works.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the first prompt; each further one's is one more.")] = 0,
    retry_failed: Annotated[bool, typer.Option(help="Guide the prompts again that failed before.")] = False,
) -> None:
    """Guide every prompt of a file by a reward. Goes on where it was stopped; `accelerate launch` shares it out."""
    from .evaluation.guidance_gallery import GallerySettings, Memory, run_gallery

    settings = GallerySettings(
        checkpoint, reward, held_out, estimator, guidance_steps, step_size, steps, guidance_scale, dtype, seed,
        negative_prompt, optimizer, patience, likelihood,
    )  # fmt: skip
    try:
        summary = run_gallery(output, prompts, settings, Memory(batch_size, checkpoint_decoder, offload), retry_failed)
    except FisherError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if summary["failed"] == summary["prompts"]:
        raise typer.Exit(1)


@app.command()
def likelihood(
    data: Annotated[
        str, typer.Option(help="Folder of images, folder written by `save_to_disk`, or a dataset's name.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of likelihoods.jsonl, summary.json and index.html.")] = Path(
        "outputs/likelihood"
    ),
    model: Annotated[
        str, typer.Option(help="A pipeline's folder or id; 'embedded' is the embedded one.")
    ] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Of the pipeline on the Hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the pipeline on the Hub.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    data_name: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    data_revision: Annotated[str | None, typer.Option(help="Of the dataset on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    caption_column: Annotated[str | None, typer.Option(help="Column of captions or class labels.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For all images, in place of captions.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Images are resized and cropped to it; as they are.")] = None,
    streaming: Annotated[bool, typer.Option(help="Never download the whole dataset.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once; the numbers do not depend on it.")] = 16,
    retry_failed: Annotated[bool, typer.Option(help="Try images again that had an error before.")] = False,
    num_inference_steps: Annotated[int, typer.Option(help="Steps of the integration.")] = 32,
    scheme: Annotated[str | None, typer.Option(help="euler, trapezoid, adams3 or adams4; the library's own.")] = None,
    estimator: Annotated[
        str, typer.Option(help="Of the trace: auto, trace-model, autodiff or finite-difference.")
    ] = "auto",
    num_probes: Annotated[int, typer.Option(help="Of autodiff and finite-difference; 0: the exact trace.")] = 2,
    bins: Annotated[
        int | None, typer.Option(help="Values of a pixel, for pipelines in pixels: 256 for 8 bits.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of probes and dequantisation.")] = 0,
) -> None:
    """Log-likelihoods of a dataset. Begins again where it was stopped; `accelerate launch` shares it out."""
    from .data import ImageData
    from .evaluation.dataset_likelihood import DatasetSettings, evaluate_dataset
    from .jobs.pipelines import DenoiserSettings
    from .likelihood import DEFAULT_SCHEME

    images = ImageData(
        data, data_name, split, data_revision, image_column, caption_column, resolution, streaming, limit
    )
    settings = DatasetSettings(
        DenoiserSettings(model, revision, variant, dtype), images, prompt, num_inference_steps,
        scheme or DEFAULT_SCHEME, estimator, num_probes, bins, seed,
    )  # fmt: skip
    try:
        evaluate_dataset(output, settings, batch_size, retry_failed)
    except FisherError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
