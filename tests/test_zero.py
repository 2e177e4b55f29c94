"""ZeRO over two expert-parallel ranks makes the updates of plain AdamW on one: weights, moments, norm and clipping."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_close
from ranks import new_world, run_ranks
from tiny import tiny_model
from torch import nn

from expertmesh.parallel import zero
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllToAllDispatcher, LocalDispatcher
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.optimizer import AdamState, TrainingOptimizer
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.zero import Alike, build_zero
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.train.loss import LanguageModelLoss

CONFIG = tiny_model(vocab_size=16, hidden_size=16, layers=2)
RATES = [3e-3, 1e-3, 5e-3, 2e-3]
CLIPPING, DECAY, BETAS = 0.25, 0.1, (0.9, 0.95)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 16, (8, 13), generator=torch.Generator().manual_seed(step))


def loss_of(config: ModelConfig, groups: Groups) -> LanguageModelLoss:
    model = Transformer(config, shards(config, groups.expert_rank, groups.expert_size))
    initialise(model, seed=1, standard_deviation=0.1)
    dispatcher = AllToAllDispatcher(groups.expert, Traffic()) if groups.expert else LocalDispatcher()
    return LanguageModelLoss(model, dispatcher, groups)


def by_name(model: Transformer, tensor_of) -> dict[str, torch.Tensor]:
    return {name: view for w in weights(model) for name, view in w.split(tensor_of(w.parameter)).items()}


class Reference:
    """One process, all experts, torch's own AdamW and clipping."""

    def __init__(self) -> None:
        self.loss = loss_of(CONFIG, Groups())
        matrices = [p for p in self.loss.parameters() if p.ndim > 1]
        vectors = [p for p in self.loss.parameters() if p.ndim == 1]
        assert matrices and vectors
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=BETAS
        )

    def step(self, step: int) -> float:
        for group in self.adam.param_groups:
            group["lr"] = RATES[step]
        self.adam.zero_grad()
        self.loss(batch(step)).total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), CLIPPING)
        self.adam.step()
        return norm.item()

    def state(self, key: str) -> dict[str, torch.Tensor]:
        return by_name(self.loss.model, lambda p: self.adam.state[p][key])


def zero_of(loss: LanguageModelLoss, stage: int) -> TrainingOptimizer:
    experts = [w.parameter for w in weights(loss.model) if w.is_expert]
    replicated = [w.parameter for w in weights(loss.model) if not w.is_expert]
    alike = [Alike("experts", experts, loss.groups.expert_data), Alike("replicated", replicated, loss.groups.token)]
    decayed = [w.parameter for w in weights(loss.model) if w.is_matrix]
    settings = {"gradient_clipping": CLIPPING, "weight_decay": DECAY, "betas": BETAS}
    return build_zero(loss, alike, decayed, stage=stage, **settings)


def make_step(loss: LanguageModelLoss, optimizer: TrainingOptimizer, step: int) -> float:
    mine = batch(step).tensor_split(loss.groups.data_size)[loss.groups.data_rank]
    return optimizer.step(iter([loss(mine).total]), RATES[step])


def compare(loss: LanguageModelLoss, optimizer: TrainingOptimizer, reference: Reference, when: str) -> None:
    states = {w.parameter: optimizer.state(w.parameter) for w in weights(loss.model)}
    expected = by_name(reference.loss.model, lambda p: p.detach())
    for name, tensor in by_name(loss.model, lambda p: p.detach()).items():
        # Adam divides by the gradient's own size, so the noise of a small gradient shows in full.
        assert_close(tensor, expected[name], max_error=1e-4, rms_error=1e-5, what=f"{when}: {name}")
    for key in AdamState._fields:
        expected = reference.state(key)
        for name, tensor in by_name(loss.model, lambda p, key=key: getattr(states[p], key)).items():
            assert_close(tensor, expected[name], max_error=1e-4, rms_error=2e-5, what=f"{when}: {key} of {name}")


def check_stages(pairs: list[tuple[int, int, int]], bucket: int) -> None:
    zero.BUCKET = bucket
    for ep, first, second in pairs:
        check_updates(build_groups(ParallelSizes(dp=2, ep=ep)), first, second)
        new_world()


def check_updates(groups: Groups, first: int, second: int) -> None:
    reference, loss = Reference(), loss_of(CONFIG, groups)
    predecessor = zero_of(loss, first)
    for step in range(3):
        norm = reference.step(step)
        assert norm > 2 * CLIPPING, "clipping is not active"
        assert make_step(loss, predecessor, step) == pytest.approx(norm, rel=1e-5)
        compare(loss, predecessor, reference, f"step {step}")

    # Another layout of the same state goes on: full tensors out of one object and into the next.
    taken_over = loss_of(CONFIG, groups)
    taken_over.load_state_dict(copy.deepcopy(loss.state_dict()))
    successor = zero_of(taken_over, second)
    new_of = dict(zip(loss.model.parameters(), taken_over.model.parameters(), strict=True))
    states = {new: predecessor.state(old) for old, new in new_of.items()}
    successor.load_state(states.items(), steps=3)
    for new, state in states.items():
        for got, want in zip(successor.state(new), state, strict=True):
            assert torch.equal(got, want)
    norm = reference.step(3)
    assert make_step(taken_over, successor, 3) == pytest.approx(norm, rel=1e-5)
    compare(taken_over, successor, reference, "after taking over")
    make_step(loss, predecessor, 3)
    for old, new in new_of.items():
        assert_close(new, old, what="the one who went on, and the successor")

    # Of experts that a model has none of, the parameters are there, and empty.
    for kind in ("ffn_experts", "constant_experts"):
        without = loss_of(tiny_model(vocab_size=16, hidden_size=16, layers=1, moe={kind: 0}), groups)
        smaller = zero_of(without, first)
        assert make_step(without, smaller, 0) > 0
        moments = {p: smaller.state(p) for p in without.parameters() if p.numel()}
        assert all(part.shape == p.shape for p, state in moments.items() for part in state)
        smaller.load_state(moments.items(), steps=1)


@pytest.mark.parametrize("bucket, reason", [(zero.BUCKET, "reduced at once"), (700, "in many buckets")], ids=str)
def test_two_ranks_make_the_updates_of_one_process(bucket, reason):
    """With one stage, then with another that takes over."""
    run_ranks(check_stages, 2, [(2, 1, 2), (2, 0, 2), (2, 2, 0), (1, 0, 1)], bucket)


def test_no_more_is_reduced_at_once_than_there_is():
    """DeepSpeed takes memory for a whole bucket."""
    parameters = [nn.Parameter(torch.empty(count, device="meta")) for count in (3, 2**24)]
    assert zero.bucket_of(parameters) == 3 + 2**24
    assert zero.bucket_of([*parameters, *parameters, *parameters]) == zero.BUCKET
