"""`lorakit eval`: evaluate base and adapters on the same rows, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config import Quantization
from ..errors import ConfigError
from ..tasks import DEFAULT, task_names, task_of
from ..tasks.metrics.texts import compared
from ..tasks.text.lengths import NO_LIMIT
from .shared.eval_flags import settings_of
from .shared.json_text import json_text
from .shared.loading import attached, read
from .shared.names import check_names
from .shared.next import command
from .shared.options import (
    AnswerAfter,
    ChatTemplate,
    ChatTemplateKwargs,
    Columns,
    Date,
    Model,
    Precision,
    Split,
    Turns,
    pairs,
    template_kwargs,
)
from .shared.output import output, say
from .shared.quantizing import ComputeDtype, Double, Quantize, quantize_flags
from .shared.served import Server, evaluate_on_server, loading_flags
from .shared.starting import starting
from .shared.task_base import base_for, config_for, processor_for, task_named

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..tasks.task import Base, Data
    from ..train.config import TrainConfig

NEW_TOKENS = 128
SAMPLES = 3


def evaluate(
    data: Annotated[
        str, typer.Argument(help="rows to evaluate on; a `references` column may list several correct answers")
    ],
    model: Model = "embedded",
    adapter: Annotated[list[str] | None, typer.Option(help="PATH or NAME=PATH; repeatable")] = None,
    server: Server = None,
    text: Annotated[
        bool | None,
        typer.Option(
            "--text/--no-text", help="also generate answers: BLEU, chrF, ROUGE-1/2/L, exact match; default: --text"
        ),
    ] = None,
    split: Split = None,
    columns: Columns = None,
    template: Annotated[
        Literal["auto", "chat", "plain", "none"],
        typer.Option(help="how conversations are formatted; none, with --server: each prompt is a text to continue"),
    ] = "auto",
    turns: Turns = "all",
    answer_after: AnswerAfter = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    answer: Annotated[
        str | None,
        typer.Option(help="exact match compares what this regular expression finds last, or its first group"),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="exact match without regard to case and to how much whitespace there is")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="evaluate only the first N rows")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"maximum answer length in tokens; default: {NEW_TOKENS}, and for speech the model's own limit"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per batch")] = 32,
    samples: Annotated[
        int | None, typer.Option(min=0, help=f"number of rows whose answers are printed; default: {SAMPLES}")
    ] = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    double: Double = True,
    compute_dtype: ComputeDtype = "auto",
    task: Annotated[
        str | None, typer.Option(metavar="|".join(task_names()), help="default: the task the adapters were trained for")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Compare base and adapters: loss and perplexity on the trained positions, and the quality of generated answers.

    For tasks that do not answer prompts: the loss, and their own measures, such as accuracy or word error rate.
    """

    renamed = pairs(columns, "--columns") or None  # report a bad value before anything is loaded
    if server is not None:
        unused = {
            "--no-text": text is False,
            "--turns": turns != "all",
            "--date": date is not None,
            "--task": task not in (None, DEFAULT),
        } | loading_flags(chat_template, chat_template_kwargs, precision, quantize, double, compute_dtype)
        evaluate_on_server(
            server,
            data,
            model,
            adapter or [],
            unused=unused,
            template=template,
            split=split,
            columns=renamed,
            answer_after=answer_after,
            limit=limit,
            max_new_tokens=max_new_tokens or NEW_TOKENS,
            at_once=batch_size,
            samples=SAMPLES if samples is None else samples,
            compared=compared(answer, normalize),
            json_output=json_output,
        )
        return
    if template == "none":
        raise ConfigError("--template none is for --server\n  use --template auto, chat or plain")
    quantization = Quantization(quantize=quantize, double=double, compute_dtype=compute_dtype)
    check_names(model, data, adapter or [])
    kwargs = template_kwargs(chat_template_kwargs)
    exact = compared(answer, normalize)
    with starting(f"loading {model} and the rows"):
        from ..bases.load import end_tokens
        from ..data.dataset import build
        from ..data.read import read_rows
        from ..data.split_text import answered, without_text
        from ..evaluate.evaluate import evaluate as evaluate_items
        from ..generate.generate import positions_of

        values = read(model, adapter or [])
        name = task_named(task, values, model)
        if name == DEFAULT:
            loaded = attached(model, values, precision, chat_template, kwargs, date, quantization)
            base, tokenizer = loaded.model, loaded.tokenizer
            longest = positions_of(base) or NO_LIMIT
            dataset = build(
                [*answered(read_rows(data, split, limit, renamed), answer_after, renamed)],
                tokenizer,
                columns=without_text(renamed) if answer_after else renamed,
                template=template,
                max_length=longest,
                turns=turns,
                options=loaded.options,
                ends=end_tokens(model),
            )
            items, dropped, has_prompts, own_task = dataset.items, dataset.dropped, dataset.shape != "text", None
            remarks = _remarks(dataset.notes, ())
        else:
            own_task = task_of(name)
            flags: dict[str, tuple[str, Any]] = {
                "--template": ("template", None if template == "auto" else template),
                "--turns": ("turns", None if turns == "all" else turns),
                "--answer-after": ("answer_after", answer_after),
                "--chat-template": ("chat_template", chat_template),
                "--chat-template-kwargs": ("chat_template_kwargs", kwargs or None),
                "--date": ("date", date),
            }
            if not own_task.writes:
                if answer is not None or normalize or samples is not None:
                    flag = "--answer" if answer is not None else "--normalize" if normalize else "--samples"
                    raise ConfigError(f"{flag}: the task {name} answers with no text\n  remove {flag}")
                flags["--max-new-tokens"] = ("sample_tokens", max_new_tokens)
                if text is not None:
                    flags["--text" if text else "--no-text"] = (
                        "sample_tokens",
                        max_new_tokens or NO_LIMIT if text else 0,
                    )
            config = config_for(
                name,
                values,
                data=data,
                model=model,
                split=split,
                columns=renamed,
                precision=precision,
                quantization=quantization,
                **settings_of(name, flags),
            )
            own, rows = _of_task(config, values, limit)
            items, dropped, has_prompts = rows.train, 0, own_task.writes
            remarks = _remarks(rows.notes, rows.facts, limit)
            base, tokenizer = own.model, own.processor
    if own_task is not None and not own_task.writes:
        _task_metrics(config, own, items, [*values], batch_size, json_output, remarks)
        return
    console = output()
    with console.status("evaluating") as status:
        report = evaluate_items(
            base,
            tokenizer,
            items,
            [None, *values],
            generate=text is not False and has_prompts,
            max_new_tokens=max_new_tokens or NEW_TOKENS,
            samples=SAMPLES if samples is None else samples,
            batch_size=batch_size,
            task=own_task,
            compared=exact,
            on_rows=lambda what, count: status.update(f"{what}: {count} more rows"),
        )
    if json_output:
        print(json_text(report.to_dict() | {"dropped": dropped, "notes": remarks}))
        return
    table = report.sample_table()
    if table is not None:
        console.print(table)
    console.print(report.table())
    for remark in remarks:
        say(remark)
    if dropped:
        say(f"skipped {dropped} rows longer than the model's {longest} positions")
    given = {
        "precision": None if precision == "auto" else precision,
        **quantize_flags(quantization),
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
    }
    if values:
        print(f"next: {command('chat', model=model, adapter=adapter, **given)}")
    else:
        how = {
            "columns": columns,
            "template": None if template == "auto" else template,
            "turns": None if turns == "all" else turns,
            "answer_after": answer_after,
        }
        print(f"next: {command('train', data='YOUR.jsonl', model=model, **how, **given, date=date)}")


def _of_task(config: TrainConfig, values: Mapping[str, Adapter], limit: int | None) -> tuple[Base, Data]:
    """Load a base with its adapters, and the rows, for the config's task."""
    from ..evaluate.figures import first_rows

    task = task_of(config.task)
    processor = processor_for(config, values)
    rows = task.data(config, processor)
    rows = replace(rows, train=first_rows(rows.train, limit))
    base = base_for(config, processor, rows, values)
    task.check(config, base.model, rows.train)
    return base, rows


def _remarks(notes: Mapping[str, int], facts: Sequence[tuple[str, str]], limit: int | None = None) -> list[str]:
    """Return a line for each thing to know of the rows: what was cut, left out, or not used."""
    # What the user did not give: `config_for` sets the limit of a text.
    lines = [f"{name}: {text.replace('(as given)', '(positions of the model)')}" for name, text in facts]
    lines += [f"note: {count} rows: {note}" for note, count in notes.items()]
    return [f"{line} (of all rows, beyond --limit too)" for line in lines] if limit else lines


def _task_metrics(
    config: TrainConfig,
    base: Base,
    items: Sequence[Any],
    names: Sequence[str],
    batch_size: int,
    json_output: bool,
    remarks: Sequence[str],
) -> None:
    """Print a task's own metrics for each adapter, or for a fully fine-tuned model."""
    from ..evaluate.figures import figures, row_count, table

    results = figures(task_of(config.task), base, items, names, batch_size)
    if json_output:
        print(json_text({"task": config.task, "results": results, "notes": remarks}))
        return
    output().print(table(results, f"{row_count(items):,} rows"))
    for remark in remarks:
        say(remark)
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in getattr(config, "columns", {}).items()) or None
    print(f"next: {command('train', task=config.task, data='YOUR.jsonl', model=config.model, columns=columns)}")
