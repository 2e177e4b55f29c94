"""What a server counts, as Prometheus reads it: under vLLM's names where the meaning is the same, else expertmesh_.

    vllm:time_to_first_token_seconds, inter_token_latency_seconds, e2e_request_latency_seconds      here, by `Observed`
    vllm:num_requests_running, kv_cache_usage_perc, generation_tokens_total, ...                    told by the engine
    expertmesh_stage_work_seconds_total, expertmesh_stage_bubble     attention, wire and FFN workers of split serving
    expertmesh_expert_tokens_total       choices that each expert of each layer served; zero-computation ones come last
    expertmesh_wire_bytes_total          and those that zero-computation experts saved

Totals never fall: what an engine told last stays in them when it is gone.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from expertmesh.system.serve.engine import EngineCounts
from expertmesh.system.serve.request import EngineClient, Output, Request

# Seconds; from a fast decode step to a long answer.
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (*FAST[5:], 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Of one server and model; every series carries the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.model_name, self.registry = model_name, CollectorRegistry()
        self._told: list[Metric] = []

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self.first = histogram("vllm:time_to_first_token_seconds", "from the request to its first token", FAST)
        self.between = histogram("vllm:inter_token_latency_seconds", "from one token to the next", FAST)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "from the request to its last token", SLOW)
        self.done = Counter(
            "vllm:request_success", "finished requests", ["model_name", "finished_reason"], registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For the registry: what the engine told last."""
        yield from self._told

    async def text(self, engine: EngineClient) -> bytes:
        """All of it, now."""
        counts, stages, loads = await engine.counts(), await engine.stages(), await engine.loads()
        self._told = [*self._of_counts(counts), *self._of_stages(stages), self._of_experts(loads)]
        return generate_latest(self.registry)

    def _of_counts(self, each: list[EngineCounts]) -> Iterator[Metric]:
        def total(field: str) -> int:
            return sum(getattr(counts, field) for counts in each)

        gauges = {
            "vllm:num_requests_running": ("requests that hold pages", total("running")),
            "vllm:num_requests_waiting": ("requests that wait for pages", total("waiting")),
            "vllm:kv_cache_usage_perc": ("share of pages in use, 0 to 1", total("pages_used") / max(total("pages"), 1)),
            "expertmesh_micro_batches_in_flight": ("micro-batches being computed", total("in_flight")),
        }
        counters = {
            "vllm:num_preemptions": ("requests that gave their pages up", "preemptions"),
            "vllm:prompt_tokens": ("tokens of admitted prompts", "prompt_tokens"),
            "vllm:generation_tokens": ("tokens generated", "generated_tokens"),
            "vllm:prefix_cache_queries": ("tokens of prompts looked up in the cache", "prompt_tokens"),
            "vllm:prefix_cache_hits": ("of them, found", "reused_tokens"),
            "vllm:spec_decode_num_draft_tokens": ("tokens guessed ahead", "drafted_tokens"),
            "vllm:spec_decode_num_accepted_tokens": ("of them, those that became text", "accepted_tokens"),
            "expertmesh_wire_bytes": ("between attention and FFN workers", "sent_bytes"),
            "expertmesh_wire_bytes_saved": ("that zero-computation experts did not send", "saved_bytes"),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self.model_name], value)
            yield gauge
        for name, (text, field) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model_name], total(field))
            yield counter

    def _of_stages(self, stages: dict[str, dict[str, float]]) -> Iterator[Metric]:
        labels = ["model_name", "stage"]
        work = CounterMetricFamily("expertmesh_stage_work_seconds", "at work", labels=labels)
        bubble = GaugeMetricFamily("expertmesh_stage_bubble", "share of the time in flight without work", labels=labels)
        for stage, told in stages.items():
            work.add_metric([self.model_name, stage], told["seconds"])
            if "bubble" in told:
                bubble.add_metric([self.model_name, stage], told["bubble"])
        yield work
        yield bubble

    def _of_experts(self, loads: dict[int, list[int]]) -> Metric:
        served = CounterMetricFamily(
            "expertmesh_expert_tokens", "choices served", labels=["model_name", "layer", "expert"]
        )
        for layer, load in loads.items():
            for expert, count in enumerate(load):
                served.add_metric([self.model_name, str(layer), str(expert)], count)
        return served


class Observed:
    """An `EngineClient` whose requests are timed; all else is asked of the one behind it."""

    def __init__(self, engine: EngineClient, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self.context_length = engine.context_length

    @property
    def down(self) -> str | None:
        return self._engine.down

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        metrics, began = self._metrics, time.perf_counter()
        before = began
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    now = time.perf_counter()
                    (metrics.first if before == began else metrics.between).observe(now - before)
                    before = now
                    if output.finish_reason is not None:
                        metrics.whole.observe(now - began)
                        metrics.done.labels(metrics.model_name, output.finish_reason).inc()
                    yield output
        except RuntimeError:  # this request's, or of all
            metrics.done.labels(metrics.model_name, "error").inc()
            raise

    async def counts(self) -> list[EngineCounts]:
        return await self._engine.counts()

    async def loads(self) -> dict[int, list[int]]:
        return await self._engine.loads()

    async def stages(self) -> dict[str, dict[str, float]]:
        return await self._engine.stages()
