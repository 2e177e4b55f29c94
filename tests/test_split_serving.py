"""Serving split in two pools gives the tokens of serving joined: any pools, any number of micro-batches, any bites."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from serving import Answers, answer_in_threads, answers, requests, run_ffn_worker, split_in_threads, texts, wait_for_end
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import AttentionWorker, FFNPool, joined_engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run_dir: Path = tmp_path_factory.mktemp("served")
    prepare_tiny_data(run_dir)
    return open_checkpoint(write_random_checkpoint(run_dir, tiny_model()))


@pytest.fixture(scope="module")
def joined(checkpoint: Checkpoint) -> Answers:
    return answers(joined_engine(checkpoint, ServeConfig()), requests())


WAYS: list[tuple[int, int, dict[str, Any], str]] = [
    (1, 1, {"micro_batches": 1}, "1:1"),
    (1, 1, {"micro_batches": 2}, "1:1, two micro-batches"),
    (1, 1, {}, "1:1, three"),
    (2, 1, {"micro_batches": 4}, "2:1, four"),
    (1, 2, {}, "1:2"),
    (2, 3, {}, "2:3"),
    (1, 5, {"micro_batches": 2}, "an FFN worker without experts"),
    (1, 2, {"wire": "broadcast"}, "broadcast, 1:2"),
    (2, 3, {"wire": "broadcast", "micro_batches": 2}, "broadcast, 2:3"),
    (1, 2, {"prefix_cache": False, "step_tokens": 9}, "prompts in bites, nothing shared"),
    (2, 2, {"cache_tokens": 64, "page_size": 4, "step_tokens": 24}, "few pages: some requests are computed twice"),
    (1, 2, {"max_running": 2, "micro_batches": 4}, "fewer requests than micro-batches"),
]


@pytest.mark.parametrize("attention, ffn, settings, reason", WAYS, ids=[reason for *_, reason in WAYS])
def test_split_equals_joined(checkpoint, joined, attention, ffn, settings, reason):
    said = split_in_threads(checkpoint, ServeConfig(**settings), attention, ffn, requests())
    assert said == [joined] * attention
    assert any(len(set(answer)) > 4 for answer in joined.values()), "one that always says the same proves nothing"


@pytest.mark.parametrize("settings", [{"step_tokens": 5}, {"prefix_cache": False}, {"cache_tokens": 64}], ids=str)
def test_joined_in_other_ways(checkpoint, joined, settings):
    assert answers(joined_engine(checkpoint, ServeConfig(**settings)), requests()) == joined


def test_cancelled_while_their_rows_are_away(checkpoint, joined):
    """Half of the requests are cancelled at once or after their first token; the others say what they would alone."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    config = ServeConfig(max_running=4, page_size=4, micro_batch_tokens=1)
    answering = answer_in_threads(checkpoint, config, FFNPool(1), 1, store)
    loop = AttentionWorker(checkpoint, config, 0, FFNPool(1), store).loop
    kept = {f"{name}-{time_}" for name in joined for time_ in range(2)}
    said: dict[str, list[int]] = {name: [] for name in kept}
    for time_ in range(4):
        for request in requests():
            loop.submit(replace(request, id=f"{request.id}-{time_}"))
    for name in joined:
        loop.cancel(f"{name}-3")
    ended: set[str] = set()
    for batch in loop.outputs():
        for output in batch:
            name, time_ = output.request_id.split("-")
            if int(time_) == 2:
                loop.cancel(output.request_id)
            elif int(time_) < 2:
                said[output.request_id].append(output.token_id)
                ended |= {output.request_id} if output.finish_reason else set()
        if ended == kept:
            break
    for name in joined:
        loop.cancel(f"{name}-2")
    deadline = time.monotonic() + 30
    while loop.counts().pages_used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.counts()[:2] == (0, 0) and loop.counts().pages_used == 0
    loop.close()
    wait_for_end(answering)
    assert said == {name: joined[name.split("-")[0]] for name in kept}


def test_fp8_on_the_wire_says_nearly_the_same_wherever_the_experts_are(checkpoint, joined):
    """Tokens are rounded one by one, so pools and micro-batches make no difference to what is said."""
    ways = [(1, 1, 1, "routed"), (1, 2, 3, "routed"), (2, 3, 2, "broadcast")]
    said = [
        split_in_threads(checkpoint, ServeConfig(wire_format="fp8", wire=wire, micro_batches=m), a, f, requests())[0]
        for a, f, m, wire in ways
    ]
    assert said[0] == said[1] == said[2]
    same = sum(a == b for name in joined for a, b in zip(said[0][name], joined[name], strict=True))
    assert 0.5 < same / 144 < 1, "rounded, but not away"


def _attention(rank: int, port: int, ffn: int, checkpoint: Checkpoint, config: ServeConfig, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    results.put(answers(AttentionWorker(checkpoint, config, rank, FFNPool(ffn), store).loop, requests()))


def _ffn(rank: int, port: int, ffn: int, attention: int, checkpoint: Checkpoint, config: ServeConfig) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    run_ffn_worker(checkpoint, config, rank, FFNPool(ffn), attention, store)


def test_in_processes_of_their_own(checkpoint, joined):
    attention, ffn, config = 2, 2, ServeConfig(micro_batch_tokens=1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_ffn, args=(rank, store.port, ffn, attention, checkpoint, config)) for rank in range(ffn)
    ] + [
        context.Process(target=_attention, args=(rank, store.port, ffn, checkpoint, config, results))
        for rank in range(attention)
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in range(attention):
            assert results.get(timeout=120) == joined
        deadline = time.monotonic() + 120  # FFN workers end by themselves once the attention workers are gone
        for worker in workers:
            worker.join(timeout=max(0.1, deadline - time.monotonic()))
        assert [worker.exitcode for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()


def test_nested_drafts_beside_an_ffn_pool(tmp_path):
    """The pool's experts answer at a part of their width: as many drafts are right as where the experts are here."""
    prepare_tiny_data(tmp_path)
    model = tiny_model(moe={"expert": {"hidden_size": 32, "nested": [0.25, 1.0]}})
    nested = open_checkpoint(write_random_checkpoint(tmp_path, model))
    whole = answers(joined_engine(nested, ServeConfig()), requests())
    config = ServeConfig(drafts="nested", draft_width=0.25)
    assert split_in_threads(nested, config, 1, 2, requests()) == [whole]

    pool, store = FFNPool(2), dist.HashStore()
    answering = answer_in_threads(nested, config, pool, 1, store)
    accepted = []
    for loop in (joined_engine(nested, config), AttentionWorker(nested, config, 0, pool, store).loop):
        texts(loop, requests()[:1])
        accepted.append(loop.counts().accepted_tokens)
        loop.close()
    wait_for_end(answering)
    assert accepted[0] == accepted[1] > 0
