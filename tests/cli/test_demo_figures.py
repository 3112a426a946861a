"""The figures of the image demo as a table and sentences."""

from __future__ import annotations

from rich.console import Console

from lorakit.cli.shared.demo_figures import lines, table
from lorakit.reproduce.demo_image import ImageOutcome, Trained

FIGURES = {
    "style": {"distance": {"0": 0.4, "0.5": 0.3, "1": 0.1}, "objects": {"0": 1.0, "0.5": 0.98, "1": 0.875}},
    "subject": {
        "recognized": {"base": 0.0, "subject": 0.94},
        "kinds_of_animals": {"base": ["cat", "dog", "owl"], "with prior": ["cat", "dog"], "without prior": None},
        "samples": 32,
    },
    "slider": {"area": {"-2": 0.2, "0": 0.4, "2": 0.5}},
    "stacked": {"weights": {"subject": 1.0, "style": 0.7}, "recognized": 0.5},
}
FILES = {"diffusers": "out/style/adapter/pytorch_lora_weights.safetensors", "kohya": "out/kohya/style.safetensors"}
OUTCOME = ImageOutcome([Trained("style", FILES, 12.3)], FIGURES, "out/merged", 1, "out/demo.png", 99.6)


def test_every_figure_is_in_the_table():
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(OUTCOME))
    text = captured.get()
    shares = ("100 %  75 %  25 %", "100 %  98 %  88 %", "0 %  94 %", "20 %  40 %  50 %", "50 %")
    for shown in (*shares, "subject 1, style 0.7"):
        assert shown in text
    assert "3  2" in text  # kinds; what was not measured is left out
    assert "without prior" not in text


def test_the_sentences_name_the_files_and_the_difference():
    text = "\n".join(lines(OUTCOME))
    for shown in ("1 of 255", "style 12 s", "out/kohya/style.safetensors", "out/demo.png", "100 s in all"):
        assert shown in text
