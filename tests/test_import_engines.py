"""A worker imports DeepSpeed and Megatron without torch's compiler, and no library notices."""

from __future__ import annotations

import subprocess
import sys

from commands import environment

PROGRAM = """
import sys, torch
compiling = torch.compile
from expertmesh.parallel.import_engines import import_engines
import_engines()
print("compiler", "torch._inductor.compile_fx" in sys.modules, torch.compile is compiling)
import deepspeed
from megatron.core.fusions.fused_bias_geglu import quick_gelu
print("all there", {"deepspeed", "megatron.core.parallel_state", "torch._dynamo"} <= set(sys.modules))
print("as written", float(quick_gelu(torch.zeros(()))))
module = torch.nn.Linear(2, 1)
adam = torch.optim.AdamW(module.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=True)
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
print("compiler after a step", "torch._inductor.compile_fx" in sys.modules)
"""


def test_the_compiler_is_left_out_and_back_afterwards():
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(run, capture_output=True, text=True, env=environment() | ranks)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("compiler", "all there", "as written"))]
    assert told == ["compiler False True", "all there True", "as written 0.0", "compiler after a step False"]
