"""`lorakit convert` and `lorakit export`: an adapter in another format, or for a program that receives it."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from .files import base_folder, dtype_of, free, read

_KINDS = Annotated[Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision of the numbers; default: the adapter's")]
_FORCE = Annotated[bool, typer.Option("--force", help="replace OUT if it exists")]
_BASE = Annotated[str | None, typer.Option(help="the base's folder (its config.json), which llama.cpp's format needs")]


def convert(
    source: Annotated[str, typer.Argument(help="an adapter in any format: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="what to write: a folder for peft and mlx, a file for the others")],
    to: Annotated[Literal["peft", "loralib", "kohya", "diffusers", "cloneofsimo", "mlx", "gguf"], typer.Option(help="the format to write")],
    base: _BASE = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    dtype: _KINDS = None,
    allow_loss: Annotated[bool, typer.Option("--allow-loss", help="leave out what the format cannot hold, and list it")] = False,
    force: _FORCE = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Write an adapter in another format. What that cannot hold is an error, unless it may be lost; then it is listed."""
    from ..formats import format_of
    from ..formats.convert import convert as converted

    out, folder, was = free(out, to, force), base_folder(base), format_of(source)
    done = converted(read(source, alpha, folder), out, to, base=folder, dtype=dtype_of(dtype), allow_loss=allow_loss)
    if json_output:
        print(json.dumps({"from": was, **done.to_dict()}))
        return
    for loss in done.lost:
        print(f"left out: {loss}")
    print(f"{source} ({was}) -> {done.path} ({to}): {len(done.adapter.updates)} modules, {done.adapter.parameters:,} parameters")
    more = f" --base {quote(base)}" if base and to == "gguf" else ""
    if to == "loralib":
        from ..formats.loralib import alpha_of

        more = f" --alpha {alpha_of(done.adapter):g}"
        print(f"the file holds no alpha: it is to be read with{more}")
    print(f"next: lorakit inspect {quote(str(done.path))}{more}")


def export(
    source: Annotated[str, typer.Argument(help="the adapter: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="what to write")],
    receiver: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "ollama", "comfyui", "a1111", "diffusers", "peft", "mlx", "canonical"],
        typer.Option("--for", help="the program that will read it; canonical: any"),
    ],
    fix: Annotated[bool, typer.Option("--fix", help="mend what can be mended without changing the effect")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read the result again, independently, and compare")] = False,
    base: _BASE = None,
    model: Annotated[str | None, typer.Option(help="for Ollama: what the Modelfile starts FROM")] = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    force: _FORCE = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Check an adapter against the rules of the program that will read it, write it so, and (--verify) prove the same effect."""
    from ..export import RECEIVERS
    from ..export import export as exported

    folder = base_folder(base)
    if receiver == "ollama" and out.suffix != ".gguf":
        out = out / "adapter.gguf"
    out = free(out, RECEIVERS[receiver].format, force)
    done = exported(read(source, alpha, folder), out, receiver, fix=fix, verify=verify, base=folder, model=model)
    if json_output:
        print(json.dumps(done.to_dict()))
        return
    for line in done.mended:
        print(f"mended: {line}")
    print(f"written for {receiver}: " + ", ".join(str(f) for f in done.files))
    if done.difference is not None:
        print(f"read again: the largest difference of ΔW is {done.difference:.2g} of the largest ΔW")
    if done.uncompared:
        print(f"not compared: {done.uncompared} modules of other kinds (LoHa, LoKr, whole updates), or their DoRA magnitudes")
    print(f"next: {_next(receiver, done.files[0], base)}")


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
