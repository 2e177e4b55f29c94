"""The one command, `expertmesh`. Verbs say what they take; what they do is imported when one of them is called.

Exit codes: 0 done, 1 failed, 2 wrong input (one line on standard error says what to change), 130 interrupted.
With --json the result alone is on standard output, everything else on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from expertmesh.system.convert.huggingface import Conversion

app = typer.Typer(
    name="expertmesh",
    help="Train Mixture-of-Experts models with expert parallelism; serve them with attention and experts apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped one (quickstart)")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to it, such as train.steps=50")
]
CheckpointArgument = Annotated[Path, typer.Argument(help="a checkpoint folder, or the folder of a training run")]
AnyCheckpointArgument = Annotated[
    Path, typer.Argument(help="a checkpoint folder, ours or Hugging Face's, or the folder of a training run")
]
AttentionOption = Annotated[int | None, typer.Option(help="attention workers; with neither pool: one process")]
FFNOption = Annotated[int | None, typer.Option(help="FFN workers, each with a share of the experts")]
MicroBatchesOption = Annotated[int, typer.Option(min=1, max=4, help="parts of the work in flight to the FFN pool")]
TraceOption = Annotated[
    Path | None, typer.Option(help="write what each stage did when, as a Chrome trace, to this file at the end")
]
ServeSettingsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as serve.cache_tokens=65536")
]
AddressOption = Annotated[str | None, typer.Option(help="a running Ray cluster: auto or host:port; none: its own")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


convert = typer.Typer(
    help="Bring checkpoints of Hugging Face in, or take one out; cut a nested model; quantise experts.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")
bench = typer.Typer(help="Time parts of this project beside those of others.", no_args_is_help=True)
app.add_typer(bench, name="bench")
plan = typer.Typer(help="Say what a job needs, before any worker starts.", no_args_is_help=True)
app.add_typer(plan, name="plan")
kernels = typer.Typer(invoke_without_command=True)
app.add_typer(kernels, name="kernels")
cluster = typer.Typer(help="Several Ray nodes on this host, to try what a cluster does.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write; new, or empty")]


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


@app.command()
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
            from expertmesh.launch.train_job import find_start, prepare_data, run_job, sole_user

            held.enter_context(sole_user(checked))
            start = find_start(checked, fresh)
        from rich.console import Console

        from expertmesh.launch.progress import TrainingProgress

        console = Console(stderr=as_json)
        if start.note:
            console.print(start.note, highlight=False, soft_wrap=True)
        held.enter_context(failures())
        progress = held.enter_context(TrainingProgress(console))
        with wrong_input():
            dataset = prepare_data(checked, start, progress.show)
        result = run_job(checked, start, dataset, progress.show)
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


@app.command()
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


def check_dashboard(address: str) -> None:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: give the cluster's dashboard, such as http://127.0.0.1:8265")


DashboardOption = Annotated[str, typer.Option(help="the cluster's dashboard, such as http://127.0.0.1:8265")]
OptionalDashboardOption = Annotated[
    str | None, typer.Option("--address", help="the cluster's dashboard; none: JOB is a run here, by name or folder")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="a job's id; without --address a run's name or folder")]


@app.command()
def jobs(address: DashboardOption = "", as_json: JsonOption = False) -> None:
    """List the jobs of a running Ray cluster."""
    with wrong_input():
        check_dashboard(address)
        from expertmesh.launch.jobs import list_jobs

        found = list_jobs(address)
    if as_json:
        show_json({"jobs": found})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "state", "started", "run", "message", box=None, pad_edge=False)
    for job in found:
        table.add_row(*(str(job[key] or "") for key in ("job", "state", "started", "run_dir", "message")))
    Console().print(table)


@app.command()
def logs(
    job: JobArgument,
    rank: Annotated[str | None, typer.Option(help="one worker's log, such as trainer:1")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job ends")] = False,
    address: OptionalDashboardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a job has logged, or one of its workers."""
    pieces: list[str] = []
    with failures(), wrong_input():
        from expertmesh.launch.jobs import show_log

        if address is not None:
            check_dashboard(address)
        show_log(job, address, rank, follow, pieces.append if as_json else lambda text: typer.echo(text, nl=False))
    if as_json:
        show_json({"job": job, "rank": rank, "log": "".join(pieces)})


@app.command()
def stop(job: JobArgument, address: OptionalDashboardOption = None, as_json: JsonOption = False) -> None:
    """Have a training job save at the end of its step, and end."""
    with failures(), wrong_input():
        from expertmesh.launch.jobs import stop_job

        if address is not None:
            check_dashboard(address)
        told = stop_job(job, address)
    if as_json:
        show_json(told)
    else:
        typer.echo(f"{job}: {told['state']}; the same recipe goes on from where it was")


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name, or its folder")],
    as_json: JsonOption = False,
) -> None:
    """Say where a training run stands: its workers, figures, what it waits for, what happened."""
    with wrong_input():
        from expertmesh.launch import status as of_run

        found = of_run.status_of(of_run.find_run(run))
    if as_json:
        show_json(found)
        return
    from rich.console import Console

    console = Console()
    console.print(of_run.summary(found), highlight=False, soft_wrap=True)
    for table in (of_run.worker_table(found), of_run.event_table(found)):
        console.print(table)


@app.command()
def scale(
    job: Annotated[str, typer.Argument(metavar="JOB", help="a training run's name, or its folder")],
    experts_parallel: Annotated[int, typer.Option(min=1, help="ranks that split the experts from now on")],
    as_json: JsonOption = False,
) -> None:
    """Change a running training job: it saves at the end of its step and goes on with another number of workers."""
    with wrong_input():
        from expertmesh.launch import status as of_run
        from expertmesh.launch.event_log import read_events

        run_dir = of_run.find_run(job)
        known = len(read_events(run_dir))
        of_run.ask_to_scale(run_dir, experts_parallel)
    with failures(), wrong_input():
        event = of_run.await_scale(run_dir, known)
    if as_json:
        show_json(event)
    else:
        sizes = event["parallel"]
        typer.echo(f"goes on from step {event['step']} with ep={sizes['ep']} dp={sizes['dp']}")


@cluster.command("up")
def cluster_up(
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Ray nodes, the head included")] = 3,
    cpus: Annotated[int, typer.Option(min=1, help="places for workers on each")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Start several Ray nodes on this host, with a token and a folder of their own."""
    with failures(), wrong_input():
        from expertmesh.launch import local_cluster

        found = local_cluster.up(nodes, cpus)
    if as_json:
        show_json(found._asdict() | {"token": str(found.token)})
        return
    for key, value in local_cluster.environment(found.token).items():
        typer.echo(f"export {key}={value}")
    typer.echo(
        f"expertmesh train quickstart --address {found.address}\n"
        f"expertmesh submit quickstart --address {found.dashboard}\nexpertmesh cluster down"
    )


@cluster.command("down")
def cluster_down(as_json: JsonOption = False) -> None:
    """End the nodes that `cluster up` started, and no other Ray."""
    from expertmesh.launch import local_cluster

    ended = local_cluster.down()
    if as_json:
        show_json({"ended": ended})
    else:
        typer.echo("ended" if ended else "no cluster is up")


@app.command("manifest")
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


@app.command()
def generate(
    checkpoint: AnyCheckpointArgument,
    settings: ServeSettingsArgument = None,
    *,
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same text")] = None,
    attention: AttentionOption = None,
    ffn: FFNOption = None,
    micro_batches: MicroBatchesOption = 3,
    trace: TraceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text: in one process, or with attention and experts in separate workers."""
    with wrong_input():
        from expertmesh.launch.recipe import serve_settings
        from expertmesh.launch.serving import bring_up, check_pools, check_trace, look_at
        from expertmesh.system.serve.request import Request, Sampling

        config = serve_settings([f"serve.micro_batches={micro_batches}", *(settings or [])])
        served = look_at(checkpoint)
        pools = check_pools(served.model, config, attention, ffn)
        check_trace(trace)
        prompt_token_ids = served.tokenizer.encode(prompt)
        longest = config.room(served.model.context_length)
        holder = "the model's context" if longest == served.model.context_length else "the cache"
        room = longest - len(prompt_token_ids)
        if not prompt_token_ids:
            raise ValueError("--prompt is empty: give at least one character to continue")
        if room < 1:
            raise ValueError(
                f"--prompt has {len(prompt_token_ids)} tokens; {holder} holds {longest}, the answer included"
            )
    import asyncio

    sampling = Sampling(min(max_tokens, room), temperature=temperature, top_p=top_p, seed=seed)
    request = Request("generate", prompt_token_ids, sampling)

    async def answer() -> dict[str, Any]:
        text, token_ids, finish_reason = served.tokenizer.stream(), [], None
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if not as_json:
                typer.echo(piece, nl=False)

        async with bring_up(served, pools, config, address, trace) as client:
            if not as_json:
                typer.echo(prompt, nl=False)
            async for output in client.generate(request):
                token_ids.append(output.token_id)
                finish_reason = output.finish_reason
                if finish_reason != "stop":
                    show(text.push(output.token_id))
            show(text.finish())
            stages = await client.stages()
        if not as_json:
            typer.echo()
        return {
            "text": "".join(pieces),
            "token_ids": token_ids,
            "prompt_token_ids": prompt_token_ids,
            "finish_reason": finish_reason,
            "pools": pools._asdict() if pools else {"joined": 1},
            "stages": stages,
        }

    with failures():
        result = asyncio.run(answer())
    if as_json:
        show_json(result)


@app.command()
def serve(
    checkpoint: AnyCheckpointArgument,
    settings: ServeSettingsArgument = None,
    attention: AttentionOption = None,
    ffn: FFNOption = None,
    micro_batches: MicroBatchesOption = 3,
    trace: TraceOption = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="name that clients use; none: the checkpoint's folder")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="EXPERTMESH_API_KEY", help="clients must send it; none: anybody may ask")
    ] = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer OpenAI-compatible requests over HTTP, until interrupted."""
    with wrong_input():
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ValueError("--api-key: it must be printable ASCII, and not empty")
        from expertmesh.launch.recipe import serve_settings
        from expertmesh.launch.serving import check_pools, check_trace, listen, look_at, serve_forever

        config = serve_settings([f"serve.micro_batches={micro_batches}", *(settings or [])])
        served = look_at(checkpoint)
        pools = check_pools(served.model, config, attention, ffn)
        check_trace(trace)
        socket = listen(host, port)
    url = f"http://{host}:{socket.getsockname()[1]}/v1"
    name = model_name or served.name

    def ready() -> None:
        if as_json:
            show_json({"base_url": url, "model": name, "pools": pools._asdict() if pools else {"joined": 1}})
            return
        example = json.dumps({"model": name, "prompt": "The import statement", "max_tokens": 32})
        typer.echo(
            f"serving {name} at {url}\ncurl {url}/completions -H 'Content-Type: application/json' -d '{example}'"
        )

    with failures():
        serve_forever(served, pools, config, name, socket, ready, address, trace, api_key)


@convert.command("from-hf")
def from_hf(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="the folder of a Hugging Face checkpoint")],
    out: OutArgument,
    as_json: JsonOption = False,
) -> None:
    """Take over a Hugging Face checkpoint: Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V3, Step-3, MoE++, Llama."""
    with failures(), wrong_input():
        from expertmesh.system.convert import huggingface

        show_conversion(huggingface.from_hf(path, out), as_json)


@convert.command("to-hf")
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


@convert.command("extract")
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


@convert.command("quantize")
def quantize(
    path: AnyCheckpointArgument,
    out: OutArgument,
    scheme: Annotated[str, typer.Option(help="fp8-block, fp8-channel, int4-fp8")],
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with its routed experts in FP8 or INT4, and say what that costs in quality."""
    with failures(), wrong_input():
        from expertmesh.kernels.quantised_weights import Scheme
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


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with the package: an architecture each."""
    from expertmesh.launch.recipe import load_recipe, shipped_recipes

    known = {name: load_recipe(name, []).about for name in shipped_recipes()}
    if as_json:
        show_json({"recipes": [{"name": name, "about": about} for name, about in known.items()]})
        return
    for name, about in known.items():
        typer.echo(f"{name:24}{about}")


@kernels.callback()
def compile_kernels(
    context: typer.Context,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; any number of them")] = None,
    only: Annotated[str, typer.Option(help='kernels whose "name, tile" this pattern is found in')] = "",
    as_json: JsonOption = False,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, and say what came out."""
    if context.invoked_subcommand:
        return
    with failures():
        with wrong_input():
            from expertmesh.kernels.ahead_of_time import judge_all

            judgements = [judgement for name in target or ["sm_90"] for judgement in judge_all(name, only)]
    if as_json:
        typer.echo(json.dumps([judgement._asdict() for judgement in judgements]))
        return
    for judgement in judgements:
        typer.echo(judgement.line())


@kernels.command("tune")
def tune_kernels(
    out: Annotated[Path, typer.Option(help="the table to write; sizes that it has already are measured again")],
    tokens: Annotated[str, typer.Option(help="batch sizes, such as 1024,16384")] = "16384",
    experts: Annotated[int, typer.Option(min=1, help="FFN experts on this GPU")] = 64,
    top_k: Annotated[int, typer.Option(min=1)] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="width of the model")] = 2048,
    ffn: Annotated[int, typer.Option(min=1, help="width of an expert")] = 1024,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Measure tiles on the GPU here, for the sizes of a layer; EXPERTMESH_TILES=OUT then has them replace the rules."""
    with wrong_input():
        from expertmesh.launch.tuning import check_sizes

        plan = check_sizes(out, tokens, experts, top_k, hidden, ffn, dtype)
    with failures():
        from expertmesh.launch.tuning import tune_all

        rows = tune_all(plan, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        typer.echo(f"table  {out}\nuse it with EXPERTMESH_TILES={out}")


@bench.command("parallel")
def bench_parallel(
    ranks: Annotated[int, typer.Option(help="processes that share the experts")] = 2,
    tokens: Annotated[int, typer.Option(help="of each rank")] = 2048,
    experts: Annotated[int, typer.Option(help="of all ranks together")] = 16,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    hidden_size: Annotated[int, typer.Option(help="width of the model")] = 512,
    ffn_size: Annotated[int, typer.Option(help="width of an expert")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(help="steps of each layer; the median counts")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Our expert-parallel layer beside DeepSpeed's and Megatron-Core's on gloo ranks: step times and bytes."""
    with wrong_input():
        from expertmesh.launch.bench import parallel

        case = parallel.ParallelCase(ranks, tokens, experts, top_k, hidden_size, ffn_size, dtype, rounds)
    from rich.console import Console

    from expertmesh.launch.bench.table import parallel_table

    with failures():
        tables = parallel.bench_parallel(case, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps([row for rows in tables for row in rows]))
        return
    for rows in tables:
        Console().print(parallel_table(rows))


@bench.command("moe")
def bench_moe(
    quick: Annotated[bool, typer.Option("--quick", help="one layer at a decode and a prefill size")] = False,
    tokens: Annotated[str | None, typer.Option(help="batch sizes, such as 1,32,2048")] = None,
    experts: Annotated[str | None, typer.Option(help="such as 8,16,64")] = None,
    top_k: Annotated[str | None, typer.Option(help="such as 1,2,8")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, or both")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="width of the model; none: 512")] = None,
    ffn_size: Annotated[int | None, typer.Option(help="width of an expert; none: 1024")] = None,
    keep_memory: Annotated[bool, typer.Option("--keep-memory", help="freed memory is kept, for all alike")] = False,
    as_json: JsonOption = False,
) -> None:
    """Our MoE layer beside transformers, DeepSpeed, Megatron-Core and plain torch, as ratios. All sizes take hours."""
    with wrong_input():
        from expertmesh.kernels.kept_memory import keep_freed_memory
        from expertmesh.launch.bench.cases import change_grid

        grid = change_grid(quick, tokens, experts, top_k, dtype, hidden_size, ffn_size)
        if keep_memory and not keep_freed_memory():
            raise ValueError("--keep-memory: the C library of this machine has no such setting")
    from rich.console import Console

    from expertmesh.launch.bench import moe
    from expertmesh.launch.bench.table import table

    console, rows = Console(), []
    with failures():
        for of_table in moe.bench_moe(grid, lambda line: typer.echo(line, err=True)):
            rows += of_table
            if not as_json:
                console.print(table(of_table))
    if as_json:
        typer.echo(json.dumps(rows))


@plan.command("train")
def plan_train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rank: Annotated[int, typer.Option(help="whose groups are listed")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="rehearse one step's collectives, and see that no two ranks disagree")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say who is in which group, what memory a rank needs, and how many bytes it sends; nothing is started."""
    with failures(), wrong_input():
        from expertmesh.launch.planning import plan_recipe, told
        from expertmesh.launch.recipe import load_recipe

        result = plan_recipe(load_recipe(recipe, list(overrides or [])), rank, check)
    if as_json:
        show_json(result)
    else:
        typer.echo("\n".join(told(result)))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can and cannot do, and what to install."""
    from expertmesh.launch.doctor import examine

    findings = examine()
    if as_json:
        show_json({"findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            verdict = "ok" if finding.ok else "MISSING" if finding.needed else "note"
            typer.echo(f"{verdict:8}{finding.what}: {finding.detail}")
    if not all(finding.ok or not finding.needed for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as on Ctrl-C: workers and folders put away
    # Before torch is imported by anyone: a warning about packages of GPU machines is no news on this one.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    app()


if __name__ == "__main__":
    main()
