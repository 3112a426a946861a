"""`lorakit chat`: chat with a base and its adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ..config import Quantization
from .shared.loading import load
from .shared.names import check_names
from .shared.options import ChatTemplate, ChatTemplateKwargs, Model, Precision, TopP, template_kwargs
from .shared.output import say
from .shared.quantizing import ComputeDtype, Double, Quantize
from .shared.served import Server, chat_with_server, loading_flags
from .shared.starting import starting

_HELP = "/adapter NAME switches to an adapter, /base to the base alone, /reset clears the conversation, /quit exits"


def chat(
    model: Model = "embedded",
    adapter: Annotated[
        list[str] | None, typer.Option(help="PATH or NAME=PATH; repeatable, starts with the last one")
    ] = None,
    server: Server = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    template: Annotated[
        Literal["auto", "chat", "plain", "none"],
        typer.Option(help="chat, plain: a conversation; none: each line is completed on its own; auto: as in training"),
    ] = "auto",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="maximum answer length in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="sampling temperature; 0 is greedy")] = 0.7,
    top_p: TopP = 0.95,
    seed: Annotated[int | None, typer.Option(help="sampling seed")] = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    double: Double = True,
    compute_dtype: ComputeDtype = "auto",
) -> None:
    """Chat with a model in the terminal. A model without a chat template completes each line on its own."""
    if server is not None:
        unused = loading_flags(chat_template, chat_template_kwargs, precision, quantize, double, compute_dtype)
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        chat_with_server(
            server,
            model,
            adapter or [],
            unused=unused,
            system=system,
            template=template,
            settings=settings,
            commands=_HELP,
        )
        return
    quantization = Quantization(quantize=quantize, double=double, compute_dtype=compute_dtype)
    check_names(model, adapters=adapter or [])
    with starting(f"loading {model}"):
        from ..errors import LorakitError
        from ..generate.generate import stream

        kwargs = template_kwargs(chat_template_kwargs)
        loaded = load(model, adapter or [], precision, chat_template, kwargs, quantization=quantization)
    base, tokenizer, names, style = loaded.model, loaded.tokenizer, loaded.names, loaded.style_for(template)
    has_turns = style != "none"
    say(f"{model}{' + ' + names[-1] if names else ''}. {_HELP}.")
    if not has_turns:
        why = "No chat template" if loaded.source is None else "An encoder-decoder reads one text"
        say(f"{why}: each line is answered on its own (\\n is a newline).")
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
                if not has_turns:
                    history = []
                history.append({"role": "user", "content": line.replace("\\n", "\n") if not has_turns else line})
                ids = loaded.question_ids(history, style)
                answer = ""
                for piece in stream(
                    base, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
                ):
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
        say(_HELP)
    return history
