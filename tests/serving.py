"""What several tests ask of an engine, and its answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist

from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Output, Request, Sampling
from expertmesh.system.serve.workers import attention_engine, run_ffn_worker

Answers = dict[str, list[int]]


def requests() -> list[Request]:
    """Six of 1 to 30 tokens and 24 more; one is drawn, two begin alike."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (1, 2, 7, 19, 30)]
    prompts.append([*prompts[4][:20], 9])
    greedy = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    drawn = Sampling(max_tokens=24, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)
    return [Request(f"r{i}", p, drawn if i == 2 else greedy) for i, p in enumerate(prompts)]


def answers(loop: EngineLoop, wanted: list[Request]) -> Answers:
    """The tokens of each; the loop is closed after them."""
    tokens: Answers = {request.id: [] for request in wanted}
    for request in wanted:
        loop.submit(request)
    open_requests = len(wanted)
    for batch in loop.outputs():
        for output in batch:
            tokens[output.request_id].append(output.token_id)
            open_requests -= output.finish_reason is not None
        if not open_requests:
            used = loop.counts().pages_used
            loop.close()
            assert used == 0, f"{used} pages were not given back"
            return tokens
    raise AssertionError("the engine stopped early")


def steps_to_the_end(engine: Engine, wanted: list[Request]) -> Iterator[list[Output]]:
    """What each step says, from the arrival of all of them until no work is left; then no page is held."""
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        yield engine.step()
    assert engine.counts().pages_used == 0, "a page was lost"


def pools_in_threads(
    checkpoint: Checkpoint, config: ServeConfig, attention: int, ffn: int
) -> tuple[list[EngineLoop], list[Thread]]:
    """The attention workers and the threads of the FFN workers, which end after them; on the links all is as ever."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    pool = [
        Thread(target=run_ffn_worker, args=(checkpoint, config, rank, ffn, attention, store), daemon=True)
        for rank in range(ffn)
    ]
    for worker in pool:
        worker.start()
    return [attention_engine(checkpoint, config, rank, ffn, store) for rank in range(attention)], pool


def split_in_threads(
    checkpoint: Checkpoint, config: ServeConfig, attention: int, ffn: int, wanted: list[Request]
) -> list[Answers]:
    """What each attention worker says; all workers in threads of this process."""
    loops, pool = pools_in_threads(checkpoint, config, attention, ffn)
    said: list[Answers] = [{} for _ in loops]

    def ask(rank: int) -> None:
        said[rank] = answers(loops[rank], wanted)

    askers = [Thread(target=ask, args=(rank,), daemon=True) for rank in range(attention)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(120)
    for worker in pool:
        worker.join(30)
        assert not worker.is_alive(), "an FFN worker goes on though nobody is left to ask it"
    return said
