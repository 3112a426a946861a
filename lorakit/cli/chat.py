"""`lorakit generate` and `lorakit chat`: talk to a base with adapters."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Literal

import typer

from ..errors import ConfigError
from .loading import load
from .options import Model, Precision, TopP
from .starting import starting

_HELP = "/adapter NAME chooses an adapter, /base the base alone, /reset forgets the conversation, /quit leaves"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; standard input if left out")] = None,
    model: Model = "embedded",
    adapter: Annotated[list[str] | None, typer.Option(help="PATH or NAME=PATH; may be repeated, the last is used")] = None,
    template: Annotated[
        Literal["auto", "chat", "plain", "none"],
        typer.Option(help="chat, plain: the prompt as a user's turn; none: as it is; auto: as the adapter was trained"),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(help="for a repeatable sample")] = None,
    precision: Precision = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="print prompt and answer as JSON")] = False,
) -> None:
    """Answer one prompt. `\\n` in the argument is a line end."""
    with starting(f"loading {model}"):
        from ..data.render import question_ids
        from ..generate.generate import stream

    text = sys.stdin.read() if prompt is None else prompt.replace("\\n", "\n")
    if not text:
        raise ConfigError("the prompt is empty")
    loaded = load(model, adapter or [], precision)
    ids = question_ids(text, loaded.tokenizer, loaded.style_for(template))
    pieces = stream(loaded.model, loaded.tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if json_output:
        print(json.dumps({"prompt": text, "text": "".join(pieces)}, ensure_ascii=False))
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat(
    model: Model = "embedded",
    adapter: Annotated[list[str] | None, typer.Option(help="PATH or NAME=PATH; may be repeated, the last is active first")] = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    template: Annotated[
        Literal["auto", "chat", "plain", "none"],
        typer.Option(help="chat, plain: a conversation; none: each line is completed on its own; auto: as the adapter was trained"),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.7,
    top_p: TopP = 0.95,
    seed: Annotated[int | None, typer.Option(help="for a repeatable conversation")] = None,
    precision: Precision = "auto",
) -> None:
    """A conversation on the terminal. A model without a chat template completes each line on its own."""
    with starting(f"loading {model}"):
        from ..data.render import question_ids
        from ..errors import LorakitError
        from ..generate.generate import stream

    loaded = load(model, adapter or [], precision)
    base, tokenizer, names, style = loaded.model, loaded.tokenizer, loaded.names, loaded.style_for(template)
    talks = style != "none"
    print(f"{model}{' + ' + names[-1] if names else ''}. {_HELP}.")
    if not talks:
        print("No chat template: each line is completed on its own (\\n is a line end).")
    history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                history = _command(base, names, line, history)
            elif line:
                if not talks:
                    history = []
                history.append({"role": "user", "content": line.replace("\\n", "\n") if not talks else line})
                ids = question_ids(history, tokenizer, style)
                answer = ""
                for piece in stream(base, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
                    answer += piece
                    print(piece, end="", flush=True)
                print()
                history.append({"role": "assistant", "content": answer})
        except LorakitError as error:
            print(f"lorakit: {error}")


def _command(base: Any, names: list[str], line: str, history: list[dict[str, str]]) -> list[dict[str, str]]:
    from ..model.activate import activate

    word, _, rest = line.partition(" ")
    if word == "/adapter":
        activate(base, rest.strip())
    elif word == "/base":
        if names:
            activate(base, None)
    elif word == "/reset":
        return [m for m in history if m["role"] == "system"]
    else:
        print(_HELP)
    return history
