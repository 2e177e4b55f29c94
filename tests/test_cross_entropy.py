"""Cross entropy over a vocabulary that is split over ranks: Megatron's, with the loss and gradient of the whole one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from numerics import assert_close
from ranks import run_ranks

from expertmesh.parallel.cross_entropy import total_cross_entropy
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes

CASES = [(5, 12, 1.0, "some tokens"), (1, 4, 50.0, "one token, logits far apart"), (0, 6, 1.0, "no tokens")]


def check_cases() -> None:
    groups = build_groups(ParallelSizes(tp=2))
    for tokens, vocabulary, spread, reason in CASES:
        generator = torch.Generator().manual_seed(1)
        logits_TV = (torch.randn(tokens, vocabulary, generator=generator) * spread).requires_grad_()
        targets_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
        wanted = F.cross_entropy(logits_TV, targets_T, reduction="sum")
        wanted.backward()
        mine_TV = logits_TV.detach().chunk(2, dim=1)[groups.tensor_rank].clone().requires_grad_()
        total = total_cross_entropy(mine_TV * 1, targets_T, groups.tensor)  # it overwrites what it is given
        total.backward()
        assert_close(total, wanted, what=reason)
        assert_close(mine_TV.grad, logits_TV.grad.chunk(2, dim=1)[groups.tensor_rank], what=f"gradient: {reason}")


def test_split_over_two_ranks():
    run_ranks(check_cases, 2)


def test_alone():
    logits_TV, targets_T = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])
    assert_close(total_cross_entropy(logits_TV, targets_T), torch.tensor(2.0).log() * 2)
