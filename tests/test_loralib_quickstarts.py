"""loralib's own README, run with only its import line changed; and each row of docs/loralib.md's PEFT table, beside
PEFT.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import textwrap
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
import lorakit.loralib as lora

DOCS = Path(__file__).parent.parent / "docs" / "loralib.md"


def loralib_snippets() -> list[str]:
    # As text: where the backport `importlib_metadata` is imported too, its parser answers, in which it is no payload.
    readme = importlib.metadata.distribution("loralib").read_text("METADATA")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", readme, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(b).replace("import loralib as lora", "import lorakit.loralib as lora") for b in blocks]


class BigModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = lora.Linear(8, 8, r=2)
        self.norm = nn.LayerNorm(8)


def test_every_snippet_of_loralibs_readme_runs_with_its_import_line_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained = {"layer.weight": torch.randn(8, 8), "layer.bias": torch.randn(8), "norm.weight": torch.randn(8)}
    torch.save(pretrained, "ckpt_pretrained.pt")
    torch.save({"layer.lora_A": torch.ones(2, 8), "layer.lora_B": torch.ones(8, 2)}, "ckpt_lora.pt")
    space = {
        "in_features": 768,
        "out_features": 768,
        "d_model": 16,
        "nn": nn,
        "torch": torch,
        "lora": lora,
        "BigModel": BigModel,
        "dataloader": [1, 2],
        "checkpoint_path": "saved.pt",
    }
    snippets = loralib_snippets()
    assert len(snippets) == 6
    layer, training, saving, loading, packed, biases = snippets

    exec(layer, space)
    assert type(space["layer"]) is lora.Linear
    assert (space["layer"].r, space["layer"].lora_B.shape) == (16, (768, 16))

    exec(training, space)
    model = space["model"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"layer.lora_A", "layer.lora_B"}

    exec(saving, space)
    assert set(torch.load("saved.pt")) == {"layer.lora_A", "layer.lora_B"}

    exec(loading, space)
    assert torch.equal(model.layer.weight, pretrained["layer.weight"])
    assert torch.equal(model.layer.lora_B, torch.ones(8, 2))

    exec(packed, space)
    assert space["qkv_proj"].lora_B.shape == (32, 8)
    x = torch.randn(3, 16)
    assert torch.equal(space["qkv_proj"](x), nn.functional.linear(x, space["qkv_proj"].weight, space["qkv_proj"].bias))

    exec(biases, space)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"layer.weight", "norm.weight"}
    assert set(torch.load("saved.pt")) == {"layer.lora_A", "layer.lora_B", "layer.bias", "norm.bias"}


def translations() -> list[tuple[str, str]]:
    table = DOCS.read_text(encoding="utf8").split("| PEFT | lorakit |\n|---|---|\n")[1].split("\n\n")[0]
    return [tuple(cell.strip().strip("`") for cell in row.strip("|").split(" | ")) for row in table.splitlines()]  # type: ignore[misc]


@pytest.fixture
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].replace("base_layer.", "")):
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def other_adapter(model: nn.Module, folder: Path) -> None:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    randomise(wrapped, seed=2)
    wrapped.save_pretrained(folder)


def test_every_row_of_the_peft_table_gives_the_same_logits_in_both(base, tmp_path, monkeypatch, capsys):
    ids = torch.arange(10).view(1, 10)
    other_adapter(copy.deepcopy(base), tmp_path / "theirs" / "other")
    other_adapter(copy.deepcopy(base), tmp_path / "ours" / "other")
    spaces = {
        "theirs": {"LoraConfig": peft.LoraConfig, "get_peft_model": peft.get_peft_model, "PeftModel": peft.PeftModel},
        "ours": {"lk": lk},
    }
    for space in spaces.values():
        space |= {"model": copy.deepcopy(base), "base": copy.deepcopy(base), "ids": ids}
    rows = translations()
    assert len(rows) == 13
    seen = []
    for row in rows:
        logits = {}
        for side, code in zip(spaces, row, strict=True):
            monkeypatch.chdir(tmp_path / side)
            exec(code, spaces[side])
            if row[0].startswith("model = get_peft_model"):
                randomise(spaces[side]["model"], seed=1)
            with torch.no_grad():
                logits[side] = spaces[side]["model"].eval()(ids).logits
        torch.testing.assert_close(
            logits["ours"], logits["theirs"], atol=1e-5, rtol=0, msg=lambda m, row=row: f"{row}\n{m}"
        )
        seen.append(logits["ours"])
        if "print" in row[0]:
            theirs, ours = capsys.readouterr().out.split("\n", 1)
            assert theirs.split("||")[0].split(":")[1].strip() == ours.split()[0]
    plain = [spaces[side]["plain"].logits for side in spaces]
    torch.testing.assert_close(plain[0], plain[1])

    # That the rows did what they say: fresh, the first adapter, the second, the first again, their mix...
    fresh, first, second, mix = seen[0], seen[1], seen[5], seen[8]
    different = [fresh, first, second, mix]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(different) for b in different[:i])
    for again in (4, 6, 7, 11, 12):
        torch.testing.assert_close(seen[again], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain[1], fresh)
    assert torch.equal(seen[10], mix)  # unmerged
    assert type(spaces["ours"]["model"]) is type(spaces["theirs"]["model"]) is type(base)
