"""Heat maps: how a module's name is split, what is shown, and the image format."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorakit.analysis.heatmap import colour, grids, kind_of, literal, placed, plot, short
from lorakit.errors import ConfigError

NAMES = {
    "model.layers.3.self_attn.q_proj": ("self_attn.q_proj", "3"),
    "transformer.h.11.attn.c_attn": ("attn.c_attn", "11"),
    "roberta.encoder.layer.2.attention.self.query": ("attention.self.query", "2"),
    "encoder.block.3.layer.0.SelfAttention.q": ("SelfAttention.q", "3.0"),
    "model.layers.3.mlp.experts.5.w1": ("mlp.experts.5.w1", "3"),
    "lm_head": ("lm_head", ""),
    "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_out.0": ("attn1.to_out.0", "down 1.0.2"),
    "down_blocks.1.resnets.0.conv1": ("conv1", "down 1.0"),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": ("ff.net.2", "mid 0.0"),
    "up_blocks.2.upsamplers.0.conv": ("conv", "up 2.0"),
    "single_transformer_blocks.7.attn.to_q": ("attn.to_q", "single_transformer 7"),
    "text_model.encoder.layers.4.mlp.fc1": ("mlp.fc1", "4"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_split_at_its_layer(name):
    assert placed(name) == NAMES[name]


def llama(layers: int) -> dict[str, float | None]:
    return {
        f"model.layers.{i}.{m}": 1.0 + i + j
        for i in range(layers)
        for j, m in enumerate(("self_attn.q_proj", "mlp.up_proj"))
    }


def printed(grid, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=colours, color_system="truecolor" if colours else None)
    for table in grid.tables(console.width):
        console.print(table)
    return out.getvalue()


def test_layers_are_in_numeric_order_with_their_values():
    values = llama(12)
    (grid,) = grids(dict(sorted(values.items())), "x")  # "10" before "2"
    assert grid.layers == tuple(map(str, range(12)))
    lines = printed(grid).splitlines()
    assert lines[1].split() == ["mlp", "self_attn"]
    assert lines[2].split() == ["layer", "up_proj", "q_proj"]
    assert [line.split() for line in lines[3:]] == [[str(i), short(2.0 + i), short(1.0 + i)] for i in range(12)]


def test_seven_modules_fit_into_80_columns():
    names = (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    (grid,) = grids({f"model.layers.{i}.{m}": 0.123 for i in range(32) for m in names}, "x")
    assert "…" not in printed(grid)
    assert max(map(len, printed(grid).splitlines())) <= 80


def test_a_wide_map_is_split_into_tables_without_empty_layers():
    values = {f"down_blocks.{i}.attentions.0.{m}_{i % 2}": 1.5 for i in range(4) for m in "abcdefghij"}
    (grid,) = grids(values, "x")
    text = printed(grid)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("1.5") == 40
    assert text.count("layer") == 3
    assert "down 1.0" in text.split("layer")[3]
    assert "down 0.0" not in text.split("layer")[3]


def test_colours_span_the_range_of_values():
    dark, bright = colour(1, 1, 5), colour(5, 1, 5)
    assert sum(dark) < sum(colour(3, 1, 5)) < sum(bright)
    assert colour(9, 1, 5) == bright
    assert colour(2, 2, 2) == dark
    text = printed(grids(llama(3), "x")[0], colours=True)
    for r, g, b in (dark, bright):
        assert f"48;2;{r};{g};{b}" in text


def test_unknown_and_absent_values_look_different():
    (grid,) = grids({"layers.0.a": None, "layers.1.b": 1.0}, "x")
    first, second = (line.split() for line in printed(grid).splitlines()[-2:])
    assert (first, second) == (["0", "?"], ["1", "1"])


def test_each_part_of_a_pipeline_has_its_own_map():
    made = grids(
        {"unet.mid_block.resnets.0.conv1": 1.0, "text_encoder.text_model.encoder.layers.0.mlp.fc1": 2.0}, "norm"
    )
    assert [grid.title for grid in made] == ["norm, unet", "norm, text_encoder"]
    # GPT-2's is no pipeline
    assert [grid.title for grid in grids({"transformer.h.0.attn.c_attn": 1.0}, "norm")] == ["norm"]


def test_modules_of_equal_layers_do_not_collide():
    names = [f"{side}.block.{i}.layer.0.SelfAttention.q" for side in ("encoder", "decoder") for i in range(2)]
    (grid,) = grids({name: float(i) for i, name in enumerate(names)}, "x")
    assert sorted(grid.values.values()) == [0, 1, 2, 3]
    assert "encoder.block.1.layer.0" in grid.layers


def test_control_characters_are_replaced():
    (grid,) = grids({"layers.0.\x1b[31mevil": 1.0}, "x")
    assert "\x1b" not in printed(grid)
    assert literal("$a\x07") == "\\$a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (0.1234, "0.123"), (12.345, "12.3"), (0.00012, "1e-4"), (123456.0, "1e5")]
)
def test_values_are_formatted_in_six_characters(value, text):
    assert short(value) == text


def test_the_ending_determines_the_image_format(tmp_path):
    made = grids({**llama(4), "lm_head": None, "layers.0.$x_{": 2.0}, "x $")
    assert plot(made, tmp_path / "a.png", "t$").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in plot(made, tmp_path / "a.svg", "t").read_text()[:1000]
    with pytest.raises(ConfigError, match=r"expected a file name ending in \.png or \.svg"):
        kind_of(tmp_path / "a.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]
