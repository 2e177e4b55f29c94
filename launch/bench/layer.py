"""A layer under test, whoever wrote it, and ours.

What can be asked of one is the same for all: an answer, the parameters by name so that gradients can be compared, and
to forget them. All layers of a case share the storage of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from expertmesh.launch.bench.cases import Problem, Weights
from expertmesh.launch.bench.reference import Answers
from expertmesh.parallel.dispatchers import Dispatcher, LocalDispatcher
from expertmesh.parallel.placement import expert_shard
from expertmesh.system.model.attend import CausalAttend
from expertmesh.system.model.context import Context
from expertmesh.system.model.experts_config import SwiGLUConfig
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig


class Layer(NamedTuple):
    """A built layer."""

    module: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]  # [T, D] to [T, D]
    parameters: dict[str, list[nn.Parameter]]  # "router", "gate_up", "down": one, or one for each expert

    def infer(self, x_TD: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.forward(x_TD)

    def learn(self, x_TD: torch.Tensor, gradient_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The answer and the gradient of x; those of the parameters are left in them."""
        x_TD = x_TD.detach().requires_grad_()
        y_TD = self.forward(x_TD)
        y_TD.backward(gradient_TD)
        return y_TD.detach(), x_TD.grad

    def forget(self) -> None:
        """Drop the gradients: a step of training starts without."""
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def answers(self, problem: Problem) -> Answers:
        """What it says of the first set of tokens, to be compared with `reference.expected`."""
        x_TD, gradient_TD = problem.inputs_STD[0], problem.gradients_STD[0]
        self.module.train()
        y_TD, gradient_of_x = self.learn(x_TD, gradient_TD)
        answers = {"y": y_TD, "x": torch.zeros_like(x_TD) if gradient_of_x is None else gradient_of_x}
        for name, parameters in self.parameters.items():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            answers[name] = torch.stack(gradients) if len(gradients) > 1 else gradients[0]
        self.forget()
        return answers

    def inferred(self, problem: Problem) -> Answers:
        self.module.eval()
        return {"y": self.infer(problem.inputs_STD[0])}


def ours(
    problem: Problem,
    renormalises: bool = True,
    rank: int = 0,
    ranks: int = 1,
    dispatcher: Dispatcher | None = None,
) -> Layer:
    """Our layer as one rank of a model runs it: `rank` of `ranks` that share the experts; `dispatcher` leads there."""
    case, weights = problem.case, shard_of(problem.weights, rank, ranks)
    config = MoEConfig(
        ffn_experts=case.experts,
        expert=SwiGLUConfig(hidden_size=case.ffn_size),
        zero_experts=problem.weights.zero_experts,
        copy_experts=weights.copy_experts,
        constant_experts=len(weights.constant_CD),
        top_k=case.top_k,
        gate_mode="mixtral" if renormalises else "paper",
        gating_residual=False,  # it joins two layers, and here is one
    )
    module = MoE(config, case.hidden_size, 0, expert_shard(case.experts, rank, ranks), follows_moe=False)
    parameters = {name: [nn.Parameter(tensor)] for name, tensor in zip(NAMES, weights[:5], strict=True)}
    module.gate.weight = parameters["router"][0]
    module.experts.gate_up, module.experts.down = parameters["gate_up"][0], parameters["down"][0]
    module.zero_computation.mix = parameters["mix"][0]
    module.zero_computation.constant = parameters["constant"][0]
    context = Context(torch.arange(case.tokens), CausalAttend(case.tokens), dispatcher or LocalDispatcher())
    return Layer(module, lambda x_TD: module(x_TD, None, context)[0], parameters)


NAMES = ("router", "gate_up", "down", "mix", "constant")


def shard_of(weights: Weights, rank: int, ranks: int) -> Weights:
    """With the FFN experts alone that rank `rank` of `ranks` holds: a contiguous part, as everybody here cuts them."""
    shard = expert_shard(len(weights.gate_up_EGD), rank, ranks)
    held = slice(shard.start, shard.stop)
    return weights._replace(gate_up_EGD=weights.gate_up_EGD[held], down_EDF=weights.down_EDF[held])
