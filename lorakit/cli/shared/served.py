"""`--server URL` of `eval` and `chat`: the models of a server that is running take the place of a base loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import ConfigError
from .json_text import json_text
from .output import output, say
from .starting import starting

if TYPE_CHECKING:
    from ...serve.client import Client, Served
    from ...tasks.metrics.texts import Compared

Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="ask an OpenAI-compatible server instead of loading a model: --model and --adapter are its names",
    ),
]
DEFAULT_MODEL = "embedded"  # of --model: not given


def loading_flags(
    chat_template: str | None,
    chat_template_kwargs: str | None,
    precision: str,
    quantize: str | None,
    double: bool,
    compute_dtype: str,
) -> dict[str, bool]:
    """Return the flags of loading a model here, which a server does not read, and whether they were given."""
    return {
        "--chat-template": chat_template is not None,
        "--chat-template-kwargs": chat_template_kwargs is not None,
        "--precision": precision != "auto",
        "--quantize": quantize is not None,
        "--no-double": not double,
        "--compute-dtype": compute_dtype != "auto",
    }


@contextmanager
def connected(url: str, adapters: Sequence[str], unused: Mapping[str, bool]) -> Iterator[Client]:
    """Give a client for the server. `unused`: flags that a server does not read, and whether they were given.

    Raises ConfigError for such a flag, and for an adapter that is a path.
    """
    from ...serve.client import Client

    for flag, given in unused.items():
        if given:
            raise ConfigError(f"{flag} has no effect with --server, which has loaded its models already\n  omit {flag}")
    for name in adapters:
        if "=" in name:
            raise ConfigError(
                f"--adapter {name}: with --server an adapter is a name that the server knows, not a file\n"
                f"  give --adapter {name.partition('=')[0]}, the file to: lorakit serve BASE --adapter {name}"
            )
    client = Client(url)
    try:
        yield client
    finally:
        client.close()


def evaluate_on_server(
    url: str,
    data: str,
    model: str,
    adapters: Sequence[str],
    *,
    unused: Mapping[str, bool],
    template: str,
    split: str | None,
    columns: Mapping[str, str] | None,
    answer_after: str | None,
    limit: int | None,
    max_new_tokens: int,
    at_once: int,
    samples: int,
    compared: Compared,
    json_output: bool,
) -> None:
    """Ask the base and each adapter of a server for answers to the rows' prompts, score them and print a table."""
    if template == "plain":
        raise ConfigError("--template plain has no effect with --server, which has its own templates\n  omit it")
    with starting(f"asking {url}"):
        from ...data.read import read_rows
        from ...data.shapes import read_examples
        from ...data.split_text import answered, without_text
        from ...evaluate.served import check_unlisted, chosen_models, evaluate_served, questions_of
        from ...serve.client import GenerationSettings

        rows = [*answered(read_rows(data, split, limit, dict(columns) if columns else None), answer_after, columns)]
        _, examples = read_examples(rows, without_text(columns) if answer_after else columns)
    with connected(url, adapters, unused) as client:
        served = client.models()
        models = chosen_models(served, None if model == DEFAULT_MODEL else model, adapters)
        questions = questions_of(examples, continued=template == "none")
        if questions:
            check_unlisted(client, served, models, questions[0])
        console = output()
        with console.status("asking") as status:
            report = evaluate_served(
                client,
                questions,
                models,
                GenerationSettings(max_tokens=max_new_tokens, temperature=0.0),
                samples=samples,
                at_once=at_once,
                compared=compared,
                on_rows=_counting(status.update),
            )
    if json_output:
        print(json_text(report.to_dict()))
        return
    table = report.sample_table()
    if table is not None:
        console.print(table)
    console.print(report.table())
    say("a server answers with text alone: loss and perplexity are measured by lorakit eval without --server")
    from .next import command

    say(f"next: {command('chat', server=url, adapter=list(adapters))}")


def _counting(show: Callable[[str], Any]) -> Callable[[str, int], None]:
    counts: dict[str, int] = {}

    def on_rows(model: str, rows: int) -> None:
        counts[model] = counts.get(model, 0) + rows
        show(f"{model}: {counts[model]} answers")

    return on_rows


def chat_with_server(
    url: str,
    model: str,
    adapters: Sequence[str],
    *,
    unused: Mapping[str, bool],
    system: str | None,
    template: str,
    settings: Mapping[str, Any],
    commands: str,
) -> None:
    """Chat with a model of a server in the terminal. settings: those of `client.GenerationSettings`."""
    from ...errors import LorakitError

    if template == "plain":
        raise ConfigError("--template plain has no effect with --server, which has its own templates\n  omit it")
    with starting(f"asking {url}"):
        from ...evaluate.served import chosen_models
        from ...serve.client import GenerationSettings
    with connected(url, adapters, unused) as client:
        served = client.models()
        names = chosen_models(served, None if model == DEFAULT_MODEL else model, adapters)
        base, current = names[0], names[-1]
        say(f"{current} at {url}. {commands}.")
        _say_unlisted(current, served)
        opening = [{"role": "system", "content": system}] if system else []
        history = list(opening)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                return
            if word == "/adapter" and rest.strip():
                current = rest.strip()
                _say_unlisted(current, served)
            elif word == "/base":
                current = base
            elif word == "/reset":
                history = list(opening)
            elif word.startswith("/"):
                say(commands)
            elif line:
                question = {"role": "user", "content": line}
                prompt = line.replace("\\n", "\n") if template == "none" else [*history, question]
                answer = ""
                try:
                    for piece in client.stream(current, prompt, GenerationSettings(**settings)):
                        answer += piece
                        print(piece, end="", flush=True)
                    print()
                    history += [question, {"role": "assistant", "content": answer}]
                except LorakitError as error:
                    print(f"{chr(10) if answer else ''}lorakit: {error}")


def _say_unlisted(name: str, served: Sequence[Served]) -> None:
    """Say that a server does not list a name, which may be a mix, or one that it loads on first use."""
    from ...errors import did_you_mean

    listed = [model.name for model in served]
    if name not in listed:
        say(f"note: the server does not list '{name}'{did_you_mean(name, listed)}")
