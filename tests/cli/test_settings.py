"""A settings class as YAML and as flags: texts, types, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import typer
import yaml
from pydantic import Field

from lorakit.cli.shared.settings import commented, read_config, with_flags
from lorakit.config import Strict
from lorakit.errors import ConfigError
from lorakit.train.config import TrainConfig


class Settings(Strict):
    data: str = Field(..., description="where the rows are")
    rate: float | Literal["auto"] = Field("auto", description="how fast")
    names: str | list[str] = Field("all", description="what to adapt")
    numbers: list[int] | None = Field(None, description="which of them")
    prompts: list[str] = Field(default_factory=list, description="what to ask")
    ranks: dict[str, int] = Field(default_factory=dict, description="how many for whom")
    parts: dict[str, list[bool]] = Field(default_factory=dict, description="which parts")
    rates: float | dict[str, float] | None = Field(None, description="one, or one each")
    held: float | str = Field(0.05, description="a share or a file")
    label: str | None = Field(None, description="a name")
    deep: bool = Field(True, description="whether to go deep")
    count: int = Field(3, ge=1, description="how many")


def given(*args: str) -> dict:
    """What the command is handed for these arguments, validated."""
    seen = {}

    def command(flags: dict, config: Path | None = None) -> None:
        """Do it."""
        seen.update(flags)

    app = typer.Typer()
    app.command()(with_flags(Settings, command))
    assert not app(args, standalone_mode=False)
    Settings(**{"data": "x"} | seen)
    return seen


@pytest.mark.parametrize(
    "args, flags",
    [
        ([], {}),
        (["--rate", "2e-4"], {"rate": "2e-4"}),  # which pydantic reads as a number
        (["--rate", "auto"], {"rate": "auto"}),
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--names", "q_proj,v_proj"], {"names": ["q_proj", "v_proj"]}),
        (["--names", r".*\.(q|v)_proj"], {"names": r".*\.(q|v)_proj"}),
        (["--names", "[qv]_proj"], {"names": "[qv]_proj"}),
        (["--names", "kohya"], {"names": "kohya"}),  # a set of targets
        (["--names", "kohyas"], {"names": ["kohyas"]}),
        (["--names", "*oops"], {"names": "*oops"}),
        (["--names", "['q_proj']"], {"names": ["q_proj"]}),
        (["--numbers", "1,2, 30"], {"numbers": [1, 2, 30]}),
        (["--numbers", "7"], {"numbers": [7]}),
        (["--prompts", "one"], {"prompts": ["one"]}),
        (["--prompts", '["a, b", "c: d"]'], {"prompts": ["a, b", "c: d"]}),
        (["--ranks", "q_proj=8,v=4"], {"ranks": {"q_proj": 8, "v": 4}}),
        (["--parts", "{c_attn: [true, false, true]}"], {"parts": {"c_attn": [True, False, True]}}),
        (["--rates", "1.0e-5"], {"rates": 1e-5}),
        (["--rates", "unet=1.0e-5,other=0.5"], {"rates": {"unet": 1e-5, "other": 0.5}}),
        (["--held", "0.1"], {"held": 0.1}),
        (["--held", "0"], {"held": 0}),
        (["--held", "held.jsonl"], {"held": "held.jsonl"}),
        (["--held", "a: [b"], {"held": "a: [b"}),
        (["--label", "123"], {"label": "123"}),
        (["--label", "no"], {"label": "no"}),
        (["--no-deep"], {"deep": False}),
        (["--deep", "--count", "5"], {"deep": True, "count": 5}),
    ],
)
def test_a_flags_text_becomes_its_fields_value(args, flags):
    assert given(*args) == flags


@pytest.mark.parametrize(
    "args, message",
    [
        (["--count", "many"], r"Settings\.count"),
        (["--count", "0"], r"Settings\.count"),
        (["--count", ""], r"Settings\.count"),
        (["--count", "{"], r"Settings\.count"),
        (["--numbers", "1,x"], r"Settings\.numbers"),
        (["--ranks", "8"], "NAME=VALUE"),
        (["--ranks", "{broken"], r"Settings\.ranks"),
        (["--rate", "fast"], r"Settings\.rate"),
        (["--rates", "fast"], r"Settings\.rates"),
    ],
)
def test_a_flag_that_does_not_fit_is_a_config_error_by_name(args, message):
    with pytest.raises(ConfigError, match=message):
        given(*args)


def uncommented(text: str, cls) -> str:
    """Every setting's own line made to count; the texts stay comments."""
    return re.sub(rf"^# (?=({'|'.join(cls.model_fields)}):)", "", text, flags=re.M)


@pytest.mark.parametrize("cls", [Settings, TrainConfig])
def test_the_commented_file_reads_back_as_the_defaults_also_when_every_line_counts(cls):
    text = commented(cls, {"data": "rows.jsonl"}, skip=("base",))
    assert cls(**yaml.safe_load(text)) == cls(data="rows.jsonl")
    everything = yaml.safe_load(uncommented(text, cls))
    assert set(everything) == set(cls.model_fields) - {"base"}
    assert cls(**everything) == cls(data="rows.jsonl")


def test_every_setting_stands_under_its_text_and_those_given_count():
    text = commented(Settings, {"data": "x.jsonl", "rate": 0.1})
    assert "# how fast\nrate: 0.1\n" in text
    assert "# how many\n# count: 3\n" in text
    assert all(f"# {info.description}\n" in text for info in Settings.model_fields.values())


@pytest.mark.parametrize(
    "text, message",
    [
        ("rank: [1", "line 1, column 9: not YAML"),
        ("a: 1\n  b: 2\n", "line 2, column 4: not YAML"),
        ("just words", "contains a str; expected lines of 'name: value'"),
        ("- 1\n- 2\n", "contains a list"),
        ("\tx: 1", "line 1, column 1: not YAML"),
    ],
)
def test_a_broken_config_file_is_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "lorakit.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_config_file_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / "lorakit.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"there is no config file .*did you mean 'lorakit\.yaml'"):
        read_config(tmp_path / "lorakit.yml")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(tmp_path / "lorakit.yaml")
    with pytest.raises(ConfigError, match="there is no config file"):
        read_config(tmp_path / "nowhere" / "x.yaml")


def test_a_file_of_comments_only_sets_nothing(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert read_config(path) == {}
