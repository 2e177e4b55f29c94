"""Verbs that compile, measure and compare, and say what this machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertmesh.launch.terminal import JsonOption, failures, show_json, wrong_input

if TYPE_CHECKING:
    from rich.table import Table


def compile_kernels(
    context: typer.Context,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; any number of them")] = None,
    only: Annotated[str, typer.Option(help='kernels whose "name, tile" this pattern is found in')] = "",
    as_json: JsonOption = False,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, and say what came out."""
    if context.invoked_subcommand:
        return
    with failures():
        with wrong_input():
            from expertmesh.kernels.ahead_of_time import judge_all

            judgements = [judgement for name in target or ["sm_90"] for judgement in judge_all(name, only)]
    if as_json:
        typer.echo(json.dumps([judgement._asdict() for judgement in judgements]))
        return
    for judgement in judgements:
        typer.echo(judgement.line())


def tune_kernels(
    out: Annotated[Path, typer.Option(help="the table to write; sizes that it has already are measured again")],
    tokens: Annotated[str, typer.Option(help="batch sizes, such as 1024,16384")] = "16384",
    experts: Annotated[int, typer.Option(min=1, help="FFN experts on this GPU")] = 64,
    top_k: Annotated[int, typer.Option(min=1)] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="width of the model")] = 2048,
    ffn: Annotated[int, typer.Option(min=1, help="width of an expert")] = 1024,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Measure tiles on the GPU here, for the sizes of a layer; EXPERTMESH_TILES=OUT then has them replace the rules."""
    with wrong_input():
        from expertmesh.launch.tuning import check_sizes

        plan = check_sizes(out, tokens, experts, top_k, hidden, ffn, dtype)
    with failures():
        from expertmesh.launch.tuning import tune_all

        rows = tune_all(plan, _say)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        typer.echo(f"table  {out}\nuse it with EXPERTMESH_TILES={out}")


def bench_parallel(
    ranks: Annotated[int, typer.Option(help="processes that share the experts")] = 2,
    tokens: Annotated[int, typer.Option(help="of each rank")] = 2048,
    experts: Annotated[int, typer.Option(help="of all ranks together")] = 16,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    hidden_size: Annotated[int, typer.Option(help="width of the model")] = 512,
    ffn_size: Annotated[int, typer.Option(help="width of an expert")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(help="steps of each layer; the median counts")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Our expert-parallel layer beside DeepSpeed's and Megatron-Core's: times and bytes; and memory by ZeRO stage."""
    with wrong_input():
        from expertmesh.launch.bench import parallel

        case = parallel.ParallelCase(ranks, tokens, experts, top_k, hidden_size, ffn_size, dtype, rounds)
    from expertmesh.launch.bench.table import parallel_table

    with failures():
        _show_tables(parallel.bench_parallel(case, _say), parallel_table, as_json)


def bench_serve(
    concurrent: Annotated[str, typer.Option(help="requests at once, such as 1,16")] = "1,4,16,32",
    prompt_tokens: Annotated[int, typer.Option(help="of each request")] = 64,
    new_tokens: Annotated[int, typer.Option(help="of each request")] = 32,
    layers: Annotated[int, typer.Option(help="blocks of the model")] = 4,
    hidden_size: Annotated[int, typer.Option(help="width of the model")] = 512,
    ffn_size: Annotated[int, typer.Option(help="width of an expert")] = 512,
    experts: Annotated[int, typer.Option(help="of a layer")] = 16,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    dtype: Annotated[str, typer.Option(help="of the checkpoint: float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(help="answers of each contender; the median counts")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Our engine, joined and split, beside transformers' generate and continuous batching: new tokens a second."""
    with wrong_input():
        from expertmesh.launch.bench import serve
        from expertmesh.launch.bench.cases import whole_numbers

        at_once = whole_numbers("concurrent", concurrent)
        sizes = (prompt_tokens, new_tokens, layers, hidden_size, ffn_size, experts, top_k)
        case = serve.ServeCase(at_once, *sizes, dtype, rounds)
    from expertmesh.launch.bench.table import serve_table

    with failures():
        _show_tables(serve.bench_serve(case, _say), serve_table, as_json)


def bench_cluster(
    rounds: Annotated[int, typer.Option(help="of what is compared; the median counts")] = 5,
    steps: Annotated[int, typer.Option(help="with saves, and as many without")] = 30,
    layers: Annotated[int, typer.Option(help="blocks of the model")] = 2,
    hidden_size: Annotated[int, typer.Option(help="width of the model")] = 64,
    ffn_size: Annotated[int, typer.Option(help="width of an expert")] = 128,
    experts: Annotated[int, typer.Option(help="of a layer")] = 8,
    as_json: JsonOption = False,
) -> None:
    """What a killed worker costs, checkpoints beside torch's, the way to the first step, and a slow link."""
    with wrong_input():
        from expertmesh.launch.bench import cluster

        case = cluster.ClusterCase(rounds, steps, layers, hidden_size, ffn_size, experts)
    from expertmesh.launch.bench.table import cluster_table

    with failures():
        _show_tables(cluster.bench_cluster(case, _say), cluster_table, as_json)


def bench_moe(
    quick: Annotated[bool, typer.Option("--quick", help="one layer at a decode and a prefill size")] = False,
    tokens: Annotated[str | None, typer.Option(help="batch sizes, such as 1,32,2048")] = None,
    experts: Annotated[str | None, typer.Option(help="such as 8,16,64")] = None,
    top_k: Annotated[str | None, typer.Option(help="such as 1,2,8")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, or both")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="width of the model; none: 512")] = None,
    ffn_size: Annotated[int | None, typer.Option(help="width of an expert; none: 1024")] = None,
    keep_memory: Annotated[bool, typer.Option("--keep-memory", help="freed memory is kept, for all alike")] = False,
    as_json: JsonOption = False,
) -> None:
    """Our MoE layer beside transformers, DeepSpeed, Megatron-Core and plain torch, as ratios. All sizes take hours."""
    with wrong_input():
        from expertmesh.kernels.kept_memory import keep_freed_memory
        from expertmesh.launch.bench.cases import change_grid

        grid = change_grid(quick, tokens, experts, top_k, dtype, hidden_size, ffn_size)
        if keep_memory and not keep_freed_memory():
            raise ValueError("--keep-memory: the C library of this machine has no such setting")
    from expertmesh.launch.bench import moe
    from expertmesh.launch.bench.table import table

    with failures():
        _show_tables(moe.bench_moe(grid, _say), table, as_json)


def _show_tables(
    tables: Iterable[list[dict[str, Any]]], as_table: Callable[[list[dict[str, Any]]], Table], as_json: bool
) -> None:
    """Each table as it is measured; with --json on standard error, and all rows as one document at the end."""
    from rich.console import Console

    console, rows = Console(stderr=as_json), []
    for of_table in tables:
        rows += of_table
        console.print(as_table(of_table))
    if as_json:
        typer.echo(json.dumps(rows))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can and cannot do, and what to install."""
    from expertmesh.launch.doctor import examine

    findings = examine()
    if as_json:
        show_json({"findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            verdict = "ok" if finding.ok else "MISSING" if finding.needed else "note"
            typer.echo(f"{verdict:8}{finding.what}: {finding.detail}")
    if not all(finding.ok or not finding.needed for finding in findings):
        raise typer.Exit(1)
