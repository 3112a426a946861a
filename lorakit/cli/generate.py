"""`lorakit generate`: answer one prompt."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer

from ..config import Quantization
from ..errors import ConfigError
from .shared.loading import load
from .shared.names import check_names
from .shared.options import ChatTemplate, ChatTemplateKwargs, Model, Precision, TopP, template_kwargs
from .shared.quantizing import ComputeDtype, Double, Quantize
from .shared.starting import starting


def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; default: read from standard input")] = None,
    model: Model = "embedded",
    adapter: Annotated[
        list[str] | None, typer.Option(help="PATH or NAME=PATH; repeatable, the last one is used")
    ] = None,
    template: Annotated[
        Literal["auto", "chat", "plain", "none"],
        typer.Option(help="chat, plain: the prompt is a user turn; none: raw text; auto: as in training"),
    ] = "auto",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="maximum answer length in tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="sampling temperature; 0 is greedy")] = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(help="sampling seed")] = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    double: Double = True,
    compute_dtype: ComputeDtype = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="print prompt and answer as JSON")] = False,
) -> None:
    """Answer one prompt. `\\n` in the argument is a newline."""
    text = None if prompt is None else prompt.replace("\\n", "\n")
    if text is None and sys.stdin.isatty():
        print("lorakit: type the prompt, then Ctrl-D", file=sys.stderr)
        text = sys.stdin.read()
    if text == "":
        raise ConfigError("the prompt is empty; expected at least one character")
    kwargs = template_kwargs(chat_template_kwargs)
    quantization = Quantization(quantize=quantize, double=double, compute_dtype=compute_dtype)
    check_names(model, adapters=adapter or [])
    with starting(f"loading {model}"):
        from ..generate.generate import stream

        text = sys.stdin.read() if text is None else text
        if not text:
            raise ConfigError("the prompt on standard input is empty; expected at least one character")
        loaded = load(model, adapter or [], precision, chat_template, kwargs, quantization=quantization)
    ids = loaded.question_ids(text, loaded.style_for(template))
    pieces = stream(
        loaded.model,
        loaded.tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if json_output:
        print(json.dumps({"prompt": text, "text": "".join(pieces)}, ensure_ascii=False))
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
