"""What all verbs have in common: how a result is printed, how a failure ends, and the arguments that several take."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped one (quickstart)")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to it, such as train.steps=50")
]
CheckpointArgument = Annotated[Path, typer.Argument(help="a checkpoint folder, or the folder of a training run")]
AnyCheckpointArgument = Annotated[
    Path, typer.Argument(help="a checkpoint folder, ours or Hugging Face's, or the folder of a training run")
]
AddressOption = Annotated[str | None, typer.Option(help="a running Ray cluster: auto or host:port; none: its own")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(envvar="EXPERTMESH_API_KEY", help="the key of a service; none: anybody may ask it"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@contextmanager
def wrong_input() -> Iterator[None]:
    """What fails in here was asked for wrongly: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"expertmesh: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def failures() -> Iterator[None]:
    """What fails in here failed though it was asked for rightly: one line, exit code 1; the details are in the logs."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("expertmesh: interrupted", err=True)
        raise typer.Exit(130) from None
    except typer.Exit:  # a RuntimeError too: somebody further in has said already what is wrong
        raise
    except RuntimeError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        typer.echo(f"expertmesh: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from None


def show_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result))


def check_dashboard(address: str) -> None:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: give the cluster's dashboard, such as http://127.0.0.1:8265")
