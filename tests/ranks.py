"""Run one function on several gloo ranks, each a process of its own, and hand back what each returned.

Ranks are forked from a process that has imported what they need and done nothing else: eight that import torch and
Megatron themselves take a minute of two cores.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expertmesh.parallel.groups import destroy_groups
from expertmesh.parallel.nodes import Nodes

IMPORTED = ["torch", "deepspeed", "megatron.core.tensor_parallel", "expertmesh.system.train.trainer", "pytest"]
TIMEOUT = timedelta(seconds=60)


def _rank_main(rank: int, world: int, port: int, results: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again by each collection
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        results.put((rank, fn(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call `fn(*args)` on `world` ranks of one gloo process group; return the results in rank order.

    `fn` and `args` must be picklable (a module-level function). A rank that raises fails the caller with its traceback.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)  # heeded when the first rank is started
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_rank_main, args=(rank, world, store.port, results, fn, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        collected: dict[int, Any] = {}
        for _ in range(world):
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"rank {rank} failed:\n{error}"
            collected[rank] = value
        return [collected[rank] for rank in range(world)]
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def new_world() -> None:
    """On ranks that go through several layouts, after each: once all are here, leave every group and form a new world.

    A gloo group has a thread that wakes a hundred times a second, used or not: those of ten layouts take a core.
    """
    store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    if store.add("left", 1) == world:  # by the store: a rank that leaves may cut off what peers have yet to read
        store.set("all left", "")
    store.wait(["all left"], TIMEOUT)
    destroy_groups()
    gc.collect()  # a model may hold the last of a group
    store = dist.PrefixStore("next", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def run_threads(fn: Callable[[dist.ProcessGroup], Any], world: int) -> list[Any]:
    """Call `fn(group)` on `world` threads of this process, each with its own end of one gloo group; results in order.

    Starts in no time, for code that is given its group. What asks for the default group needs `run_ranks`.
    """
    return run_threads_on_nodes(lambda group, nodes: fn(group), world, world)


def run_threads_on_nodes(fn: Callable[[dist.ProcessGroup, Nodes], Any], world: int, ranks_per_node: int) -> list[Any]:
    """As `run_threads`, calling `fn(group, nodes)`: the ranks are told that so many of them at a time share a node."""
    shared, timeout = dist.HashStore(), timedelta(seconds=30)
    ends: list[dist.ProcessGroup] = []  # one that is dropped early breaks the others' connecting

    def end_of(name: str, rank: int, size: int) -> dist.ProcessGroup:
        store = dist.PrefixStore(name, shared)
        group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        ends.append(group)
        return group

    def rank_main(rank: int) -> Any:
        node, place = divmod(rank, ranks_per_node)
        nodes = world // ranks_per_node
        group = end_of("all", rank, world)
        inside = end_of(f"node {node}", place, ranks_per_node) if 1 < ranks_per_node < world else None
        between = end_of(f"place {place}", node, nodes) if nodes > 1 else None
        return fn(group, Nodes(ranks_per_node, inside if nodes > 1 else group, between))

    with ThreadPoolExecutor(world) as threads:
        ranks = [threads.submit(rank_main, rank) for rank in range(world)]
        for finished in as_completed(ranks):  # the first to fail says why; the others only miss it
            finished.result()
        return [rank.result() for rank in ranks]
