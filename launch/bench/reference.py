"""What a layer must answer: a float64 loop over its experts, with the gradients by autograd.

    y = sum over the chosen experts i of p_i E_i(x)        p = softmax of the logits, divided by the sum of the chosen
                                                           ones where the layer renormalises

E_i is a SwiGLU, a copy, 0, or a mix with a constant vector (MoE++, arXiv 2410.07348, section 3.1). Nobody is timed
before its answers were compared with these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from expertmesh.launch.bench.cases import Problem, choose

# Largest error over the scale. Rounding gave all peers up to 6e-7, and 2.4e-2 in bfloat16, and rows in FP8 gave ours
# 5.4e-2; a token sent to the wrong expert, or a weight forgotten, gives 0.1 and more.
ROUNDED = "float32, rows in FP8"
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2, ROUNDED: 1e-1}
NOTHING = 1e-3  # smaller magnitudes count as this: a gradient that should be 0 has no scale of its own

Answers = dict[str, torch.Tensor]  # "y", and the gradient of each input by its name


class Right(NamedTuple):
    """What is expected, in float64."""

    answers: Answers
    scales: dict[str, float]  # that errors are measured by: the largest magnitude; for what is not empty


def expected(problem: Problem, renormalises: bool) -> Right:
    """The answers to the first set of tokens."""
    weights, top_k = problem.weights, problem.case.top_k
    leaves = {"x": problem.inputs_STD[0], "router": weights.router_ND}
    leaves |= {"gate_up": weights.gate_up_EGD, "down": weights.down_EDF}
    leaves |= {"mix": weights.mix_C2D, "constant": weights.constant_CD}
    leaves = {name: tensor.double().requires_grad_() for name, tensor in leaves.items()}
    x_TD, y_TD = leaves["x"], torch.zeros_like(leaves["x"])

    experts_TK = choose(problem.inputs_STD[0], weights.router_ND, top_k)
    weights_TK = (x_TD @ leaves["router"].T).softmax(-1).gather(1, experts_TK)
    if renormalises:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    E, C = len(weights.gate_up_EGD), len(weights.constant_CD)
    matrices = list(zip(leaves["gate_up"].unbind(0), leaves["down"].unbind(0), strict=True))
    for expert in range(E + C + weights.copy_experts):  # those after these answer 0
        tokens, slots = (experts_TK == expert).nonzero(as_tuple=True)
        rows_RD = x_TD[tokens]
        if expert < E:
            gate_up_GD, down_DF = matrices[expert]
            gate_RF, up_RF = (rows_RD @ gate_up_GD.T).chunk(2, dim=-1)
            out_RD = (functional.silu(gate_RF) * up_RF) @ down_DF.T
        elif expert < E + C:
            keep_R, replace_R = (rows_RD @ leaves["mix"][expert - E].T).softmax(-1).unbind(-1)
            out_RD = keep_R[:, None] * rows_RD + replace_R[:, None] * leaves["constant"][expert - E]
        else:
            out_RD = rows_RD
        y_TD = y_TD.index_add(0, tokens, weights_TK[tokens, slots, None] * out_RD)
    gradients = torch.autograd.grad(y_TD, list(leaves.values()), problem.gradients_STD[0].double(), allow_unused=True)
    answers = {"y": y_TD.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        answers[name] = torch.zeros_like(leaf) if gradient is None else gradient
    scales = {name: max(float(answer.abs().max()), NOTHING) for name, answer in answers.items() if answer.numel()}
    # Where an answer is at right angles to its gradient, the router's gradient is 0 up to the rounding of the terms
    # that cancel; their size is this, times p (1 - p) of a softmax.
    terms = (problem.gradients_STD[0].double() * answers["y"]).norm(dim=1).max() * problem.inputs_STD[0].abs().max() / 4
    scales["router"] = max(scales["router"], float(terms))
    return Right(answers, scales)


def disagreement(answers: Answers, right: Right, dtype: str) -> str:
    """What is wrong with `answers`, in words; nothing where they agree."""
    bound = BOUNDS[dtype]
    for name, answer in answers.items():
        want = right.answers[name]
        if answer.shape != want.shape:
            return f"{_called(name)} has shape {list(answer.shape)}, not {list(want.shape)}"
        if not want.numel():
            continue
        error = float((answer.double() - want).abs().max()) / right.scales[name]
        if not error <= bound:  # not a number is wrong too
            return f"{_called(name)} is off by {error:.1e} of its largest value (bound {bound:.0e})"
    return ""


def _called(name: str) -> str:
    return "the output" if name == "y" else f"the gradient of {name}"
