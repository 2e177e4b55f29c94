"""Verbs that begin a training job, here or on a cluster, or say what one would need."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import Annotated

import typer

from expertmesh.launch.terminal import (
    AddressOption,
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    check_dashboard,
    failures,
    show_json,
    wrong_input,
)


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over; an earlier run is moved aside")] = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
    result_in_log: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Train a model on this machine, or on a running Ray cluster. Goes on where an interrupted run stopped."""
    with ExitStack() as held:
        with wrong_input():
            from expertmesh.launch.recipe import load_recipe

            changes = list(overrides or []) + ([f"cluster.address={address}"] if address else [])
            checked = load_recipe(recipe, changes)
            seat = None
            if checked.cluster.launcher == "environment":
                from expertmesh.launch.environment import read_seat

                seat = read_seat(os.environ, checked.parallel.world_size)
        held.enter_context(failures())
        from expertmesh.launch.started_ranks import FirstRank, follow

        if seat is not None and seat.rank:
            follow(seat)
            return
        first_rank = FirstRank(seat) if seat is not None else None
        with wrong_input():
            from expertmesh.launch.train_job import find_start, prepare_data, run_job, sole_user

            held.enter_context(sole_user(checked))
            start = find_start(checked, fresh)
        from rich.console import Console

        from expertmesh.launch.progress import TrainingProgress

        # A file of its own: a rank that trains in this process sends standard output and error to its log.
        console = Console(file=os.fdopen(os.dup(2 if as_json else 1), "w"))
        if start.note:
            console.print(start.note, highlight=False, soft_wrap=True)
        progress = held.enter_context(TrainingProgress(console))
        with wrong_input():
            dataset = prepare_data(checked, start, progress.show)
        result = run_job(checked, start, dataset, progress.show, first_rank)
    if as_json:
        show_json(result)
        return
    if result_in_log:  # a submitted job: its log is the way back
        from expertmesh.launch.submit import RESULT_MARK

        typer.echo(RESULT_MARK + json.dumps(result))
    sent, saved = result["dispatch_bytes"], result["dispatch_bytes_saved"]
    console.print(
        f"held-out loss {result['validation_loss']:.3f} (unigram model {result['unigram_loss']:.3f}); "
        f"{result['ffn_experts_per_token']:.2f} FFN experts a token; {sent / 1e6:.0f} MB of rows sent, "
        f"{saved / 1e6:.0f} MB kept off the wire\ncheckpoint  {result['checkpoint']}\nreport      {result['report']}",
        highlight=False,
        soft_wrap=True,
    )


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str, typer.Option(help="the cluster's dashboard, such as http://127.0.0.1:8265")] = "",
    run_id: Annotated[
        str | None, typer.Option("--id", help="the job's id; one that is there already is followed, not sent again")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send a training job to a running Ray cluster, follow its log, and end as it ends."""
    with wrong_input():
        from expertmesh.launch.recipe import load_recipe

        check_dashboard(address)
        checked = load_recipe(recipe, list(overrides or []))
        from expertmesh.launch.submit import submit_job

        job = submit_job(checked, address, run_id)
    state = "is there already; following it" if job.known else "is sent; Ctrl-C lets go of its log, not of it"
    typer.echo(f"job {job.id} {state}", err=as_json)
    with failures():
        result = job.follow(lambda text: typer.echo(text, nl=False, err=as_json))
    if as_json:
        show_json(result)


def plan_train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rank: Annotated[int, typer.Option(help="whose groups are listed")] = 0,
    check: Annotated[
        bool,
        typer.Option("--check", help="rehearse a step with small models: what is kept, and whether ranks disagree"),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say who is in which group, what memory a rank needs, and how many bytes it sends; nothing is started."""
    with failures(), wrong_input():
        from expertmesh.launch.recipe import load_recipe

        checked = load_recipe(recipe, list(overrides or []))
        from expertmesh.launch.planning import plan_recipe, told

        result = plan_recipe(checked, rank, check)
    if as_json:
        show_json(result)
    else:
        typer.echo("\n".join(told(result)))


def show_manifest(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    target: Annotated[str, typer.Option("--for", help="kuberay, kuberay-service, slurm, skypilot")],
    image: Annotated[str, typer.Option(help="a container image with expertmesh installed")] = "expertmesh:latest",
    storage: Annotated[str, typer.Option(help="a folder that all nodes see, for runs and data")] = "/mnt/expertmesh",
    claim: Annotated[str, typer.Option(help="the volume claim, or bucket, behind it")] = "expertmesh",
    gpus: Annotated[int, typer.Option(min=0, help="of each worker")] = 0,
    memory: Annotated[str, typer.Option(help="of each pod")] = "8Gi",
    attention: Annotated[int, typer.Option(min=1, help="attention workers of a service")] = 1,
    ffn: Annotated[int, typer.Option(min=1, help="FFN workers of a service")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Print what another scheduler needs to run a recipe: YAML for Kubernetes or SkyPilot, a script for Slurm."""
    with wrong_input():
        from expertmesh.launch.manifest import Place, manifest
        from expertmesh.launch.recipe import load_recipe

        place = Place(image, storage, claim, gpus, memory, attention, ffn)
        text = manifest(load_recipe(recipe, list(overrides or [])), target, place)
    if as_json:
        show_json({"for": target, "manifest": text})
    else:
        typer.echo(text, nl=False)
