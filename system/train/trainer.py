"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expertmesh.kernels.device import Device
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher, build_weights_lane
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.placed_dispatcher import PlacedDispatcher
from expertmesh.parallel.whereabouts import inside
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint, write_tensors
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.train.build_optimizer import build_optimizer
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.copying import Copying
from expertmesh.system.train.dataset import TokenDataset
from expertmesh.system.train.layer_summary import side_by_side, summarise
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import MicroBatch, Passes
from expertmesh.system.train.rebalancing import Rebalancing
from expertmesh.system.train.recompute import Kept, recompute
from expertmesh.system.train.snapshot import RunState, Saver, load_optimizer, read_state
from expertmesh.system.train.tally import MEANS, tally

Record = dict[str, Any]
"""One line of metrics.jsonl: "start", "step", "validation", "event" (see system/train/read_run.py)."""


class NotFinite(RuntimeError):
    """The loss or the gradient of `step` is NaN or infinite, on every rank; the weights are no longer of use."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, str(self))


class Watch:
    """What a rank does between steps, and whether it should leave. Here: nothing, and never."""

    def before(self, step: int, model: torch.nn.Module) -> None:
        """Called on every rank before each step."""

    def wants_to_leave(self) -> bool:
        """Asked on every rank once a step; one that says yes is enough for all to save and return."""
        return False


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of update `step`, counted from 1: a straight warm-up, then half a cosine down to the minimum at the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


class Trainer:
    """One rank of a training run. `run` makes the remaining steps, saving and validating as the recipe says.

    Every rank sees the same sequence of batches and takes its own rows; it calls `report` with each record, which
    callers use on rank 0 alone.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        run_dir: Path,
        groups: Groups,
        device: Device,
        settings: dict[str, Any],
        resume_from: Path | None,
        begin_with: Checkpoint | None = None,
        dispatch: DispatchConfig | None = None,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        """`begin_with`: where the weights of step 0 come from; None: drawn from the seed.

        `skip`: steps whose batches are left out; each trains on one from beyond the run's last step instead.
        """
        self.config, self.run_dir, self.groups, self.device, self.settings = config, run_dir, groups, device, settings
        self.skip = skip
        self.dataset = TokenDataset(run_dir / "data")
        self.traffic = Traffic()
        dispatch = dispatch or DispatchConfig()
        dispatcher = build_dispatcher(groups, dispatch, self.traffic, device.name)
        # Shards are made part by part of what is nowhere whole.
        with torch.device("meta" if config.zero_stage == 3 else device.name):
            self.model = parallel_transformer(model_config, groups)
            self.rebalancing = Rebalancing(self.model, groups) if config.rebalance_every else None
            if self.rebalancing:
                dispatcher = PlacedDispatcher(dispatcher, self.rebalancing.placements, groups.expert_rank)
            self.loss = LanguageModelLoss(self.model, dispatcher, groups, getattr(torch, config.dtype))
        self.copying: Copying | None = None
        if config.expert_copies and groups.expert is not None:
            lanes = {
                of.expert: build_weights_lane(of.expert, dispatch, self.traffic, device.name)
                for of in (groups, *groups.narrower.values())
                if of.expert is not None
            }
            placements = self.rebalancing.placements if self.rebalancing else None
            self.copying = Copying(self.model, groups, config, dispatch, lanes, placements)
        recompute(self.model, config.recompute)
        self.kept: Kept | None = None  # by a forward, for its backward; measured once
        self.state = RunState(step=0, settings=settings)
        if resume_from is not None:
            self.state, begin_with = read_state(resume_from), open_checkpoint(resume_from)

        def fill(part: torch.nn.Module, prefix: str, but: Collection[torch.nn.Module]) -> None:
            if begin_with is None:
                initialise(part, config.seed, model_config.initializer_range, prefix, but)
            else:
                begin_with.load(part, prefix, but)

        self.zero = build_optimizer(self.loss, config, device.name, fill)
        if resume_from is not None:
            load_optimizer(resume_from, self.state, self.model, self.zero)
        if self.copying:
            self.copying.resume(self.state.copied)

    def close(self) -> None:
        """Train no more: the model goes with its last user."""
        self.zero.close()

    def run(self, report: Callable[[Record], None], watch: Watch | None = None) -> None:
        """Train to the last step, or until `watch` wants to leave; all is saved then. Raises NotFinite, SaveFailed."""
        config = self.config

        def saved(step: int, folder: Path) -> None:
            report({"kind": "event", "what": "saved", "step": step, "checkpoint": str(folder)})

        tokenizer = self.run_dir / "data" / "tokenizer"
        with Saver(self.run_dir, self.groups, tokenizer, config.keep_checkpoints, saved) as saver:
            try:
                self._run(report, watch or Watch(), saver)
            except NotFinite:
                saver.wait()  # all ranks raise it, after the same step
                raise

    def _run(self, report: Callable[[Record], None], watch: Watch, saver: Saver) -> None:
        config, leaving = self.config, False
        while self.state.step < config.steps and not leaving:
            step = self.state.step + 1
            watch.before(step, self.model)
            record = self._train_step(step, watch.wants_to_leave(), saver.busy())
            leaving, busy_ranks = record.pop("leaving"), record.pop("busy_ranks")
            self._check_finite(record)
            report(record)
            saver.agree(busy_ranks)
            last = step == config.steps
            if self.rebalancing and config.rebalance_every and step % config.rebalance_every == 0 and not last:
                decisions = self.rebalancing.rebalance(self.zero, min(config.rebalance_every, config.steps - step))
                moved = sum(decision.moved for decision in decisions)
                why = [str(decision) for decision in decisions]
                report({"kind": "event", "what": "rebalanced", "step": step, "moved": moved, "why": why})
            if self.copying and (changes := self.copying.choose()):
                report({"kind": "event", "what": "copied", "step": step, "why": list(map(str, changes))})
            self.state = RunState(step, self.settings, self.copying.state() if self.copying else {})
            if last or step % config.validate_every == 0:
                report({"kind": "validation", "step": step, "loss": self.validate()})
            if last or leaving or step % config.checkpoint_every == 0:
                saver.save(self.state, self.model, self.zero)
        saver.wait()

    def _check_finite(self, record: Record) -> None:
        """DeepSpeed says -1 of a norm that is not finite. Both figures are of all ranks, so that all raise or none."""
        if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) and record["grad_norm"] >= 0:
            return
        step = record["step"]
        path = self.run_dir / "not-finite" / f"step-{step:06d}.safetensors"
        if self.groups.rank == 0:
            path.parent.mkdir(exist_ok=True)
            write_tensors({"tokens_BS1": self._batch(step)}, path)
        figures = f"loss {record['loss']:g}, gradient norm {record['grad_norm']:g}"
        raise NotFinite(step, f"step {step} is not finite ({figures}); its batch is in {path}")

    def _batch(self, step: int) -> torch.Tensor:
        """tokens_BS1 of all ranks."""
        config = self.config
        number = step - 1 + (config.steps if step in self.skip else 0)
        return self.dataset.batch(number, config.batch_size, config.sequence_length, config.seed)

    def _train_step(self, step: int, wants_to_leave: bool = False, busy_saving: bool = False) -> Record:
        config, began = self.config, time.perf_counter()
        tokens_BS1 = self._batch(step)
        passes = Passes(self.loss, self._micro_batches(tokens_BS1, step))
        rate = learning_rate(step, config)
        with ExitStack() as after:

            def totals() -> Iterator[torch.Tensor]:
                yield from passes.totals(count_kept=self.kept is None)
                after.enter_context(inside("gradients and weights"))  # the last backward is over

            grad_norm = self.zero.step(totals(), rate)
        self.kept = self.kept or passes.kept
        counted = [wants_to_leave, busy_saving, *self.traffic.take(), passes.sent_bytes]
        model = self.model.config
        with inside("sums of the step"):
            told = tally(passes.answers, config.micro_batches, model, self.groups, counted)
        leaving, busy_ranks, sent, saved, far, crossed = told.sums
        self.model.balance(told.loads_N)
        if self.rebalancing:
            self.rebalancing.count(told.loads_N)
        if self.copying:
            self.copying.count(told.loads_N)
        balance_L, z_L, entropy_L = (told.means_L[name] for name in MEANS)
        summaries = [
            summarise(layer, model.moe_of(layer), *figures)
            for layer, *figures in zip(
                model.moe_layers, told.loads_N, told.dropped_L, entropy_L, balance_L, z_L, strict=True
            )
        ]
        moe, load_LN = model.moe, side_by_side(told.loads_N, model.moe)
        slots = int(load_LN.sum())
        ffn_share = float(load_LN[:, : moe.ffn_experts].sum()) / slots if slots else 0.0
        seconds = time.perf_counter() - began
        return {
            "kind": "step",
            "step": step,
            "loss": told.cross_entropy,
            "balance_loss": sum(balance_L),
            "z_loss": sum(z_L),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens_per_second": config.batch_size * config.sequence_length / seconds,
            "load_LN": load_LN.tolist(),
            "layers": [summary._asdict() for summary in summaries],
            "ffn_experts_per_token": moe.top_k * ffn_share,
            "zero_computation_share": 1 - ffn_share,
            "dispatch_bytes": int(sent),
            "dispatch_bytes_saved": int(saved),
            "activation_bytes": self.kept.bytes if self.kept else 0,
            "dispatch_bytes_between_nodes": int(far),
            "pipeline_bytes": int(crossed),
            "seconds": seconds,
            "leaving": leaving > 0,
            "busy_ranks": busy_ranks,
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Cross entropy of the held-out batches, in nats per token."""
        total = tokens = 0.0
        for tokens_BS1 in self._validation_batches():
            mine_BS1 = self._my_rows(tokens_BS1)
            passes = Passes(self.loss, [MicroBatch(mine_BS1)])
            passes.forwards()
            targets = mine_BS1[:, 1:].numel()
            total += sum(answer.cross_entropy.item() for _, answer in passes.answers) * targets
            tokens += targets
        self.traffic.take()  # of no interest here, and not the next step's
        total, tokens = self._sum_over_ranks(total, tokens / self.groups.pipeline_size)
        assert tokens, "no held-out tokens"
        return total / tokens

    def _validation_batches(self) -> Iterator[torch.Tensor]:
        config = self.config
        return self.dataset.validation_batches(config.batch_size, config.sequence_length, config.validation_batches)

    def _my_rows(self, tokens_BS1: torch.Tensor) -> torch.Tensor:
        """This rank's sequences, in order; a short validation batch may leave some ranks with none."""
        mine_BS1 = tokens_BS1.tensor_split(self.groups.batch_size)[self.groups.batch_rank]
        return mine_BS1.to(self.device.name)

    def _micro_batches(self, tokens_BS1: torch.Tensor, step: int) -> list[MicroBatch]:
        """This rank's sequences of each, and their numbers in the whole batch."""
        config, ranks, found = self.config, self.groups.batch_size, []
        at_once = config.batch_size // config.micro_batches
        for first in range(0, config.batch_size, at_once):
            mine = range(first, first + at_once)[self.groups.batch_rank * at_once // ranks :][: at_once // ranks]
            training = TrainingStep(step, config.steps, config.seed, mine, config.sequence_length)
            found.append(MicroBatch(self._my_rows(tokens_BS1[first : first + at_once]), training))
        return found

    def _sum_over_ranks(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self.device.name)
        for group in (self.groups.token, self.groups.pipeline):
            if group is not None:
                with inside("sums of a validation"):
                    dist.all_reduce(sums, group=group)
        return sums.tolist()
