"""What Prometheus reads of a training run: every series and its value, while it trains and when its job is gone."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_logs import START, routers, step, validation, write_log

from expertmesh.launch.run_metrics import run_metrics
from expertmesh.system.train.read_run import RunReader

STATUS = {
    "goes_on": True,
    "epoch": 2,
    "steps": 200,
    "tokens_per_second": 5002.0,
    "failures": 3,
    "seconds_since_update": 40.0,
    "workers": [{"state": "at work"}, {"state": "at work"}, {"state": "died"}],
}


def series(folder, **changed) -> dict[tuple, float]:
    text = run_metrics("mine", STATUS | changed, RunReader(folder).read()).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "mine"
            found[(sample.name.removeprefix("expertmesh_training_"), *labels.values())] = sample.value
    return found


def test_a_run_that_goes_on(tmp_path):
    layers = routers(1, 3)
    layers[1]["load_max_over_mean"] = 2.5
    found = series(write_log(tmp_path, START, step(1), step(2, 4.0, layers=layers), validation(2, 4.5)))
    assert found.pop(("updated_timestamp_seconds",)) == pytest.approx(time.time() - 40, abs=5)
    assert found == {
        ("step",): 2,
        ("planned_steps",): 200,
        ("epoch",): 2,
        ("running",): 1,
        ("loss",): 4.0,
        ("validation_loss",): 4.5,
        ("learning_rate",): 1e-3,
        ("grad_norm",): 1.2,
        ("tokens_per_second",): 5002.0,
        ("failures_total",): 3,
        ("workers", "starting"): 0,
        ("workers", "at work"): 2,
        ("workers", "done"): 0,
        ("workers", "raised"): 0,
        ("workers", "died"): 1,
        ("expert_imbalance", "1"): 0.125,
        ("expert_imbalance", "3"): 2.5,
    }


def test_before_the_first_step_there_are_no_figures_of_one(tmp_path):
    found = series(tmp_path, tokens_per_second=None)
    assert found[("step",)] == 0 and not {("loss",), ("validation_loss",), ("tokens_per_second",)} & set(found)


def test_of_a_job_that_is_gone_nobody_is_at_work(tmp_path):
    found = series(tmp_path, goes_on=False)
    assert found[("running",)] == 0 and found[("workers", "at work")] == 0
