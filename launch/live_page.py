"""A training run in a browser, as it goes on: its report so far, its workers, what it waits for and what happened.

    GET /           the page, launch/live_page.html on top of the report's; it takes over every 2 s what has changed
    GET /metrics    the run for Prometheus

Only the folder is read, never the job asked: another machine may write it, and the run may be long over.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from expertmesh.launch.event_log import read_events
from expertmesh.launch.run_metrics import run_metrics
from expertmesh.launch.status import status_of
from expertmesh.system.train.read_run import Run, RunReader
from expertmesh.system.train.report import figures_of, page_templates, plot

MOST_WORKERS, MOST_EVENTS = 32, 60  # rows of a table that a person reads


def build_app(run_dir: Path) -> FastAPI:
    """Build the app that shows one run; later, while its folder cannot be read, it answers 503 and says why."""
    app = FastAPI(title="expertmesh", openapi_url=None)
    page = page_templates(Path(__file__).parent).get_template("live_page.html")
    reader, reading = RunReader(run_dir), threading.Lock()
    reader.read()  # a long log takes seconds: better before anybody asks

    def look() -> tuple[dict[str, Any], Run]:
        with reading:
            return status_of(run_dir), reader.read()

    # No coroutines: a slow file system holds up one thread, not the server.
    @app.get("/")
    def show() -> Response:
        """Show the run to people."""
        return HTMLResponse(page.render(live_figures(run_dir, *look())))

    @app.get("/metrics")
    def figures() -> Response:
        """Tell Prometheus of it."""
        return Response(run_metrics(run_dir.name, *look()), media_type=CONTENT_TYPE_LATEST)

    async def say_why(request: Request, error: Exception) -> Response:
        return PlainTextResponse(" ".join(str(error).split()), 503)

    app.add_exception_handler(OSError, say_why)
    app.add_exception_handler(ValueError, say_why)
    return app


def serve(app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer on `listener`, a bound socket, until interrupted; `ready` is called once it can be asked."""
    listener.listen()
    ready()
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def live_figures(run_dir: Path, status: dict[str, Any], run: Run) -> dict[str, Any]:
    """Gather what live_page.html shows: the report's figures, and those of a job that is at work."""
    workers, events = status["workers"], read_events(run_dir)
    # Those that a person looks for come first: lost ones, then those that are behind.
    workers = sorted(workers, key=lambda worker: (worker["state"] in ("at work", "done"), worker["step"]))
    speeds = [(step["step"], step["tokens_per_second"] / 1000) for step in run.steps]
    # As they are now: the log has those that the run began with.
    start = run.start | {key: status[key] for key in ("parallel", "steps")} | {"world_size": len(status["workers"])}
    return figures_of(run, run_dir.name) | {
        "status": status,
        "start": start,
        "tokens_per_second": status["tokens_per_second"],
        "workers": workers[:MOST_WORKERS],
        "more_workers": len(workers[MOST_WORKERS:]),
        "happened": events[: -MOST_EVENTS - 1 : -1],
        "earlier_events": len(events[:-MOST_EVENTS]),
        "speed": plot(speeds, height=200, unit="thousand tokens/s"),
    }
