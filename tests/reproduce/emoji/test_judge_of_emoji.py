"""The judge's file holds what it saw, and its names."""

from __future__ import annotations

import json

import torch

from lorakit.reproduce.emoji.captions import BACKGROUNDS, emoji_list
from lorakit.reproduce.emoji.judge import Judge, load_judge, measure_on_real_pictures, save_judge


def test_a_saved_judge_judges_the_same(tmp_path):
    torch.manual_seed(0)
    judge = Judge(len(emoji_list()), len(BACKGROUNDS), (8, 16)).eval()
    save_judge(judge, tmp_path)
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        for one, other in zip(judge(pictures), load_judge(tmp_path)(pictures), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)  # the file has 16 bits
    assert json.loads((tmp_path / "judge.json").read_text())["objects"][0] == emoji_list()[0].word


def test_an_untrained_judge_guesses():
    torch.manual_seed(0)
    shares = measure_on_real_pictures(Judge(len(emoji_list()), len(BACKGROUNDS), (8, 16)).eval(), count=64)
    assert shares["object"] < 0.2
    assert shares["background"] < 0.4
