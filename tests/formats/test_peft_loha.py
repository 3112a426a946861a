"""PEFT's LoHa folder, both ways, with the real PEFT as the judge."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapter.loha import Loha
from lorakit.errors import AdapterError
from lorakit.formats import losses
from lorakit.formats.convert import convert
from lorakit.formats.peft import CONFIG, WEIGHTS

TIGHT = {"atol": 2e-5, "rtol": 1e-5}
CASES = {
    "llama": (tiny.llama, {"targets": "all-linear", "task": "CAUSAL_LM"}),
    "ranks and alphas": (
        tiny.llama,
        {
            "targets": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        },
    ),
    "bert, its head saved": (
        tiny.bert,
        {"targets": ["query", "value"], "save_modules": ["classifier"], "task": "SEQ_CLS"},
    ),
    "convolutions": (lambda: tiny.cnn(dilation=1), {"targets": ["conv1", "conv2", "head"]}),
    "grouped convolutions": (lambda: tiny.cnn(groups=2, dilation=1), {"targets": ["conv2"]}),
}


def ours(make, settings) -> tuple[torch.nn.Module, lk.Adapter]:
    model = lk.attach(make(), lk.LoraConfig(variant="loha", rank=3, alpha=5, **settings))
    tiny.randomise_factors(model)
    return model.eval(), lk.capture(model)


@pytest.mark.parametrize("case", CASES)
def test_trained_here_it_gives_the_same_in_peft(case, tmp_path):
    make, settings = CASES[case]
    model, adapter = ours(make, settings)
    adapter.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), **TIGHT)
    assert (tiny.logits(theirs) - tiny.logits(make().eval())).abs().max() > 1e-3
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= {
        f.name for f in peft.LoHaConfig.__dataclass_fields__.values()
    }


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_trained_in_peft_it_gives_the_same_here_and_comes_back_the_same(case, effective, tmp_path):
    make, settings = CASES[case]
    if settings["targets"] == "all-linear":
        settings = settings | {"targets": ["q_proj", "up_proj"]}
    torch.manual_seed(1)
    config = peft.LoHaConfig(
        r=3,
        alpha=5,
        target_modules=settings["targets"],
        init_weights=False,
        modules_to_save=settings.get("save_modules"),
        rank_pattern=settings.get("rank_pattern", {}),
        use_effective_conv2d=effective,
        task_type=settings.get("task"),
    )
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert {type(u) for u in adapter.updates.values()} == {Loha}
    assert adapter.config.variant == "loha"
    model = lk.attach(make(), adapter).eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)
    lk.capture(model).save(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "again").eval()
    torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), **TIGHT)


def test_peft_starts_it_as_we_do():
    model = lk.attach(tiny.mlp(), lk.LoraConfig(variant="loha", rank=3, targets=["lin0"]))
    mine = lk.capture(model).updates["lin0"].tensors()
    theirs = peft.get_peft_model(tiny.mlp(), peft.LoHaConfig(r=3, target_modules=["lin0"])).base_model.model.lin0
    for name, t in mine.items():
        other = getattr(theirs, f"hada_{name[:2]}_{name[2]}")["default"]
        assert t.shape == other.shape
        assert bool(t.any()) == bool(other.any())


def test_what_the_folder_cannot_hold_is_listed(tmp_path):
    _, adapter = ours(tiny.bert, {"targets": ["query"], "bias": "lora_only"})
    assert "trained biases" in "\n".join(losses(adapter, "peft"))
    with pytest.raises(AdapterError, match="trained biases"):
        adapter.save(tmp_path / "out")
    low = lk.Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    w = torch.ones(4, 2)
    mixed = lk.Adapter(lk.LoraConfig(targets=["a", "b"]), {"a": low, "b": Loha(w, w.T, w, w.T, 1.0)})
    done = convert(mixed, tmp_path / "out", "peft", allow_loss=True)
    assert list(done.adapter.updates) == ["a"]


def test_kohyas_and_pefts_files_of_a_diffusion_model_hold_the_same(tmp_path):
    name = "unet.down_blocks.0.resnets.0.conv1"
    w = [torch.randn(*shape) for shape in ((320, 2), (2, 320 * 9), (320, 2), (2, 320 * 9))]
    value = lk.Adapter(
        lk.LoraConfig(variant="loha", rank=2, targets=["conv1"]), {name: Loha(*w, 1.0, shape=(320, 320, 3, 3))}
    )
    kohya = lk.Adapter.load(value.save(tmp_path / "x.safetensors", "kohya"))
    back = lk.Adapter.load(kohya.save(tmp_path / "peft"))
    for half, t in value.updates[name].tensors().items():
        assert torch.equal(back.updates[name].tensors()[half], t)
