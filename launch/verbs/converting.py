"""Verbs that write a checkpoint in another form."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.launch.terminal import (
    AnyCheckpointArgument,
    CheckpointArgument,
    JsonOption,
    failures,
    show_json,
    wrong_input,
)

if TYPE_CHECKING:
    from expertmesh.system.convert.huggingface import Conversion

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write; new, or empty")]


def from_hf(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="the folder of a Hugging Face checkpoint")],
    out: OutArgument,
    as_json: JsonOption = False,
) -> None:
    """Take over a Hugging Face checkpoint: Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V3, Step-3, MoE++, Llama."""
    with failures(), wrong_input():
        from expertmesh.system.convert import huggingface

        show_conversion(huggingface.from_hf(path, out), as_json)


def to_hf(
    path: CheckpointArgument,
    out: OutArgument,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint for the Hugging Face class that can hold its architecture."""
    with failures(), wrong_input():
        from expertmesh.launch.find_checkpoint import checkpoint_folder
        from expertmesh.system.convert import huggingface

        show_conversion(huggingface.to_hf(checkpoint_folder(path), out), as_json)


def extract_nested(
    path: CheckpointArgument,
    out: OutArgument,
    width: Annotated[float, typer.Option(help="share of the hidden units, one that the model was trained for")],
    as_json: JsonOption = False,
) -> None:
    """Cut a smaller model out of one that was trained with nested networks (MatFormer)."""
    with failures(), wrong_input():
        from expertmesh.launch.find_checkpoint import checkpoint_folder
        from expertmesh.system.convert.extract import extract

        show_conversion(extract(checkpoint_folder(path), out, width), as_json)


def quantize(
    path: AnyCheckpointArgument,
    out: OutArgument,
    scheme: Annotated[str, typer.Option(help="fp8-block, fp8-channel, int4-fp8")],
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with its routed experts in FP8 or INT4, and say what that costs in quality."""
    with failures(), wrong_input():
        from expertmesh.kernels.scheme import Scheme
        from expertmesh.launch.find_checkpoint import find_checkpoint
        from expertmesh.launch.held_out import held_out_tokens
        from expertmesh.system.convert.quantise_checkpoint import quantise

        if scheme not in list(Scheme):
            raise ValueError(f"--scheme {scheme}: supported: {', '.join(Scheme)}")
        found = find_checkpoint(path)
        done = quantise(found, out, Scheme(scheme), held_out_tokens(found))
        if as_json:
            written = asdict(done)
            show_json(written.pop("quality") | written | {"checkpoint": str(done.checkpoint)})
            return
        typer.echo(done.summary())


def show_conversion(done: Conversion, as_json: bool) -> None:
    if as_json:
        show_json(asdict(done) | {"checkpoint": str(done.checkpoint)})
        return
    parameters = f"{done.parameters:,} parameters, {done.active_parameters:,} active"
    typer.echo(f"{done.model_type}: {parameters}, in {done.tensors} tensors")
    for reason, count in done.skipped.items():
        typer.echo(f"left out: {count} {reason}")
    typer.echo(f"checkpoint  {done.checkpoint}")
