"""`lorakit export`: an adapter for the program that will read it, checked and verified."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, listing
from .shared.files import base_folder, free, read
from .shared.options import Force
from .shared.starting import starting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

_DTYPES = Annotated[Literal["f16", "bf16", "q8_0", "f32"] | None, typer.Option(help="with --merged: of the matrices; default f16")]


def export(
    source: Annotated[str, typer.Argument(help="the adapter: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="what to write")],
    receiver: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "ollama", "comfyui", "a1111", "diffusers", "peft", "mlx", "canonical"],
        typer.Option("--for", help="the program that will read it; canonical: any"),
    ],
    fix: Annotated[bool, typer.Option("--fix", help="mend what can be mended without changing the effect")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read the result again, independently, and compare; with --base the logits too")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="the base's folder: its config.json for llama.cpp's format, its weights for --verify")
    ] = None,
    model: Annotated[str | None, typer.Option(help="for Ollama: what the Modelfile starts FROM")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="for llama.cpp and Ollama: the whole model, base and adapter as one GGUF")
    ] = False,
    dtype: _DTYPES = None,
    force_base: Annotated[bool, typer.Option("--force-base", help="with --base: although the adapter was trained on another one")] = False,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Check an adapter against the rules of the program that will read it, write it so, and (--verify) prove the same effect."""
    with starting(f"reading {source}"):
        from ..export import RECEIVERS
        from ..export import export as exported
        from ..formats import find

    folder = base_folder(base)
    if merged:
        if model is not None:
            raise ConfigError("--model is what an adapter's Modelfile starts FROM; with --merged it starts from the model that is written")
        options = {"dtype": dtype or "f16", "verify": verify, "force_base": force_base, "force": force}
        _merged(read(source, alpha, folder, force_base), folder, out, receiver, json_output, **options)
        return
    if dtype is not None:
        raise ConfigError(
            "--dtype is for --merged, a whole model\n  lorakit convert --to gguf --dtype writes the adapter in another precision"
        )
    if receiver == "ollama" and out.suffix != ".gguf":
        out = out / "adapter.gguf"
    out = free(out, RECEIVERS[receiver].format, force)
    done = exported(
        read(source, alpha, folder, force_base),
        out,
        receiver,
        fix=fix,
        verify=verify,
        base=folder,
        model=model,
        force=force,
        source=find(source),
    )
    if json_output:
        print(json.dumps(done.to_dict()))
        return
    for line in done.mended:
        print(f"mended: {line}")
    print(f"written for {receiver}: " + ", ".join(str(f) for f in done.files))
    for what, value in (done.differences or {}).items():
        print(f"read again: the largest difference of {what} is {value:.2g} of the largest")
    if done.logits is not None:
        through = base if done.base is None else f"{done.base} with {out}, against {base} with the adapter"
        print(f"logits through {through}: {done.logits}")
    if done.no_logits is not None:
        print(f"logits not compared: {done.no_logits}")
    served = done.base or folder  # 'embedded' is a name of ours alone
    print(f"next: {_next(receiver, done.files[0], str(served) if served else None)}")


def _merged(adapter: Adapter, base: Path | None, out: Path, receiver: str, json_output: bool, **options: Any) -> None:
    from rich.console import Console

    from ..export.merged import export_merged, place_of

    out = free(place_of(out, receiver), "gguf", options["force"])
    with Console(stderr=True).status("merging") as status:
        options["on_tensor"] = lambda name, number, total: status.update(f"{number}/{total} {name}")
        done = export_merged(adapter, base, out, receiver, **options)
    if json_output:
        print(json.dumps(done.to_dict()))
        return
    print(f"written for {receiver}: " + ", ".join(str(f) for f in done.files))
    print(f"base and adapter as one model in {done.dtype}: {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB")
    if done.other:
        print(f"in f16, as their rows are no multiple of 32: {listing(done.other, 3)}")
    for warning in done.warnings:
        print(f"note: {warning}")
    if done.verified is not None:
        print(f"read again: {done.verified}")
    where = quote(str(done.files[0]))
    print(f"next: {_next(receiver, done.files[0], None) if receiver == 'ollama' else f'llama-server -m {where}'}")


def _next(receiver: str, path: Path, base: str | None) -> str:
    where, of = quote(str(path)), quote(base or "BASE")
    return {
        "vllm": f"vllm serve {of} --enable-lora --lora-modules mine={where}",
        "sglang": f"python -m sglang.launch_server --model-path {of} --lora-paths mine={where}",
        "llama.cpp": f"llama-server -m base.gguf --lora {where}",
        "ollama": f"ollama create mine -f {quote(str(path.parent / 'Modelfile'))}",
        "comfyui": f"cp {where} ComfyUI/models/loras/",
        "a1111": f"cp {where} stable-diffusion-webui/models/Lora/",
        "diffusers": f"pipe.load_lora_weights({str(path)!r})",
        "mlx": f"mlx_lm.generate --model {of} --adapter-path {where}",
    }.get(receiver, f"lorakit inspect {where}")
