"""The options of `lorakit image generate` as texts."""

from __future__ import annotations

import pytest

from lorakit.cli.image import request
from lorakit.cli.image.request import AdapterUse
from lorakit.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "text, use",
    [
        ("style.safetensors", AdapterUse("style", "style.safetensors")),
        ("style.safetensors:0.7", AdapterUse("style", "style.safetensors", 0.7)),
        ("ink=runs/a/adapter:-1", AdapterUse("ink", "runs/a/adapter", -1.0)),
        ("runs/style/adapter", AdapterUse("style", "runs/style/adapter")),
        ("owner/name:0.5", AdapterUse("name", "owner/name", 0.5)),
        ("v1.2 style", AdapterUse("v1.2 style", "v1.2 style")),
        (r"C:\loras\style.safetensors", AdapterUse(r"C_\loras\style", r"C:\loras\style.safetensors")),
        ("x.pt:unet=0.7,text_encoder=0", AdapterUse("x", "x.pt", None, {"unet": 0.7, "text_encoder": 0.0})),
        ("x.pt:0.5,unet.mid_block=2", AdapterUse("x", "x.pt", 0.5, {"unet.mid_block": 2.0})),
    ],
)
def test_an_adapter_with_its_weights(text, use):
    assert request.adapters([text]) == [use]


def test_a_path_with_a_colon_is_a_path_if_it_is_there(tmp_path):
    folder = tmp_path / "style:0.7"
    folder.mkdir()
    assert request.adapters([str(folder)])[0].source == str(folder)
    assert request.adapters([f"{folder}:0.5"])[0].weight == 0.5


@pytest.mark.parametrize(
    "texts, message",
    [
        (["x.pt:much"], "'much' is no weight"),
        (["x.pt:"], "'' is no weight"),
        (["x.pt:nan"], "'nan' is no weight"),
        (["x.pt:unet=a"], "'unet=a' is no weight"),
        (["x.pt:1,2"], "'2' is no weight"),
        (["a/x.pt", "b/x.pt"], "two adapters are named 'x'"),
        ([""], "expected PATH"),
    ],
)
def test_adapters_that_cannot_be_read(texts, message):
    with pytest.raises(ConfigError, match=message):
        request.adapters(texts)


def test_names_have_no_character_that_a1111_reads_as_another():
    assert request.adapters(["a,b:c<d>.pt:1"])[0].name == "a_b_c_d_"


@pytest.mark.parametrize(
    "args, joined",
    [
        (["a", "--scale", "0", "0.5", "1"], ["a", "--scale", "0,0.5,1"]),
        (["--scale", "-1", "-.5", "0", "a cat"], ["--scale", "-1,-.5,0", "a cat"]),
        (["--scale", "0,1", "2", "--seed", "3"], ["--scale", "0,1,2", "--seed", "3"]),
        (["--scale", "x", "1"], ["--scale", "x", "1"]),
        (["--scale"], ["--scale"]),
        (["7", "8"], ["7", "8"]),
    ],
)
def test_scales_may_be_written_with_spaces(args, joined):
    assert request.spaced_scales(args) == joined


def test_scales():
    assert request.scales(None) == [1.0]
    assert request.scales("0, 0.5,1") == [0.0, 0.5, 1.0]
    for text, message in (("0,half", "'half' is not a number"), ("", "is not a number"), ("1,1", "twice")):
        with pytest.raises(ConfigError, match=message):
            request.scales(text)


def test_prompts_of_arguments_and_file(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \na cat\n", encoding="utf8")
    assert request.prompts(["an animal"], file) == ["an animal", "a cat", "a dog"]
    assert "1 of 4 prompts are there before, such as 'a cat', and are drawn once" in capsys.readouterr().err
    file.write_text("\n", encoding="utf8")
    with pytest.raises(DataError, match="is empty"):
        request.prompts([], file)
    with pytest.raises(DataError, match="cannot read"):
        request.prompts([], tmp_path / "none.txt")


def test_a_tag_of_a1111_in_a_prompt_is_no_word():
    with pytest.raises(ConfigError, match=r"take it out, and give --adapter ink=PATH:0.7"):
        request.prompts(["a cat <lora:ink:0.7>"], None)


def test_further_arguments_have_yaml_values():
    assert request.arguments(["clip_skip=1", "eta=0.5", "x=[1, 2]"]) == {"clip_skip": 1, "eta": 0.5, "x": [1, 2]}
    for text in ("clip_skip", "=1", "x=[1"):
        with pytest.raises(ConfigError, match="expected NAME=VALUE"):
            request.arguments([text])


def test_out(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c").touch()
    assert request.output_path(tmp_path / "a.png", force=True) == tmp_path / "a.png"
    assert request.output_path(tmp_path / "new", force=False) == tmp_path / "new"
    for name, message in (
        ("a.png", "--force replaces it"),
        ("b.png", "is a folder"),
        ("c", "is a file"),
        ("d.jpg", "PNG"),
    ):
        with pytest.raises(ConfigError, match=message):
            request.output_path(tmp_path / name, force=False)
