"""`lorakit serve`: an OpenAI-compatible server for many adapters of one base."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config import Quantization
from ..errors import ConfigError, StoppedError
from .shared.loading import named
from .shared.names import check_names
from .shared.options import ChatTemplate, Precision
from .shared.quantizing import ComputeDtype, Double, Quantize
from .shared.starting import starting

if TYPE_CHECKING:
    from ..serve.card import Card
    from ..serve.guard.guarded import GuardSettings
    from ..serve.guard.limits import Limits
    from ..serve.service import Service

EXAMPLE = 'curl {url}/v1/{path} -H "Content-Type: application/json" -d {body}'


def serve(
    base: Annotated[str, typer.Argument(help="the base: 'embedded', a model folder, or a hub id")] = "embedded",
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, or PATH, named as its folder; repeatable")
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(help="a folder; every adapter below it has a name, and HTTP may load from it; repeatable"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; beyond this machine it needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="what the base is called; default: the folder's name or hub id")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="keys for using the models, one a line; or LORAKIT_API_KEY")
    ] = None,
    manage_key_file: Annotated[
        Path | None, typer.Option(help="keys for loading, unloading and /metrics; or LORAKIT_MANAGE_KEY")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="a name under which requests may ask for this server; repeatable")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="an origin whose pages may call this server; repeatable")
    ] = None,
    hub: Annotated[
        list[str] | None, typer.Option(help="OWNER or OWNER/NAME: hub ids that HTTP may load; repeatable")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option(help="read .bin and .pt files of --adapter")] = False,
    rows: Annotated[int, typer.Option(min=1, help="answers computed at once")] = 32,
    context: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompt and answer; default: the model's")
    ] = None,
    device_adapters: Annotated[int, typer.Option(min=1, help="adapters attached to the model at once")] = 32,
    adapter_memory: Annotated[str, typer.Option(help="memory for adapters that are not attached")] = "2GiB",
    prefix_memory: Annotated[str, typer.Option(help="memory for keys and values of prompts' starts")] = "256MiB",
    waiting: Annotated[int, typer.Option(min=0, help="requests that may wait; more are answered with 429")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a request, waiting included")] = 600.0,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="tokens of a prompt; default: the context's")] = None,
    max_answer: Annotated[int | None, typer.Option(min=1, help="tokens of an answer; default: the context's")] = None,
    drain: Annotated[float, typer.Option(min=0, help="seconds for running answers when the server is stopped")] = 20.0,
    state: Annotated[
        Path | None, typer.Option(help="a file that remembers what was loaded over HTTP, for the next start")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="a line on stderr for each request")] = True,
    precision: Precision = "auto",
    quantize: Quantize = None,
    double: Double = True,
    compute_dtype: ComputeDtype = "auto",
    chat_template: ChatTemplate = None,
    engine: Annotated[
        Literal["embedded", "vllm"], typer.Option(help="embedded: in this process; vllm: a child process")
    ] = "embedded",
    vllm: Annotated[str | None, typer.Option(help="the vllm command, of an environment of its own")] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="a flag for vllm: --vllm-arg=--gpu-memory-utilization=0.8; repeatable")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="vllm: the largest rank that will be loaded")] = None,
) -> None:
    """Serve a base and its adapters over HTTP, in OpenAI's API. `model` in a request names the adapter.

    `base:adapter` is the same; `a:0.7+b:0.3` mixes two; the base's own name is the base alone.
    """
    from ..serve.embedded.heap import settle
    from ..serve.guard.limits import Limits
    from ..serve.server import is_loopback, listen, run, url_of
    from ..serve.settings import ServeSettings
    from ..serve.start import check_packages, start

    check_packages()
    given = named(adapter or [], name_of_adapter)
    check_names(base, adapters=given.values())
    settings_of_engine: dict[str, Any] = {
        "precision": precision,
        "quantization": Quantization(quantize=quantize, double=double, compute_dtype=compute_dtype),
        "chat_template": _template(chat_template),
        "engine": engine,
        "vllm": _vllm(engine, vllm, max_rank, vllm_arg),
        "vllm_arguments": tuple(vllm_arg or ()),
        "max_rank": max_rank,
        "adapter_memory": _bytes("--adapter-memory", adapter_memory),
        "prefix_memory": _bytes("--prefix-memory", prefix_memory),
    }
    limits = Limits(waiting=waiting, seconds=timeout, prompt_tokens=max_prompt, answer_tokens=max_answer)
    guard = _guard(host, api_key_file, manage_key_file, allow_host or [], cors_origin or [], limits, rows)
    listener = listen(host, port)
    if not is_loopback(listener) and not guard.keys.use:
        listener.close()
        raise ConfigError(
            f"--host {host}: beyond this machine, everybody who reaches the port could use the models\n"
            "  give a key by --api-key-file FILE or LORAKIT_API_KEY"
        )
    settings = ServeSettings(
        base=base,
        name=name or _name_of(base),
        adapters=given,
        roots=tuple(adapters or ()),
        hub=tuple(hub or ()),
        allow_pickle=allow_pickle,
        rows=rows,
        context=context,
        device_adapters=device_adapters,
        state=state,
        access_log=access_log,
        guard=guard,
        **settings_of_engine,
    )
    service: list[Service] = []
    with ExitStack() as until_ready:
        until_ready.enter_context(starting(f"loading {base}"))

        def ready() -> None:
            until_ready.close()
            settle()
            _say_ready(service[0], next(iter(given), None), url_of(listener), bool(guard.keys.use))

        def stopped(error: StoppedError) -> int:
            until_ready.close()
            interrupted = error.signal == "SIGINT"
            print(f"lorakit: stopped by {'Ctrl-C' if interrupted else error.signal}", file=sys.stderr)
            return 130 if interrupted else 0

        run(listener, lambda: start(settings, service.append), drain=drain, ready=ready, stopped=stopped)


def _say_ready(service: Service, first: str | None, url: str, needs_key: bool) -> None:
    """Print where the server is, and a command that asks it something. first: of the adapters on the command line."""
    import json

    cards = service.registry.cards()
    model = first or (cards[0].name if cards else service.facts.base)
    count = f"{len(cards)} adapter{'' if len(cards) == 1 else 's'}"
    print(f"serving {service.facts.base} and {count} at {url}/v1", flush=True)
    path, asked = example_for(next((card for card in cards if card.name == model), None))
    body = {"model": model, **asked, "max_tokens": 64}
    key = ' -H "Authorization: Bearer $LORAKIT_API_KEY"' if needs_key else ""
    print(f"next: {EXAMPLE.format(url=url, path=path, body=shlex.quote(json.dumps(body)))}{key}", flush=True)


def _guard(
    host: str,
    api_key_file: Path | None,
    manage_key_file: Path | None,
    allow_host: list[str],
    cors_origin: list[str],
    limits: Limits,
    rows: int,
) -> GuardSettings:
    from ..serve.guard.guarded import GuardSettings
    from ..serve.guard.hosts import host_names
    from ..serve.guard.keys import MANAGE_VARIABLE, USE_VARIABLE, Keys, read_keys
    from ..serve.guard.origins import origin_names

    keys = Keys(
        read_keys(api_key_file, USE_VARIABLE, "--api-key-file"),
        read_keys(manage_key_file, MANAGE_VARIABLE, "--manage-key-file"),
    )
    for flag, values in (("--allow-host", allow_host), ("--cors-origin", cors_origin)):
        if "*" in values and not keys.use:
            raise ConfigError(
                f"{flag} *: any web page could then use the models\n"
                "  name those that may, or give a key by --api-key-file or LORAKIT_API_KEY"
            )
    return GuardSettings(
        host_names(host, allow_host), origin_names(cors_origin), keys, limits, open=2 * (limits.waiting + rows) + 64
    )


def _template(path: str | None) -> str | None:
    from ..data.templates import read_template

    return None if path is None else read_template(path)


def _vllm(engine: str, command: str | None, max_rank: int | None, arguments: list[str] | None) -> str | None:
    if engine == "vllm" and command is None:
        raise ConfigError(
            "--engine vllm: which vllm is not known, as its packages do not fit into lorakit's environment\n"
            "  give its command: --vllm /path/to/venv/bin/vllm"
        )
    for flag, value in (("--vllm", command), ("--max-rank", max_rank), ("--vllm-arg", arguments)):
        if engine != "vllm" and value is not None:
            raise ConfigError(f"{flag} is for --engine vllm, and the engine is {engine}\n  add --engine vllm")
    return command


def _bytes(flag: str, text: str) -> int:
    from ..plan.units import parse_bytes

    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _name_of(base: str) -> str:
    """Name the base in /v1/models: a folder by its last part, so that no path of this machine is shown."""
    path = Path(base).expanduser()
    return path.resolve().name if path.is_dir() else base


def name_of_adapter(path: str) -> str:
    """Name an adapter that was given without a name: by its folder or file, a run's `adapter/` by the run.

    A hub id keeps its owner. A name that cannot be one is refused where names are checked.
    """
    from ..serve.names import is_name

    here = Path(path).expanduser()
    if not here.exists():
        hub_id = path.removeprefix("hf://").partition("@")[0]
        return hub_id if hub_id.count("/") == 1 and is_name(hub_id) else here.name
    here = here.resolve()
    if here.is_dir():
        return here.parent.name if here.name == "adapter" and here.parent.name else here.name
    return here.stem


def example_for(card: Card | None) -> tuple[str, dict[str, Any]]:
    """Return the path and the question that suit an adapter: a text to go on from if it was trained so, else a chat."""
    if card is not None and card.chat.style == "none":
        return "completions", {"prompt": "your prompt"}
    return "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
