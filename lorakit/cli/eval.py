"""`lorakit eval`: evaluate base and adapters on the same rows, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Quantization
from ..errors import ConfigError
from ..tasks import DEFAULT, task_names, task_of
from ..tasks.metrics.texts import compared
from .shared.loading import attached, read
from .shared.names import check_names
from .shared.next import command
from .shared.options import (
    AnswerAfter,
    ChatTemplate,
    ChatTemplateKwargs,
    Columns,
    DataTemplate,
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
from .shared.starting import starting
from .shared.task_base import NO_LIMIT, base_for, config_for, task_named

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..tasks.task import Base
    from ..train.config import TrainConfig


def evaluate(
    data: Annotated[
        str, typer.Argument(help="rows to evaluate on; a `references` column may list several correct answers")
    ],
    model: Model = "embedded",
    adapter: Annotated[list[str] | None, typer.Option(help="PATH or NAME=PATH; repeatable")] = None,
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="also generate answers: BLEU, chrF, ROUGE-1/2/L, exact match")
    ] = True,
    split: Split = None,
    columns: Columns = None,
    template: DataTemplate = "auto",
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="maximum answer length in tokens")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per batch")] = 32,
    samples: Annotated[int, typer.Option(min=0, help="number of rows whose answers are printed")] = 3,
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

    For classifiers: loss, accuracy and macro F1.
    """

    renamed = pairs(columns, "--columns") or None  # report a bad value before anything is loaded
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
        else:
            own_task = task_of(name)
            if not own_task.writes and (answer is not None or normalize):
                flag = "--answer" if answer is not None else "--normalize"
                raise ConfigError(f"{flag}: the task {name} answers with no text\n  remove {flag}")
            config = config_for(
                name,
                values,
                data=data,
                model=model,
                split=split,
                columns=renamed,
                precision=precision,
                quantization=quantization,
            )
            own, rows_of_task = _of_task(config, values, limit)
            items, dropped, has_prompts = [*rows_of_task], 0, own_task.writes
            base, tokenizer = own.model, own.processor
    if own_task is not None and not own_task.writes:
        _task_metrics(config, own, items, [*values], batch_size, json_output)
        return
    console = output()
    with console.status("evaluating") as status:
        report = evaluate_items(
            base,
            tokenizer,
            items,
            [None, *values],
            generate=text and has_prompts,
            max_new_tokens=max_new_tokens,
            samples=samples,
            batch_size=batch_size,
            task=own_task,
            compared=exact,
            on_rows=lambda what, count: status.update(f"{what}: {count} more rows"),
        )
    if json_output:
        print(json.dumps(report.to_dict() | {"dropped": dropped}, ensure_ascii=False))
        return
    table = report.sample_table()
    if table is not None:
        console.print(table)
    console.print(report.table())
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
        rows = {
            "columns": columns,
            "template": None if template == "auto" else template,
            "turns": None if turns == "all" else turns,
            "answer_after": answer_after,
        }
        print(f"next: {command('train', data='YOUR.jsonl', model=model, **rows, **given, date=date)}")


def _of_task(config: TrainConfig, values: Mapping[str, Adapter], limit: int | None) -> tuple[Base, Sequence[Any]]:
    """Load a base with its adapters, and the rows, for the config's task."""
    task = task_of(config.task)
    processor = task.processor(config)
    rows = task.data(config, processor)
    items = rows.train[:limit]
    base = base_for(config, processor, rows, values)
    task.check(config, base.model, items)
    return base, items


def _task_metrics(
    config: TrainConfig, base: Base, items: Sequence[Any], names: Sequence[str], batch_size: int, json_output: bool
) -> None:
    """Print a task's own metrics for each adapter, or for a fully fine-tuned model."""
    from ..evaluate.figures import figures, table

    results = figures(task_of(config.task), base, items, names, batch_size)
    if json_output:
        print(json.dumps({"task": config.task, "results": results}, ensure_ascii=False))
        return
    output().print(table(results, f"{len(items):,} rows"))
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in getattr(config, "columns", {}).items()) or None
    print(f"next: {command('train', task=config.task, data='YOUR.jsonl', model=config.model, columns=columns)}")
