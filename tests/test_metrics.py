"""What Prometheus reads of a server: every series and its value."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing
from pathlib import Path

import pytest
from fake_engine import END, FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.launch.metrics import Metrics, Observed
from expertmesh.launch.metrics import __file__ as metrics_file
from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import Request, Sampling

PLACE = {name: number for number, name in enumerate(EngineCounts._fields, start=1)}  # the first worker's; 3 x together

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(metrics: Metrics, engine: FakeEngine) -> Series:
    text = asyncio.run(metrics.text(engine)).decode()
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "org/tiny"
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


TOLD = {
    "vllm:num_requests_running": 3 * PLACE["running"],
    "vllm:num_requests_waiting": 3 * PLACE["waiting"],
    "vllm:kv_cache_usage_perc": PLACE["pages_used"] / PLACE["pages"],
    "expertmesh_micro_batches_in_flight": 3 * PLACE["in_flight"],
    "vllm:num_preemptions_total": 3 * PLACE["preemptions"],
    "vllm:prompt_tokens_total": 3 * PLACE["prompt_tokens"],
    "vllm:generation_tokens_total": 3 * PLACE["generated_tokens"],
    "vllm:prefix_cache_queries_total": 3 * PLACE["prompt_tokens"],
    "vllm:prefix_cache_hits_total": 3 * PLACE["reused_tokens"],
    "vllm:spec_decode_num_draft_tokens_total": 3 * PLACE["drafted_tokens"],
    "vllm:spec_decode_num_accepted_tokens_total": 3 * PLACE["accepted_tokens"],
    "expertmesh_wire_bytes_total": 3 * PLACE["sent_bytes"],
    "expertmesh_wire_bytes_saved_total": 3 * PLACE["saved_bytes"],
}


def test_what_the_engine_tells():
    series = read(Metrics("org/tiny"), FakeEngine(lambda _: []))
    for name, expected in TOLD.items():
        assert value(series, name) == pytest.approx(expected), name
    assert value(series, "expertmesh_expert_tokens_total", layer="3", expert="1") == 12
    assert value(series, "expertmesh_stage_work_seconds_total", stage="attention 0") == 1.5
    assert value(series, "expertmesh_stage_bubble", stage="attention 0") == 0.25
    assert ("expertmesh_stage_bubble", frozenset({("stage", "wire 0")})) not in series


def test_requests_are_timed():
    """One that ends, one that is cut at max_tokens, one whose caller leaves after its first token."""
    engine, metrics = FakeEngine(lambda _: [70, 71, 72, END]), Metrics("org/tiny")
    observed = Observed(engine, metrics)
    engine.pause = 0.02

    async def ask() -> None:
        for length in (9, 2):
            tokens = [output async for output in observed.generate(Request("x", [1], Sampling(length)))]
            assert len(tokens) == min(length, 4)
        async with aclosing(observed.generate(Request("x", [1], Sampling(9)))) as outputs:
            async for _ in outputs:
                break
        assert not engine.running

    asyncio.run(ask())
    series = read(metrics, engine)
    assert value(series, "vllm:time_to_first_token_seconds_count") == 3
    assert value(series, "vllm:inter_token_latency_seconds_count") == 3 + 1
    assert value(series, "vllm:e2e_request_latency_seconds_count") == 2
    assert value(series, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(series, "vllm:request_success_total", finished_reason="length") == 1
    assert value(series, "vllm:time_to_first_token_seconds_sum") >= 3 * 0.02
    assert value(series, "vllm:time_to_first_token_seconds_bucket", le="0.01") == 0
    assert value(series, "vllm:e2e_request_latency_seconds_sum") >= 6 * 0.02


def test_the_grafana_board_asks_for_what_there_is():
    board = json.loads(Path(metrics_file).with_name("grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"(?:vllm:|expertmesh_)[a-z0-9_]+", text)}
    engine, metrics = FakeEngine(lambda _: [70, END]), Metrics("org/tiny")

    async def ask() -> None:
        async for _ in Observed(engine, metrics).generate(Request("x", [1], Sampling(9))):
            pass

    asyncio.run(ask())
    assert asked and asked <= {name for name, _ in read(metrics, engine)}
    assert all('{model_name="$model"}' in text for text in expressions)
