"""The two kinds of serving workers, and the joined engine: built from a checkpoint, told nothing of clusters.

    joined       Transformer with all experts, one process
    attention    Transformer without experts: cache, router, zero-computation experts, sampling; owns requests
    ffn          the routed experts of every layer, one shard of them; owns no request

Each reads no more of the checkpoint than it holds. On a GPU a model is held and computed in its checkpoint's dtype.
On a CPU it is float32: nothing is rounded, and one token of one request, which is what decoding there mostly is, took
a third of bfloat16's time (2048 x 4096 weights on two cores with AVX512-BF16: 2.4 ms against 7.9 ms).
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.kernels.device import choose_device
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.exchange import FORMS, Layout
from expertmesh.parallel.expert_server import Experts, ExpertServer
from expertmesh.parallel.link import Listener, connect
from expertmesh.parallel.link_dispatcher import DISPATCHERS, Pool
from expertmesh.parallel.placement import expert_shard
from expertmesh.parallel.timeline import Timeline, Turns
from expertmesh.parallel.wire import WIRES
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.gate import LinearGate, TwoLayerGate
from expertmesh.system.model.router import Router
from expertmesh.system.model.transformer import ExpertPool, Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.draft import build_drafter
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.tokenizer import Tokenizer

Module = TypeVar("Module", bound=nn.Module)


def serving_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """What a model is held and computed in; routers are float32 wherever."""
    return torch.float32 if device == "cpu" else getattr(torch, checkpoint.dtype)


def held(module: Module, checkpoint: Checkpoint, device: str) -> Module:
    """The module on `device`, in the dtype for serving, with the checkpoint's weights.

    It moves while it is empty: experts that nothing was written to take no memory yet.
    """
    module.to(device=device, dtype=serving_dtype(checkpoint, device))
    for part in module.modules():
        if isinstance(part, Router | LinearGate | TwoLayerGate):  # a checkpoint may have them finer than the rest
            part.float()
    checkpoint.load(module)
    return module.eval()


def joined_engine(checkpoint: Checkpoint, config: ServeConfig, trace: bool = False) -> EngineLoop:
    """Attention and experts in this process. `trace`: keep spans for `EngineLoop.spans`."""
    device = choose_device().name
    model = held(Transformer(checkpoint.config), checkpoint, device)
    tokenizer = Tokenizer.load(checkpoint.folder)
    drafter = build_drafter(config, checkpoint.config, experts_here=True)
    turns = Turns(Timeline(trace))
    engine = Engine(
        *(model, tokenizer.eos_ids, config, device, [LocalDispatcher()], turns),
        drafter=drafter,
        constraints=Constraints(tokenizer),
    )
    return EngineLoop(engine)


def attention_engine(
    checkpoint: Checkpoint, config: ServeConfig, rank: int, ffn_workers: int, store: dist.Store, trace: bool = False
) -> EngineLoop:
    """Attention worker `rank`, linked to every FFN worker."""
    device = choose_device().name
    model = held(Transformer(checkpoint.config, expert_size=0), checkpoint, device)
    tokenizer = Tokenizer.load(checkpoint.folder)
    timeout = timedelta(seconds=config.exchange_timeout_s)
    pool = Pool(wire_layout(checkpoint, config, device), Turns(Timeline(trace)), Traffic())
    links = [
        [connect(store, rank, ffn, micro_batch, timeout, config.recover_s) for ffn in range(ffn_workers)]
        for micro_batch in range(config.micro_batches)
    ]
    dispatchers = [DISPATCHERS[config.wire](mine, micro_batch, pool) for micro_batch, mine in enumerate(links)]

    def hang_up() -> None:
        for link in (link for mine in links for link in mine):
            link.close()

    drafter = build_drafter(config, checkpoint.config, experts_here=False)
    engine = Engine(
        *(model, tokenizer.eos_ids, config, device, dispatchers, pool.turns, pool.traffic, drafter),
        Constraints(tokenizer),
    )
    return EngineLoop(engine, hang_up)


def run_ffn_worker(
    checkpoint: Checkpoint, config: ServeConfig, rank: int, ffn_workers: int, attention_workers: int, store: dist.Store
) -> None:
    """FFN worker `rank`: answers every attention worker until all of them are gone."""
    device = choose_device().name
    pool = held(ExpertPool(checkpoint.config, rank, ffn_workers), checkpoint, device)

    def here(layer: int) -> range:
        return expert_shard(checkpoint.config.moe_of(layer).ffn_experts, rank, ffn_workers)

    experts = Experts(pool, here, device)
    listener = Listener(store, rank)
    server = ExpertServer(experts, FORMS[config.wire], wire_layout(checkpoint, config, device))
    server.serve(listener, attention_workers * config.micro_batches)


def wire_layout(checkpoint: Checkpoint, config: ServeConfig, device: str) -> Layout:
    return Layout(WIRES[config.wire_format], checkpoint.config.hidden_size, serving_dtype(checkpoint, device))
