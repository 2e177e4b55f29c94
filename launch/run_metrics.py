"""What a training run has come to, as Prometheus reads it: expertmesh_training_, each series with the label `run`.

    step, planned_steps, epoch, running                       where it stands; running: 1 while a job is at it
    loss, validation_loss, learning_rate, grad_norm           of the last step; of the last validation
    tokens_per_second                                         median of the last steps
    failures_total, workers{state}                            since the run began; at present
    expert_imbalance{layer}                                   load of the busiest FFN expert over the mean one's
    updated_timestamp_seconds                                 when its job last told of itself: a lost one falls behind

A figure that nobody has logged yet is left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from expertmesh.launch.recovery import How
from expertmesh.system.train.read_run import Run

WORKER_STATES = ("starting", "at work", *How)


def run_metrics(name: str, status: dict[str, Any], run: Run) -> bytes:
    """`status`: see `status_of`. `run`: what was logged by then."""
    registry = CollectorRegistry()
    registry.register(_Told(name, status, run))
    return generate_latest(registry)


class _Told:
    """For the registry."""

    def __init__(self, name: str, status: dict[str, Any], run: Run) -> None:
        self._name, self._status, self._run = name, status, run

    def collect(self) -> Iterator[Metric]:
        status, run = self._status, self._run
        last = run.steps[-1] if run.steps else {}
        figures = {
            "step": ("the last step that was logged", last.get("step", 0)),
            "planned_steps": ("steps of the whole run", status["steps"]),
            "epoch": ("lives of the process group before this one", status["epoch"]),
            "running": ("whether a job trains it now", int(status["goes_on"])),
            "loss": ("cross entropy of the last step, nats per token", last.get("loss")),
            "validation_loss": ("of held-out tokens", run.validations[-1]["loss"] if run.validations else None),
            "learning_rate": ("of the last step", last.get("learning_rate")),
            "grad_norm": ("of the last step", last.get("grad_norm")),
            "tokens_per_second": ("median of the last steps, all ranks", status["tokens_per_second"]),
            "updated_timestamp_seconds": ("when the job last told", time.time() - status["seconds_since_update"]),
        }
        for figure, (text, value) in figures.items():
            gauge = GaugeMetricFamily(f"expertmesh_training_{figure}", text, labels=["run"])
            if value is not None:
                gauge.add_metric([self._name], value)
            yield gauge
        failures = CounterMetricFamily("expertmesh_training_failures", "workers lost", labels=["run"])
        failures.add_metric([self._name], status["failures"])
        yield failures
        yield self._workers()
        imbalance = GaugeMetricFamily(
            "expertmesh_training_expert_imbalance", "busiest FFN expert over the mean", labels=["run", "layer"]
        )
        for layer in run.layers:
            imbalance.add_metric([self._name, str(layer["layer"])], layer["load_max_over_mean"])
        yield imbalance

    def _workers(self) -> Metric:
        """Of a job that is gone none is at work, whatever was last heard of them."""
        here = self._status["workers"] if self._status["goes_on"] else []
        counts = Counter(worker["state"] for worker in here)
        workers = GaugeMetricFamily("expertmesh_training_workers", "of the present epoch", labels=["run", "state"])
        for state in WORKER_STATES:
            workers.add_metric([self._name, state], counts[state])
        return workers
