"""The FFN pool of an attention worker is changed for another while requests are answered: no text changes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist
from serving import Answers, answer_in_threads, answers, requests, texts, wait_for_end
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.parallel.eplb import place_by_load
from expertmesh.parallel.link import LinkBroken, Listener, Seat, has_come
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import AttentionWorker, FFNPool, joined_engine

CONFIG = ServeConfig(max_running=4, page_size=4, micro_batch_tokens=1, exchange_timeout_s=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run_dir: Path = tmp_path_factory.mktemp("served")
    prepare_tiny_data(run_dir)
    return open_checkpoint(write_random_checkpoint(run_dir, tiny_model()))


@pytest.fixture(scope="module")
def joined(checkpoint: Checkpoint) -> Answers:
    return answers(joined_engine(checkpoint, ServeConfig()), requests())


@pytest.fixture
def store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    return store


def copied(checkpoint: Checkpoint, workers: int, number: int) -> FFNPool:
    """A pool with copies of the experts with the lowest numbers."""
    model = checkpoint.config
    experts = model.moe.ffn_experts
    slots = workers * (experts // workers + 1)
    loads = [float(experts - expert) for expert in range(experts)]
    return FFNPool(workers, number, {layer: place_by_load(loads, slots, workers) for layer in model.moe_layers})


def test_pools_come_and_go_under_requests(checkpoint, joined, store):
    """1, 2, 3, 1 workers, and two with copies: a change after every few tokens, and each old pool ends by itself."""
    pools = [FFNPool(1), FFNPool(2, 1), FFNPool(3, 2), FFNPool(1, 3), copied(checkpoint, 2, 4)]
    answering = {0: answer_in_threads(checkpoint, CONFIG, pools[0], 1, store)}
    worker = AttentionWorker(checkpoint, CONFIG, 0, pools[0], store)
    open_meanwhile: list[int] = []

    def change() -> None:
        for pool in pools[1:]:
            answering[pool.number] = answer_in_threads(checkpoint, CONFIG, pool, 1, store)
            worker.prepare(pool)
            open_meanwhile.append(worker.loop.counts().running)
            worker.change_over(pool)
            wait_for_end(answering[pool.number - 1])

    changing = Thread(target=change, daemon=True)
    changing.start()
    while changing.is_alive():
        assert texts(worker.loop, requests()) == joined
    assert len(open_meanwhile) == 4 and all(open_meanwhile[1:])
    assert answers(worker.loop, requests()) == joined
    wait_for_end(answering[4])


def test_an_idle_worker_changes_over_at_once(checkpoint, joined, store):
    old, new = FFNPool(2), FFNPool(1, 1)
    first = answer_in_threads(checkpoint, CONFIG, old, 1, store)
    worker = AttentionWorker(checkpoint, CONFIG, 0, old, store)
    second = answer_in_threads(checkpoint, CONFIG, new, 1, store)
    worker.change_over(new)  # prepares by itself
    wait_for_end(first)
    assert answers(worker.loop, requests()) == joined
    wait_for_end(second)


def test_a_pool_that_is_not_reached_changes_nothing(checkpoint, joined, store):
    present, absent = FFNPool(1), FFNPool(2, 1)
    answering = answer_in_threads(checkpoint, CONFIG, present, 1, store)
    worker = AttentionWorker(checkpoint, CONFIG.model_copy(update={"recover_s": 0.1}), 0, present, store)
    for ffn in range(2):
        assert not has_come(store, Seat(ffn, 1))
        Listener(store, Seat(ffn, 1)).close()
        assert has_come(store, Seat(ffn, 1))
    with pytest.raises(LinkBroken, match="FFN worker 0 is gone"):
        worker.change_over(absent)
    assert answers(worker.loop, requests()) == joined
    wait_for_end(answering)


def test_a_change_that_was_only_prepared_ends_with_the_worker(checkpoint, store):
    present, prepared = FFNPool(1), FFNPool(2, 1)
    answering = [
        thread for pool in (present, prepared) for thread in answer_in_threads(checkpoint, CONFIG, pool, 1, store)
    ]
    worker = AttentionWorker(checkpoint, CONFIG, 0, present, store)
    worker.prepare(prepared)
    worker.loop.close()
    wait_for_end(answering)
    with pytest.raises(RuntimeError, match="the engine ended before it could ask another FFN pool"):
        worker.loop.redirect([])
