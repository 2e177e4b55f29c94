"""Verbs that have a model answer: once, or to whoever asks over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expertmesh.launch.terminal import (
    AddressOption,
    AnyCheckpointArgument,
    ApiKeyOption,
    JsonOption,
    failures,
    show_json,
    wrong_input,
)

AttentionOption = Annotated[int | None, typer.Option(help="attention workers; with neither pool: one process")]
FFNOption = Annotated[int | None, typer.Option(help="FFN workers, each with a share of the experts")]
MicroBatchesOption = Annotated[int, typer.Option(min=1, max=4, help="parts of the work in flight to the FFN pool")]
TraceOption = Annotated[
    Path | None, typer.Option(help="write what each stage did when, as a Chrome trace, to this file at the end")
]
ServeSettingsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as serve.cache_tokens=65536")
]


def generate(
    checkpoint: AnyCheckpointArgument,
    settings: ServeSettingsArgument = None,
    *,
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same text")] = None,
    attention: AttentionOption = None,
    ffn: FFNOption = None,
    micro_batches: MicroBatchesOption = 3,
    trace: TraceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text: in one process, or with attention and experts in separate workers."""
    with wrong_input():
        from expertmesh.launch.pools import check_pools
        from expertmesh.launch.recipe import serve_settings
        from expertmesh.launch.serving import bring_up, check_trace, look_at
        from expertmesh.system.serve.request import Request, Sampling

        config = serve_settings([f"serve.micro_batches={micro_batches}", *(settings or [])])
        served = look_at(checkpoint)
        pools = check_pools(served.model, config, attention, ffn)
        check_trace(trace)
        prompt_token_ids = served.tokenizer.encode(prompt)
        longest = config.room(served.model.context_length)
        holder = "the model's context" if longest == served.model.context_length else "the cache"
        room = longest - len(prompt_token_ids)
        if not prompt_token_ids:
            raise ValueError("--prompt is empty: give at least one character to continue")
        if room < 1:
            raise ValueError(
                f"--prompt has {len(prompt_token_ids)} tokens; {holder} holds {longest}, the answer included"
            )
    import asyncio

    sampling = Sampling(min(max_tokens, room), temperature=temperature, top_p=top_p, seed=seed)
    request = Request("generate", prompt_token_ids, sampling)

    async def answer() -> dict[str, Any]:
        text, token_ids, finish_reason = served.tokenizer.stream(), [], None
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if not as_json:
                typer.echo(piece, nl=False)

        async with bring_up(served, pools, config, address, trace) as service:
            client = service.client
            if not as_json:
                typer.echo(prompt, nl=False)
            async for output in client.generate(request):
                token_ids.append(output.token_id)
                finish_reason = output.finish_reason
                if finish_reason != "stop":
                    show(text.push(output.token_id))
            show(text.finish())
            stages = await client.stages()
        if not as_json:
            typer.echo()
        return {
            "text": "".join(pieces),
            "token_ids": token_ids,
            "prompt_token_ids": prompt_token_ids,
            "finish_reason": finish_reason,
            "pools": pools._asdict() if pools else {"joined": 1},
            "stages": stages,
        }

    with failures():
        result = asyncio.run(answer())
    if as_json:
        show_json(result)


def serve(
    checkpoint: AnyCheckpointArgument,
    settings: ServeSettingsArgument = None,
    attention: AttentionOption = None,
    ffn: FFNOption = None,
    micro_batches: MicroBatchesOption = 3,
    trace: TraceOption = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="name that clients use; none: the checkpoint's folder")] = None,
    api_key: ApiKeyOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer OpenAI-compatible requests over HTTP, until interrupted."""
    with wrong_input():
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ValueError("--api-key: it must be printable ASCII, and not empty")
        from expertmesh.launch.pools import check_pools
        from expertmesh.launch.recipe import serve_settings
        from expertmesh.launch.serving import check_trace, listen, look_at, serve_forever

        config = serve_settings([f"serve.micro_batches={micro_batches}", *(settings or [])])
        served = look_at(checkpoint)
        pools = check_pools(served.model, config, attention, ffn)
        check_trace(trace)
        socket = listen(host, port)
    url = f"http://{host}:{socket.getsockname()[1]}/v1"
    name = model_name or served.name

    def ready() -> None:
        if as_json:
            show_json({"base_url": url, "model": name, "pools": pools._asdict() if pools else {"joined": 1}})
            return
        example = json.dumps({"model": name, "prompt": "The import statement", "max_tokens": 32})
        typer.echo(
            f"serving {name} at {url}\ncurl {url}/completions -H 'Content-Type: application/json' -d '{example}'"
        )

    with failures():
        serve_forever(served, pools, config, name, socket, ready, address, trace, api_key)
