"""Verbs for jobs that run: listed, read, looked at, changed, ended; and a cluster to try them on."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.launch.terminal import ApiKeyOption, JsonOption, check_dashboard, failures, show_json, wrong_input

DashboardOption = Annotated[str, typer.Option(help="the cluster's dashboard, such as http://127.0.0.1:8265")]
OptionalDashboardOption = Annotated[
    str | None, typer.Option("--address", help="the cluster's dashboard; none: JOB is a run here, by name or folder")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="a job's id; without --address a run's name or folder")]


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


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name, or its folder")],
    serve: Annotated[
        bool, typer.Option("--serve", help="as a page that follows the run, and /metrics; until interrupted")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of --serve, on this host; 0 takes any free one")] = 8001,
    as_json: JsonOption = False,
) -> None:
    """Say where a training run stands: its workers, figures, what it waits for, what happened."""
    with wrong_input():
        from expertmesh.launch import status as of_run
        from expertmesh.launch.run_folder import find_run

        run_dir = find_run(run)
        if serve:
            from expertmesh.launch import live_page
            from expertmesh.launch.serving import listen

            listener = listen("127.0.0.1", port)
            app = live_page.build_app(run_dir)
        else:
            found = of_run.status_of(run_dir)
    if serve:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def ready() -> None:
            if as_json:
                show_json({"url": url, "metrics": f"{url}metrics"})
            else:
                typer.echo(f"{run_dir.name} at {url}, for Prometheus at {url}metrics")

        with failures():
            live_page.serve(app, listener, ready)
        return
    if as_json:
        show_json(found)
        return
    from rich.console import Console

    console = Console()
    console.print(of_run.summary(found), highlight=False, soft_wrap=True)
    for table in (of_run.worker_table(found), of_run.event_table(found)):
        console.print(table)


def scale(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="a training run, or a service such as http://HOST:8000")
    ],
    experts_parallel: Annotated[int | None, typer.Option(min=1, help="of a run: ranks that split the experts")] = None,
    attention: Annotated[int | None, typer.Option(min=1, help="of a service: attention workers")] = None,
    ffn: Annotated[int | None, typer.Option(min=1, help="of a service: FFN workers")] = None,
    api_key: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a training run or a service another number of workers while it is at work."""
    with failures(), wrong_input():
        if "://" in target:
            if experts_parallel is not None or (attention is None and ffn is None):
                raise ValueError(f"scale {target}: a service takes --attention, --ffn or both")
            _scale_service(target, api_key, attention, ffn, as_json)
        elif experts_parallel is None or attention is not None or ffn is not None:
            raise ValueError(f"scale {target}: a training run takes --experts-parallel, and nothing else")
        else:
            _scale_run(target, experts_parallel, as_json)


def _scale_service(url: str, api_key: str | None, attention: int | None, ffn: int | None, as_json: bool) -> None:
    from expertmesh.launch.operate import ask_to_scale

    scaled = ask_to_scale(url, api_key, attention, ffn)
    if as_json:
        show_json(scaled)
    else:
        typer.echo(
            f"attention {scaled['attention']}, ffn {scaled['ffn']}; "
            f"no request waited longer than {scaled['longest_pause_s']:.2f} s for a token"
        )


def _scale_run(job: str, experts_parallel: int, as_json: bool) -> None:
    """It saves at the end of its step and goes on with another number of workers."""
    from expertmesh.launch.event_log import read_events
    from expertmesh.launch.run_folder import ask_to_scale, await_scale, find_run

    run_dir = find_run(job)
    known = len(read_events(run_dir))
    ask_to_scale(run_dir, experts_parallel)
    event = await_scale(run_dir, known)
    if as_json:
        show_json(event)
    else:
        sizes = event["parallel"]
        typer.echo(f"goes on from step {event['step']} with ep={sizes['ep']} dp={sizes['dp']}")


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


def cluster_down(as_json: JsonOption = False) -> None:
    """End the nodes that `cluster up` started, and no other Ray."""
    from expertmesh.launch import local_cluster

    ended = local_cluster.down()
    if as_json:
        show_json({"ended": ended})
    else:
        typer.echo("ended" if ended else "no cluster is up")
