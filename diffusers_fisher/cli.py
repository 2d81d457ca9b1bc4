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
    from .evaluation.transport_study import parse_points, run_study

    try:
        run_study(output, runs, parse_points(points), learned, seed)
    except FisherError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
