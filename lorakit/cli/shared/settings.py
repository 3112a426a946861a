"""Read settings from a YAML file and command-line flags. The fields' descriptions are the help and the comments."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from ...config import PRESETS, Strict
from ...errors import ConfigError, did_you_mean

_ALSO = {"learning_rate": ("--lr",)}  # short forms that users know from elsewhere


def with_flags(cls: type[Strict], command: Callable[..., Any], skip: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Build a typer command with one option per field of `cls`.

    `command` gets the options that were given in its parameter `flags`, a dict by field name.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    fields = {name: info for name, info in cls.model_fields.items() if name not in skip}
    options = [_option(name, info) for name, info in fields.items()]

    def call(**arguments: Any) -> Any:
        flags = {name: arguments.pop(name) for name in fields}
        return command(
            **arguments, flags={name: _value(fields[name], value) for name, value in flags.items() if value is not None}
        )

    typer_command: Any = call  # inspect reads __signature__, which no stub of a function declares
    typer_command.__name__, typer_command.__doc__ = command.__name__, command.__doc__
    typer_command.__signature__ = inspect.Signature([*own, *options])
    typer_command.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    return typer_command


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file's settings. ConfigError, with line and column, if it is not a mapping of names to values."""
    if not path.is_file():
        files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no config file '{path}'{did_you_mean(path.name, files)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} contains a {type(values).__name__}; expected lines of 'name: value'")
    return values


def commented(
    cls: type[Strict], values: dict[str, Any], skip: tuple[str, ...] = (), defaults: Strict | None = None
) -> str:
    """Write all settings as YAML with their descriptions. Those not in `values` are commented out, as defaults.

    `defaults`: settings whose values are the defaults; None: the class's own.
    """
    lines = []
    for name, info in cls.model_fields.items():
        if name in skip:
            continue
        default = info.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        # Dumped as the only element of a flow list, without its brackets, any value fits on the line of its name.
        value = yaml.safe_dump(
            [values.get(name, default)], allow_unicode=True, default_flow_style=True, width=1 << 20
        ).strip()[1:-1]
        shown = f"{name}: {value}"
        lines += [f"# {info.description}", shown if name in values else f"# {shown}", ""]
    return "\n".join(lines)


def _option(name: str, info: FieldInfo) -> inspect.Parameter:
    flag = name.replace("_", "-")
    kinds = _kinds(info.annotation)
    is_switch = kinds == [bool]
    declared = f"--{flag}/--no-{flag}" if is_switch else f"--{flag}"
    default = info.get_default(call_default_factory=True)
    shown = (
        ""
        if info.is_required() or default in (None, [], {})
        else f" [default: {str(default).lower() if is_switch else default}]"
    )
    values = [str(v) for kind in kinds if get_origin(kind) is Literal for v in get_args(kind)]
    metavar = None if is_switch else "|".join(values) if values and len(kinds) == 1 else _metavar(kinds)
    kind = bool | None if is_switch else str | None
    option = typer.Option(
        declared, *_ALSO.get(name, ()), help=f"{info.description}{shown}", metavar=metavar, show_default=False
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [k for k in get_args(annotation) if k is not type(None)]
    return [annotation]


def _metavar(kinds: list[Any]) -> str:
    names = {int: "N", float: "X", str: "TEXT", list: "A,B,...", dict: "NAME=VALUE,..."}
    return "|".join(
        dict.fromkeys(
            "|".join(map(str, get_args(k))) if get_origin(k) is Literal else names.get(get_origin(k) or k, "VALUE")
            for k in kinds
        )
    )


def _value(info: FieldInfo, text: Any) -> Any:
    """Parse a flag's text for its field: lists by commas, mappings as name=value, and scalars as YAML."""
    if not isinstance(text, str):
        return text
    origins = [get_origin(k) or k for k in _kinds(info.annotation)]
    if (dict in origins and text.startswith("{")) or (list in origins and text.startswith("[") and text.endswith("]")):
        return _yaml(text)  # YAML brackets, for values with commas
    if dict in origins and ("=" in text or set(origins) == {dict}):
        pairs = [part.partition("=") for part in text.split(",") if part]
        if not all(sep for _, sep, _ in pairs):
            raise ConfigError(f"expected NAME=VALUE,... (got '{text}')")
        texts = all(get_args(k)[1] is str for k in _kinds(info.annotation) if get_origin(k) is dict)
        return {name.strip(): value.strip() if texts else _yaml(value) for name, _, value in pairs}
    if list in origins and str in origins and re.fullmatch(r"[\w.]+", text) and text not in PRESETS:
        return [text]  # a plain name is a name ending; a regular expression has other characters
    if list in origins and (str not in origins or "," in text):
        return [
            _yaml(part) if str not in _members(info.annotation) else part.strip()
            for part in text.split(",")
            if part.strip()
        ]
    if str in origins:
        value = _yaml(text)
        return value if float in origins and isinstance(value, int | float) else text
    return _yaml(text) if text else text


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # validation will say what the field expects


def _members(annotation: Any) -> list[Any]:
    return [member for kind in _kinds(annotation) if get_origin(kind) is list for member in get_args(kind)]
