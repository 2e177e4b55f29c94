"""The one command, `expertmesh`: which verbs it has. What each takes is in launch/verbs, what all share in terminal.py.

Verbs import what they do when they are called, so that --help answers at once.

Exit codes: 0 done, 1 failed, 2 wrong input (one line on standard error says what to change), 130 interrupted.
With --json the result alone is on standard output, everything else on standard error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.launch.terminal import JsonOption, show_json, wrong_input
from expertmesh.launch.verbs import answering, converting, measuring, running, training

app = typer.Typer(
    name="expertmesh",
    help="Train Mixture-of-Experts models with expert parallelism; serve them with attention and experts apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main_options(
    verbose: Annotated[bool, typer.Option("--verbose", help="log what happens, and tracebacks of failures")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr)
    if table := os.environ.get("EXPERTMESH_TILES"):
        with wrong_input():
            from expertmesh.kernels.tuned_tiles import read_table

            read_table(Path(table))
    if verbose:
        for noisy in ("asyncio", "httpcore", "httpx", "filelock"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with the package: an architecture each."""
    from expertmesh.launch.recipe import load_recipe, shipped_recipes

    known = {name: load_recipe(name, []).about for name in shipped_recipes()}
    if as_json:
        show_json({"recipes": [{"name": name, "about": about} for name, about in known.items()]})
        return
    for name, about in known.items():
        typer.echo(f"{name:24}{about}")


def group(name: str, about: str) -> typer.Typer:
    """A verb that has verbs of its own."""
    made = typer.Typer(help=about, no_args_is_help=True)
    app.add_typer(made, name=name)
    return made


VERBS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "submit": training.submit,
    "jobs": running.jobs,
    "logs": running.logs,
    "stop": running.stop,
    "status": running.status,
    "scale": running.scale,
    "manifest": training.show_manifest,
    "generate": answering.generate,
    "serve": answering.serve,
    "recipes": recipes,
    "doctor": measuring.doctor,
}
for name, verb in VERBS.items():
    app.command(name)(verb)

convert = group(
    "convert", "Bring checkpoints of Hugging Face in, or take one out; cut a nested model; quantise experts."
)
convert.command("from-hf")(converting.from_hf)
convert.command("to-hf")(converting.to_hf)
convert.command("extract")(converting.extract_nested)
convert.command("quantize")(converting.quantize)

bench = group("bench", "Time parts of this project beside those of others.")
bench.command("parallel")(measuring.bench_parallel)
bench.command("moe")(measuring.bench_moe)
bench.command("serve")(measuring.bench_serve)
bench.command("cluster")(measuring.bench_cluster)

plan = group("plan", "Say what a job needs, before any worker starts.")
plan.command("train")(training.plan_train)

kernels = typer.Typer(invoke_without_command=True)
app.add_typer(kernels, name="kernels")
kernels.callback()(measuring.compile_kernels)
kernels.command("tune")(measuring.tune_kernels)

cluster = group("cluster", "Several Ray nodes on this host, to try what a cluster does.")
cluster.command("up")(running.cluster_up)
cluster.command("down")(running.cluster_down)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as on Ctrl-C: workers and folders put away
    # Before torch is imported by anyone: a warning about packages of GPU machines is no news on this one.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    app()


if __name__ == "__main__":
    main()
