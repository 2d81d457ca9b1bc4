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
