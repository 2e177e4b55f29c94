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
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.kernels.device import choose_device
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import Dispatcher, LocalDispatcher
from expertmesh.parallel.exchange import FORMS, Layout
from expertmesh.parallel.expert_server import Experts, ExpertServer
from expertmesh.parallel.link import LastingLink, Listener, Seat, connect
from expertmesh.parallel.link_dispatcher import DISPATCHERS, Shared
from expertmesh.parallel.placed_dispatcher import PlacedDispatcher
from expertmesh.parallel.placement import expert_shard
from expertmesh.parallel.timeline import Timeline, Turns
from expertmesh.parallel.wire import WIRES
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.gate import LinearGate, TwoLayerGate
from expertmesh.system.model.router import Router
from expertmesh.system.model.transformer import ExpertPool, Transformer, shards
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.constraint import Constraints
from expertmesh.system.serve.draft import build_drafter
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.placing import Placements, choose_copies
from expertmesh.system.tokenizer import Tokenizer

Module = TypeVar("Module", bound=nn.Module)
Links = list[list[LastingLink]]  # of a micro-batch, to each FFN worker


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
    drafter = build_drafter(config, checkpoint.config)
    turns = Turns(Timeline(trace))
    engine = Engine(
        *(model, tokenizer.eos_ids, config, device, [LocalDispatcher()], turns),
        drafter=drafter,
        constraints=Constraints(tokenizer),
    )
    return EngineLoop(engine)


class FFNPool(NamedTuple):
    """The FFN workers that hold all routed experts between them, as all workers know them."""

    workers: int
    number: int = 0  # of the pools that a service has had
    placements: Placements = {}


class AttentionWorker:
    """Attention worker `rank`: an engine and its links to an FFN pool, which can be changed while it answers.

    A change goes in two steps, so that it can be given up until the last of all attention workers is ready for it:

        prepare      links to the new pool, beside those in use
        change_over  every lane ends its micro-batch with the old pool and begins the next with the new one; then the
                     old links are closed, and FFN workers that nobody asks any more end
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ServeConfig,
        rank: int,
        pool: FFNPool,
        store: dist.Store,
        trace: bool = False,
    ) -> None:
        device = choose_device().name
        self._config, self._rank, self._store = config, rank, store
        self._shared = Shared(wire_layout(checkpoint, config, device), Turns(Timeline(trace)), Traffic())
        no_experts = shards(checkpoint.config, 0, 0)
        model = held(Transformer(checkpoint.config, no_experts), checkpoint, device)  # while the pool loads, too
        self._present = _Linked(pool, self._link_up(pool))
        self._prepared: _Linked | None = None
        tokenizer = Tokenizer.load(checkpoint.folder)
        drafter = build_drafter(config, checkpoint.config)
        dispatchers, shared = self._dispatchers(self._present), self._shared
        engine = Engine(
            *(model, tokenizer.eos_ids, config, device, dispatchers, shared.turns, shared.traffic, drafter),
            Constraints(tokenizer),
        )
        self.loop = EngineLoop(engine, self._hang_up)

    def prepare(self, pool: FFNPool) -> None:
        """Raises LinkBroken where a worker of `pool` is not reached: all is as before."""
        self._drop_prepared()
        self._prepared = _Linked(pool, self._link_up(pool))

    def change_over(self, pool: FFNPool) -> None:
        """Returns when `pool` alone is asked. Raises LinkBroken as `prepare` does, where that was not called before."""
        if self._prepared is None or self._prepared.pool != pool:
            self.prepare(pool)
        assert self._prepared is not None
        self.loop.redirect(self._dispatchers(self._prepared))
        old, self._present, self._prepared = self._present, self._prepared, None
        old.close()

    def _link_up(self, pool: FFNPool) -> Links:
        timeout, config = timedelta(seconds=self._config.exchange_timeout_s), self._config
        return [
            [
                connect(self._store, self._rank, Seat(ffn, pool.number), micro_batch, timeout, config.recover_s)
                for ffn in range(pool.workers)
            ]
            for micro_batch in range(config.micro_batches)
        ]

    def _dispatchers(self, linked: _Linked) -> list[Dispatcher]:
        build, placements = DISPATCHERS[self._config.wire], linked.pool.placements
        inner = [build(mine, micro_batch, self._shared) for micro_batch, mine in enumerate(linked.links)]
        if not placements:
            return inner
        return [PlacedDispatcher(one, placements, self._rank, choose_copies) for one in inner]

    def _drop_prepared(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None

    def _hang_up(self) -> None:
        self._present.close()
        self._drop_prepared()


class _Linked(NamedTuple):
    """A pool, and a link to each of its workers for each micro-batch."""

    pool: FFNPool
    links: Links

    def close(self) -> None:
        for link in (link for mine in self.links for link in mine):
            link.close()


class FFNWorker:
    """FFN worker number `ffn` of a pool: its share of all experts, and whoever asks it.

    A process may be one in two pools at a time, while its service changes from one to the other.
    """

    def __init__(self, checkpoint: Checkpoint, config: ServeConfig, ffn: int, pool: FFNPool, store: dist.Store) -> None:
        device = choose_device().name
        module = held(ExpertPool(checkpoint.config, ffn, pool.workers, pool.placements), checkpoint, device)

        def here(layer: int) -> range:
            placement = pool.placements.get(layer)
            slots = checkpoint.config.moe_of(layer).ffn_experts if placement is None else placement.slots
            return expert_shard(slots, ffn, pool.workers)

        layout = wire_layout(checkpoint, config, device)
        self._server = ExpertServer(Experts(module, here, device), FORMS[config.wire], layout)
        self._listener, self._micro_batches = Listener(store, Seat(ffn, pool.number)), config.micro_batches

    def serve(self, attention_workers: int) -> None:
        """Answer until so many attention workers or more have come and all are gone, or until `close`."""
        self._server.serve(self._listener, attention_workers * self._micro_batches)

    def close(self) -> None:
        self._server.close()


def wire_layout(checkpoint: Checkpoint, config: ServeConfig, device: str) -> Layout:
    return Layout(WIRES[config.wire_format], checkpoint.config.hidden_size, serving_dtype(checkpoint, device))
