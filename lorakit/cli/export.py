"""`lorakit export`: write an adapter for the program that will load it, checked and verified."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, listing
from .shared.files import base_folder, output_path, read
from .shared.names import check_names
from .shared.options import Force, ModelType
from .shared.output import say
from .shared.starting import starting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

_DTYPES = Annotated[
    Literal["f16", "bf16", "q8_0", "f32"] | None,
    typer.Option(help="with --merged: precision of the matrices; default: f16"),
]


def export(
    source: Annotated[str, typer.Argument(help="the adapter: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="the output: a folder or file")],
    receiver: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "ollama", "comfyui", "a1111", "diffusers", "peft", "mlx", "canonical"],
        typer.Option("--for", help="the program that will load it; canonical: any"),
    ],
    fix: Annotated[bool, typer.Option("--fix", help="fix what can be fixed without changing the effect")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="read the result back with independent code and compare; with --base, logits too"
        ),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="the base's folder: config.json for llama.cpp's format, weights for --verify")
    ] = None,
    model: Annotated[str | None, typer.Option(help="for Ollama: the model that the Modelfile starts FROM")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="for llama.cpp and Ollama: merge base and adapter into one GGUF model")
    ] = False,
    dtype: _DTYPES = None,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="accept a --base that the adapter was not trained on")
    ] = False,
    model_type: ModelType = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not store it (loralib, old MLX)")] = None,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Check an adapter against what a program accepts, write it for that program, and verify its effect (--verify)."""
    if merged and model is not None:
        raise ConfigError(
            "--model and --merged exclude each other: the Modelfile starts FROM the merged model\n  omit --model"
        )
    if dtype is not None and not merged:
        raise ConfigError(
            "--dtype requires --merged, which writes a model\n"
            "  to write the adapter in another precision: lorakit convert --to gguf --dtype"
        )
    check_names(adapters=[source])
    with starting(f"reading {source}"):
        from ..data.chat_record import TEMPLATE_FILE
        from ..export import RECEIVERS
        from ..export import export as exported
        from ..formats import find

        folder = base_folder(base)
        if not merged:
            if receiver == "ollama" and out.suffix != ".gguf":
                out = out / "adapter.gguf"
            out = output_path(out, RECEIVERS[receiver].format, force)
        adapter = read(source, alpha, folder, force_base, model_type)
        if not merged:
            result = exported(
                adapter,
                out,
                receiver,
                fix=fix,
                verify=verify,
                base=folder,
                model=model,
                force=force,
                source=find(source),
            )
    if merged:
        options = {"dtype": dtype or "f16", "verify": verify, "force_base": force_base, "force": force}
        _merged(adapter, folder, out, receiver, json_output, **options)
        return
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    for line in result.mended:
        say(f"fixed: {line}")
    say(f"written for {receiver}: " + ", ".join(str(f) for f in result.files))
    if result.placed is not None:
        say(f"{receiver} finds every key of it: {result.placed}")
    for note in result.notes:
        say(f"note: {note}")
    for what, value in (result.differences or {}).items():
        say(f"read back: {what} off by at most {value:.2g} of the largest element")
    if result.logits is not None:
        through = base if result.base is None else f"{result.base} with {out}, against {base} with the adapter"
        say(f"logits through {through}: {result.logits}")
    if result.no_logits is not None:
        say(f"logits not compared: {result.no_logits}")
    if result.unchecked is not None:
        say(f"not checked: {result.unchecked}")
    served = result.base or folder  # a path: other programs do not know 'embedded'
    template = next((f for f in result.files if f.name == TEMPLATE_FILE), None)
    print(f"next: {_next(receiver, result.files[0], str(served) if served else None, template)}")


def _merged(adapter: Adapter, base: Path | None, out: Path, receiver: str, json_output: bool, **options: Any) -> None:
    from rich.console import Console

    from ..export.merged import export_merged, model_path

    out = output_path(model_path(out, receiver), "gguf", options["force"])
    with Console(stderr=True).status("merging") as status:
        options["on_tensor"] = lambda name, number, total: status.update(f"{number}/{total} {name}")
        result = export_merged(adapter, base, out, receiver, **options)
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    say(f"written for {receiver}: " + ", ".join(str(f) for f in result.files))
    say(f"merged model in {result.dtype}: {result.tensors} tensors, {result.bytes / 1e6:,.1f} MB")
    if result.other:
        say(f"in f16, because their row length is not a multiple of 32: {listing(result.other, 3)}")
    for warning in result.warnings:
        say(f"note: {warning}")
    if result.verified is not None:
        say(f"read back: {result.verified}")
    where = quote(str(result.files[0]))
    print(f"next: {_next(receiver, result.files[0], None) if receiver == 'ollama' else f'llama-server -m {where}'}")


def _next(receiver: str, path: Path, base: str | None, template: Path | None = None) -> str:
    where, of = quote(str(path)), quote(base or "BASE")
    written = "" if template is None else f" --chat-template {quote(str(template))}"  # servers read the base's own
    return {
        "vllm": f"vllm serve {of} --enable-lora --lora-modules mine={where}{written}",
        "sglang": f"python -m sglang.launch_server --model-path {of} --lora-paths mine={where}{written}",
        "llama.cpp": f"llama-server -m base.gguf --lora {where}",
        "ollama": f"ollama create mine -f {quote(str(path.parent / 'Modelfile'))}",
        "comfyui": f"cp {where} ComfyUI/models/loras/",
        "a1111": f"cp {where} stable-diffusion-webui/models/Lora/",
        "diffusers": f"pipe.load_lora_weights({str(path)!r})",
        "mlx": f"mlx_lm.generate --model {of} --adapter-path {where}",
    }.get(receiver, f"lorakit inspect {where}")
