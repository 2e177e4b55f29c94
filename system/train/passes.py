"""The forwards and backwards that make one update, on one rank: micro-batch by micro-batch, run of layers by run.

A micro-batch is so many sequences of the whole batch, cut over the ranks that split the batch; so it does not depend
on the layout. Without a pipeline the order is F0 B0 F1 B1 ..., and this is gradient accumulation. What a batch gives in
several micro-batches is what it gives at once, but for

    balance losses      of the load of a micro-batch, over all its ranks, or of the micro-batches so far; those of each
                        sequence by itself do not differ (`moe.balance_over`)
    rounding            gradients are added up micro-batch by micro-batch

Cross entropy, z-losses and the loads that move selection biases are means and sums over the whole batch; capacity and
lots are a sequence's.

A stage's backward begins from a scalar, as a whole model's does: its own losses, and of what it handed on the inner
product with the gradient that came back. The gradient of that is the chain rule's, bit for bit.

    total = losses of this run's layers / micro-batches + sum(x_TD * gradient of x_TD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from expertmesh.parallel.pipeline import Mail, Parts, Task, forwards_alone, runs_of_layers, schedule
from expertmesh.system.model.context import TrainingStep
from expertmesh.system.model.transformer import Crossing, logits_cross
from expertmesh.system.train.loss import BatchLoss, LanguageModelLoss, LayerLoad
from expertmesh.system.train.recompute import Kept, counting_kept


class MicroBatch(NamedTuple):
    """This rank's sequences of one."""

    tokens_BS1: torch.Tensor
    training: TrainingStep | None = None  # None: no update


class Passes:
    """Passes of a batch through the runs of layers that this rank has; every rank of a pipeline makes its own.

    `answers`: what the losses said of the layers of each forward, without a gradient.
    """

    def __init__(self, loss: LanguageModelLoss, batches: Sequence[MicroBatch]) -> None:
        self.loss, self.batches, groups = loss, batches, loss.groups
        self.groups, self.answers = groups, list[tuple[range, BatchLoss]]()
        self.kept: Kept | None = None
        self.sent_bytes = 0
        self._so_far: dict[int, Sequence[LayerLoad]] = {}  # by stage, what the micro-batches asked of its layers
        self._layers = runs_of_layers(loss.model.config.layers, groups.pipeline_size * groups.interleave)

    def forwards(self) -> None:
        """Without gradients."""
        mail = self._mail(self._forwards)
        for task in self._forwards(self.groups.pipeline_rank):
            self._forward(task, mail)
        mail.close()

    def totals(self, count_kept: bool = False) -> Iterator[torch.Tensor]:
        """What is to be differentiated, one scalar after the other; each before the next is asked for.

        `count_kept`: `kept` becomes the memory that the first forward keeps for its backward.
        """
        mail = self._mail(self._order)
        waiting: dict[Task, tuple[Crossing | None, torch.Tensor, Crossing | None]] = {}
        for task in self._order(self.groups.pipeline_rank):
            if not task.backward:
                counting = count_kept and self.kept is None
                with counting_kept(self.loss.model) if counting else nullcontext(self.kept) as self.kept:
                    waiting[task] = self._forward(task, mail)
                continue
            before, total, onward = waiting.pop(task._replace(backward=False))
            total = total / len(self.batches)
            if onward is not None:
                for part, gradient in zip(_parts(onward), mail.receive(task), strict=True):
                    total = total + (part * gradient).sum()
            yield total
            if before is not None:
                mail.send(task._replace(stage=task.stage - 1), [_gradient(part) for part in _parts(before)])
        mail.close()
        self.sent_bytes = mail.sent_bytes

    def _forward(self, task: Task, mail: Mail) -> tuple[Crossing | None, torch.Tensor, Crossing | None]:
        """What the run read, its losses, and what it hands on."""
        layers, batch = self._layers[task.stage], self.batches[task.micro_batch]
        before = None
        if task.stage > 0:
            before = Crossing(*(part.requires_grad_() for part in mail.receive(task)))
        earlier_L = self._so_far.get(task.stage)
        answer = self.loss(batch.tokens_BS1, batch.training, layers=layers, before=before, earlier_L=earlier_L)
        self._so_far[task.stage] = answer.so_far_L
        if answer.onward is not None:
            mail.send(task._replace(stage=task.stage + 1), _parts(answer.onward))
        of_losses = {name: value.detach() for name, value in answer._asdict().items() if torch.is_tensor(value)}
        self.answers.append((layers, answer._replace(**of_losses, onward=None)))
        return before, answer.total, answer.onward

    def _order(self, rank: int) -> list[Task]:
        return schedule(rank, self.groups.pipeline_size, len(self.batches), self.groups.interleave)

    def _forwards(self, rank: int) -> list[Task]:
        return forwards_alone(rank, self.groups.pipeline_size, len(self.batches), self.groups.interleave)

    def _mail(self, order: Callable[[int], list[Task]]) -> Mail:
        return Mail(self.groups, order, self._blank)

    def _blank(self, task: Task) -> Parts:
        """Shaped like what crosses the border before the stage of a forward, or after that of a backward."""
        config, tokens_BS1 = self.loss.model.config, self.batches[task.micro_batch].tokens_BS1
        layer = self._layers[task.stage].stop if task.backward else self._layers[task.stage].start
        ranks = self.groups.tensor_size * (self.groups.data_size // self.groups.batch_size)
        tokens = tokens_BS1[:, 1:].numel() // ranks
        x_TD = torch.empty(tokens, config.hidden_size, dtype=self.loss.dtype, device=tokens_BS1.device)
        if not logits_cross(config, layer):
            return [x_TD]
        return [x_TD, x_TD.new_empty(tokens, config.moe.num_experts, dtype=torch.float32)]


def _parts(crossing: Crossing) -> Parts:
    return [part for part in crossing if part is not None]


def _gradient(part: torch.Tensor) -> torch.Tensor:
    assert part.grad is not None, "a part that the run did not read"
    return part.grad
