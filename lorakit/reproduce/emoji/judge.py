"""A small classifier that says which object and which background it sees: what makes samples a number.

It knows all emoji of the sheet, also those that the base model never sees, so that it can judge a subject LoRA, and
objects in other styles (of a styled picture it learns the object only).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .captions import BACKGROUNDS, emoji_list
from .pictures import scenes

WIDTHS = (32, 64, 128, 192)


class Judge(nn.Module):
    """Pictures [n, 3, 32, 32] in -1..1 to logits of objects [n, 72] and of backgrounds [n, 16]."""

    def __init__(self, things: int, backgrounds: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        steps = zip((3, *widths), widths, strict=False)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if n == 0 else 2, padding=1) for n, (a, b) in enumerate(steps)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.thing = nn.Linear(2 * widths[-1], things)
        self.background = nn.Linear(2 * widths[-1], backgrounds)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        hidden = pictures
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.silu(norm(layer(hidden)))
        features = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], 1)
        return self.thing(features), self.background(features)


@torch.no_grad()
def measure_on_real_pictures(model: nn.Module, count: int = 512) -> dict[str, float]:
    """Shares of real pictures, of any pair, whose object and background the judge names right."""
    batch = scenes("validation", 1, count, held=True)
    things, backgrounds = (logits.argmax(1) for logits in model(batch.pictures))
    return {
        "object": (things == batch.things).float().mean().item(),
        "background": (backgrounds == batch.backgrounds).float().mean().item(),
    }


def save_judge(model: Judge, folder: Path) -> None:
    """judge.safetensors (fp16) and judge.json (the names of the logits)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / "judge.safetensors")
    widths = [layer.out_channels for layer in model.layers]
    names = {"objects": [emoji.word for emoji in emoji_list()], "backgrounds": list(BACKGROUNDS), "widths": widths}
    (folder / "judge.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf8")


def load_judge(folder: Path) -> Judge:
    names = json.loads((folder / "judge.json").read_text(encoding="utf8"))
    model = Judge(len(names["objects"]), len(names["backgrounds"]), tuple(names["widths"]))
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "judge.safetensors").items()})
    return model.eval()
