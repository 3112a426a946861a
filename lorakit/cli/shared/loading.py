"""Load a base with its adapters, for `eval`, `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config import Quantization
from ...errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from typing import Literal

    from ...adapter.adapter import Adapter
    from ...data.templates import ChatOptions, Style


def named(adapters: list[str], name_of: Callable[[str], str] | None = None) -> dict[str, str]:
    """Parse `NAME=PATH` or `PATH` into {name: path}.

    name_of: gives the name of a path alone; default: "adapter", "adapter2", ... ConfigError if a name occurs twice.
    """
    paths: dict[str, str] = {}
    for argument in adapters:
        name, sep, path = argument.partition("=")
        if not sep:
            name, path = f"adapter{len(paths) + 1}" if paths else "adapter", argument
            name = name if name_of is None else name_of(path)
        if name in paths:
            raise ConfigError(f"--adapter: two adapters are named '{name}'\n  give each its own: NAME=PATH")
        paths[name] = path
    return paths


@dataclass(frozen=True)
class Loaded:
    """A base with adapters. `style`, `options`: how the last adapter's training data was formatted, if recorded."""

    model: Any
    tokenizer: Any
    names: list[str]
    style: Style | None
    options: ChatOptions
    source: Callable[[str], list[int]] | None = None  # of an encoder-decoder: the ids of what its encoder reads

    def question_ids(self, question: str | Sequence[Mapping[str, Any]], style: Style) -> list[int]:
        """Return the token ids that the answer to a text, or to a conversation, starts from."""
        from ...data.render import question_ids

        if self.source is None:
            return question_ids(question, self.tokenizer, style, self.options)
        return self.source(question if isinstance(question, str) else str(question[-1]["content"]))

    def style_for(self, template: Style | Literal["auto"]) -> Style:
        """Choose how to format a prompt. "auto": as in training, else with the chat template if there is one.

        ConfigError if that needs a chat template and the tokenizer has none.
        """
        if self.source is not None:
            if template in ("chat", "plain"):
                raise ConfigError(
                    f"--template {template}: an encoder-decoder reads one text, not a conversation\n"
                    "  use --template auto or none"
                )
            return "none"
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        default: Style = "chat" if has_template else "none"
        style = (self.style or default) if template == "auto" else template
        if style == "chat" and not has_template:
            why = "the adapter was trained with a chat template" if template == "auto" else "--template chat"
            raise ConfigError(
                f"{why}, but this model has no chat template\n"
                "  use --template plain or none, or the base it was trained on"
            )
        return style


def read(model: str, adapters: list[str]) -> dict[str, Adapter]:
    """Read the adapters, by name. A GGUF needs the base's config: its rows are permuted per head."""
    from ...adapter.adapter import Adapter
    from ...bases.load import load_config
    from ...formats import format_of
    from .files import say_if_unfinished

    paths = named(adapters)
    for path in paths.values():
        say_if_unfinished(path)
    values = {
        name: Adapter.load(path, base=load_config(model) if format_of(path) == "gguf" else None)
        for name, path in paths.items()
    }
    for name, path in paths.items():
        _check_for_text(path, values[name])
    return values


def _check_for_text(path: str, adapter: Adapter) -> None:
    """Raise AdapterError if an adapter is for a pipeline: its modules are in components such as "unet"."""
    from ...bases.pipeline import component_of
    from ...module_names import is_language_trunk

    if any(is_language_trunk(name) for name in adapter.updates):
        return  # whose other modules may be called as a pipeline's are
    components = {component_of(name) for name in adapter.updates} - {None}
    if components:
        raise AdapterError(
            f"{path} is an adapter for pictures (of a pipeline's {', '.join(sorted(map(str, components)))})\n"
            f"  draw with it: lorakit image generate 'your prompt' --model PIPELINE --adapter {path}"
        )


def load(
    model: str,
    adapters: list[str],
    precision: str = "auto",
    chat_template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> Loaded:
    """Load the base and attach the adapters; the last one is active."""
    from ...bases.load import load_config
    from ...tasks.text.kind import writes_from_source

    values = read(model, adapters)  # first, to fail early
    _check_answers(named(adapters), values)
    if writes_from_source(load_config(model)):
        return _encoder_decoder(model, values, precision, quantization)
    return attached(model, values, precision, chat_template, kwargs, quantization=quantization)


def _check_answers(paths: Mapping[str, str], values: Mapping[str, Adapter]) -> None:
    """Raise AdapterError for an adapter whose task does not answer prompts in text."""
    from ...tasks import task_names, task_of, task_of_adapter

    writing = {task_of(name).peft_type for name in task_names() if task_of(name).writes}
    for name, value in values.items():
        task = task_of_adapter(value.config.task, value.metadata)
        if task is not None and task_of(task).peft_type not in writing:
            raise AdapterError(
                f"{paths[name]} is an adapter for the task {task}, which has no answer to a prompt\n"
                f"  use it on rows: lorakit predict ROWS --model MODEL --adapter {paths[name]}"
            )


def attached(
    model: str,
    values: Mapping[str, Adapter],
    precision: str = "auto",
    chat_template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    quantization: Quantization | None = None,
) -> Loaded:
    """Load the base, quantized if asked for, and attach adapters that have been read.

    Conversations are formatted as in the last adapter's training, with its chat template, template variables and date,
    unless others are given (`chat_template`: a file, `kwargs`, `date`). Generation also stops at the end tokens that
    any of the adapters has learned.
    """
    from ...bases.device import choose_device, choose_dtype
    from ...bases.load import load_model, load_tokenizer, stop_at
    from ...bases.rope import recorded
    from ...bases.vocabulary import grow, recorded_tokens, restore_tokens
    from ...data.chat_record import ChatRecord
    from ...data.templates import ChatOptions, read_template, with_template
    from ...model.attach import attach

    template = None if chat_template is None else read_template(chat_template)
    device = choose_device().value
    scaling = recorded(value.metadata for value in values.values())
    dtype = choose_dtype(precision, device).value
    base = load_model(model, dtype, device, quantization=quantization, rope_scaling=scaling)
    tokenizer = load_tokenizer(model)
    added = [recorded_tokens(value.metadata) for value in values.values()]
    if any(added):
        for tokens in added:
            restore_tokens(tokenizer, tokens)
        grow(base, len(tokenizer))
    record = ChatRecord()
    for name, value in values.items():
        attach(base, value, name)
        record = ChatRecord.of(value.metadata)
        ends = tokenizer.convert_tokens_to_ids(list(record.end_tokens))
        stop_at(base, [token for token in ends if token is not None])
    tokenizer = with_template(tokenizer, template or record.template, chat_template or "chat_template")
    options = ChatOptions({**record.options.kwargs, **(kwargs or {})}, record.options.date if date is None else date)
    return Loaded(base, tokenizer, list(values), record.style, options)


def _encoder_decoder(
    model: str, values: Mapping[str, Adapter], precision: str, quantization: Quantization | None
) -> Loaded:
    """Load an encoder-decoder, with its adapters' languages and the prefix of their sources."""
    from ...data.pairs import source_ids
    from ...data.templates import ChatOptions
    from .task_base import about_of, base_for, config_for, processor_for

    name = "seq2seq"
    config = config_for(name, values, data="prompt", model=model, precision=precision, quantization=quantization)
    tokenizer = processor_for(config, values)
    base = base_for(config, tokenizer, about_of(config, values), values)
    prefix = getattr(config, "source_prefix", "")
    return Loaded(
        base.model, tokenizer, list(values), None, ChatOptions(), lambda text: source_ids(tokenizer, text, prefix)
    )
