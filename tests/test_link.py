"""Serving split in two pools gives the tokens of serving joined: processes, real links, a real checkpoint."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.serve.workers import attention_engine, joined_engine, run_ffn_worker


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 2, 7, 19, 30)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in lengths]
    greedy = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    drawn = Sampling(max_tokens=24, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)
    return [Request(f"r{i}", p, drawn if i == 2 else greedy) for i, p in enumerate(prompts)]


def answers(loop, wanted: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in wanted}
    for request in wanted:
        loop.submit(request)
    open_requests = len(wanted)
    for batch in loop.outputs():
        for output in batch:
            tokens[output.request_id].append(output.token_id)
            open_requests -= output.finish_reason is not None
        if not open_requests:
            loop.close()
            return tokens
    raise AssertionError("the engine stopped early")


def _attention(rank: int, port: int, ffn: int, checkpoint: Checkpoint, config: ServeConfig, results) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    loop = attention_engine(checkpoint, config, rank, ffn, store)
    results.put(answers(loop, requests()))


def _ffn(rank: int, port: int, ffn: int, attention: int, checkpoint: Checkpoint, config: ServeConfig) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    run_ffn_worker(checkpoint, config, rank, ffn, attention, store)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run_dir = tmp_path_factory.mktemp("served")
    prepare_tiny_data(run_dir)
    return open_checkpoint(write_random_checkpoint(run_dir, tiny_model()))


@pytest.fixture(scope="module")
def joined(checkpoint: Checkpoint) -> dict[str, list[int]]:
    return answers(joined_engine(checkpoint, ServeConfig()), requests())


@pytest.mark.parametrize(
    "attention, ffn, micro_batches",
    [(1, 1, 1), (1, 2, 3), (2, 1, 2), (1, 5, 2)],
    ids=["1:1", "1:2 in three micro-batches", "2:1", "an FFN worker without experts"],
)
def test_split_equals_joined(checkpoint, joined, attention, ffn, micro_batches):
    config = ServeConfig(micro_batches=micro_batches)
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
        deadline = time.monotonic() + 30  # FFN workers end by themselves once the attention workers are gone
        for worker in workers:
            worker.join(timeout=max(0.1, deadline - time.monotonic()))
        assert [worker.exitcode for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()
