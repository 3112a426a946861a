"""`lorakit predict`: what a model says of each row of a file, as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config import Quantization
from ..errors import ConfigError, DataError, NotFiniteError
from ..tasks import task_names, task_of
from .shared.json_text import is_finite
from .shared.loading import read
from .shared.names import check_names
from .shared.options import AnswerAfter, Columns, Force, Model, Precision, Split, pairs
from .shared.quantizing import ComputeDtype, Double, Quantize
from .shared.starting import notice, starting
from .shared.task_base import about_of, base_for, config_for, processor_for, task_named

if TYPE_CHECKING:
    from ..tasks.task import Base
    from ..train.config import TrainConfig

NEW_TOKENS = 128
BATCHES_AT_ONCE = 16  # rows of as many batches are sorted by length, to save padding


def predict(
    data: Annotated[str, typer.Argument(help="rows to predict; labels and answers may be missing")],
    model: Model = "embedded",
    adapter: Annotated[str | None, typer.Option(help="an adapter's folder, file or hub id")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="|".join(task_names()), help="default: the task the adapter was trained for")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a .jsonl file to write; default: standard output")] = None,
    split: Split = None,
    columns: Columns = None,
    answer_after: AnswerAfter = None,
    template: Annotated[
        Literal["auto", "chat", "plain"] | None,
        typer.Option(help="how prompts become conversations, for language models; default: as in training"),
    ] = None,
    column: Annotated[str, typer.Option(help="the column that predictions are written to")] = "prediction",
    limit: Annotated[int | None, typer.Option(min=1, help="predict only the first N rows")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per batch")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"maximum answer length in tokens; default: {NEW_TOKENS}")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="sampling temperature; default: 0, which is greedy")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample from the most likely tokens with this total probability")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="beams of a beam search; default: 1, none")] = None,
    seed: Annotated[int | None, typer.Option(help="sampling seed; default: 0")] = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    double: Double = True,
    compute_dtype: ComputeDtype = "auto",
    force: Force = False,
) -> None:
    """Write a line of JSON for each row, in their order: its columns, and under "prediction" what the model says of it.

    A classifier's label with the scores of all labels, a language model's answer, a vector: as the task has it. Every
    row is answered, or none is written and the error names the row.
    """
    renamed = pairs(columns, "--columns") or None
    quantization = Quantization(quantize=quantize, double=double, compute_dtype=compute_dtype)
    check_names(model, data, [adapter] if adapter else [])
    path = None if out is None else _checked(out, force)
    with starting(f"loading {model} and the rows"):
        values = read(model, [f"adapter={adapter}"] if adapter else [])
        name = task_named(task, values, model)
        given = _settings(name, answer_after, template, max_new_tokens, temperature, top_p, beams)
        config = config_for(
            name,
            values,
            data=data,
            model=model,
            split=split,
            columns=renamed,
            precision=precision,
            quantization=quantization,
            **given,
            seed=seed,
        )
        processor = processor_for(config, values)
        items = task_of(config.task).to_predict(config, processor)[:limit]
        if any(column in _columns(item) for item in items):
            raise ConfigError(
                f"{data}: the rows have a column '{column}' already\n  name another for the predictions: --column NAME"
            )
        base = base_for(config, processor, about_of(config, values), values)
    if cut := [item for item in items if getattr(item, "cut", False)]:
        notice(
            f"lorakit: {len(cut):,} of {len(items):,} rows are longer than the model's positions and were cut; the "
            f"first is {cut[0].where}"
        )
    lines = [
        json.dumps(_columns(item) | {column: found}, ensure_ascii=False, default=str)
        for item, found in zip(items, _predictions(config, base, items, batch_size), strict=True)
    ]
    if path is None:
        for line in lines:
            print(line)
        return
    from ..io.atomic import write_text

    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{len(lines):,} predictions: {path}")


def _settings(
    task: str,
    answer_after: str | None,
    template: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    beams: int | None,
) -> dict[str, Any]:
    """Return the task's settings for these flags. Raises ConfigError for a flag that the task has no use for."""
    given = {
        "--answer-after": ("answer_after", answer_after),
        "--template": ("template", template),
        "--max-new-tokens": ("sample_tokens", max_new_tokens),
        "--temperature": ("sample_temperature", temperature),
        "--top-p": ("sample_top_p", top_p),
        "--beams": ("sample_beams", beams),
    }
    fields = task_of(task).settings.model_fields if task in task_names() else {}
    for flag, (setting, value) in given.items():
        if value is not None and fields and setting not in fields:
            raise ConfigError(f"{flag}: the task {task} generates no text from prompts\n  remove {flag}")
    if (beams or 1) > 1 and temperature:
        raise ConfigError(
            f"--beams {beams} searches for the likeliest text, and --temperature {temperature:g} draws one\n"
            "  remove one of the two"
        )
    found = {setting: value for setting, value in given.values() if value is not None}
    return {"sample_tokens": NEW_TOKENS, **found} if "sample_tokens" in fields else found


def _checked(out: Path, force: bool) -> Path:
    path = out.expanduser()
    if path.is_dir():
        raise ConfigError(f"--out {out} is a folder\n  name a file in it, such as {path / 'predictions.jsonl'}")
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise ConfigError(f"--out {out}: predictions are lines of JSON\n  give a name that ends in .jsonl")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists\n  --force replaces it")
    return path


def _columns(item: Any) -> dict[str, Any]:
    """Return the columns of an item's row, without files that are stored in it; of an item without a row (a picture's
    file), where it came from.
    """
    row = getattr(item, "row", None)
    return {"from": item.where} if row is None else dict(_without_files(row.values))


def _without_files(value: Any) -> Any:
    """Return a value without the bytes in it: a picture or sound of a table keeps its path."""
    if isinstance(value, Mapping):
        return {name: _without_files(each) for name, each in value.items() if not isinstance(each, _BYTES)}
    if isinstance(value, list | tuple):
        return [_without_files(each) for each in value if not isinstance(each, _BYTES)]
    return value


_BYTES = (bytes, bytearray, memoryview)


def _predictions(config: TrainConfig, base: Base, items: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    """Predict in portions, with a line on stderr after each."""
    import torch

    torch.manual_seed(config.seed)
    task, found = task_of(config.task), []
    size = batch_size * BATCHES_AT_ONCE
    for start in range(0, len(items), size):
        portion = items[start : start + size]
        made = task.predict(config, base, portion, batch_size)
        if len(made) != len(portion):
            raise DataError(f"{portion[0].where}: {len(made)} predictions for {len(portion)} rows")
        for item, prediction in zip(portion, made, strict=True):
            if not is_finite(prediction):
                raise NotFiniteError(
                    f"{item.where}: what the model predicts is not a finite number\n"
                    "  load the model in bfloat16 or float32 rather than float16 (--precision)"
                )
        found += made
        if start + size < len(items):
            notice(f"lorakit: {len(found):,} of {len(items):,} rows")
    return found
