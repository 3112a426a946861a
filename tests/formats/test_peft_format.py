"""PEFT's folder, both ways, with the real PEFT as the judge: what is trained on one side gives the same logits on the
other.
"""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.errors import StateError

TIGHT = {"atol": 2e-5, "rtol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore")


def tied():
    return tiny.llama(tied=True)


def cnn():
    return tiny.cnn(dilation=1)  # PEFT drops the dilation


def grouped():
    return tiny.cnn(groups=2, dilation=1)


PATTERNS = {"targets": ["q_proj", "k_proj", "down_proj"], "rank_pattern": {"q_proj": 2, r".*\.1\.mlp.*": 3}}
ALPHAS = {
    "targets": ["q_proj", "k_proj"],
    "alpha_pattern": {"layers.1.self_attn.q_proj": 40, "k_proj": 5},
    "rank_pattern": {"k_proj": 7},
}

# What lorakit and PEFT can both say: name -> (model, our settings). PEFT's are the same under its own names
# (`in_peft`).
CASES = {
    "llama all-linear": (tiny.llama, {"targets": "all-linear", "task": "CAUSAL_LM"}),
    "llama regex": (tiny.llama, {"targets": r".*layers\.1.*_proj"}),
    "llama layers": (tiny.llama, {"targets": ["q_proj"], "layers": [1]}),
    "llama exclude": (tiny.llama, {"targets": ["q_proj", "up_proj"], "exclude": ["0.self_attn.q_proj"]}),
    "rank pattern": (tiny.llama, PATTERNS),
    "alpha pattern": (tiny.llama, ALPHAS),
    "rslora": (tiny.llama, {"targets": ["v_proj"], "rslora": True, "rank_pattern": {"1.self_attn.v_proj": 2}}),
    "dropout": (tiny.llama, {"targets": ["v_proj"], "dropout": 0.3}),
    "gpt2": (tiny.gpt2, {"targets": ["c_attn", "c_proj"], "task": "CAUSAL_LM"}),
    "gpt2 all-linear": (tiny.gpt2, {"targets": "all-linear", "task": "CAUSAL_LM"}),
    "gpt2 with its head": (tiny.gpt2, {"targets": ["c_attn", "lm_head"]}),
    "gpt2 bias": (tiny.gpt2, {"targets": ["c_attn"], "bias": "all"}),
    "bert head": (tiny.bert, {"targets": ["query", "value"], "save_modules": ["classifier"], "task": "SEQ_CLS"}),
    "bert task alone": (tiny.bert, {"targets": "all-linear", "task": "SEQ_CLS"}),
    "bert container saved": (tiny.bert, {"targets": ["query", "dense"], "save_modules": ["pooler"]}),
    "bert norm saved": (tiny.bert, {"targets": ["query"], "save_modules": ["LayerNorm"]}),
    "bias all": (tiny.bert, {"targets": ["query"], "bias": "all"}),
    "bias lora_only": (tiny.bert, {"targets": ["query", "dense"], "bias": "lora_only"}),
    "bias all, head saved": (tiny.bert, {"targets": ["query"], "bias": "all", "save_modules": ["classifier"]}),
    "t5": (tiny.t5, {"targets": ["q", "v"], "task": "SEQ_2_SEQ_LM"}),
    "t5 all-linear": (tiny.t5, {"targets": "all-linear", "task": "SEQ_2_SEQ_LM"}),
    "cnn 1d 3d linear": (cnn, {"targets": ["conv1", "conv3", "head"]}),
    "cnn 2d": (cnn, {"targets": ["conv2"], "bias": "lora_only"}),
    "embedding": (tiny.embedder, {"targets": ["emb", "head"]}),
    "llama embedding": (tiny.llama, {"targets": ["embed_tokens", "q_proj"]}),
    "llama ends saved": (tiny.llama, {"targets": ["q_proj"], "save_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": (tied, {"targets": ["embed_tokens"]}),
    "tied head": (tied, {"targets": ["lm_head"]}),
    "tied both": (tied, {"targets": ["embed_tokens", "lm_head"]}),
    "tied saved": (tied, {"targets": ["q_proj"], "save_modules": ["embed_tokens"]}),
    "mlp saved": (tiny.mlp, {"targets": ["lin0"], "save_modules": ["lin1", "norm"]}),
}
# What PEFT has no words for, and reads all the same.
OURS_ALONE = {
    "grouped": (grouped, {"targets": ["conv2"]}),
    "packed": (tiny.gpt2, {"targets": ["c_attn", "c_fc"], "packed": {"c_attn": [True, False, True]}}),
    "packed rslora": (tiny.gpt2, {"targets": ["c_attn"], "packed": {"c_attn": [False, False, True]}, "rslora": True}),
    "packed linear": (
        tiny.llama,
        {
            "targets": ["up_proj", "q_proj"],
            "packed": {"up_proj": [True, True, False]},
            "rank_pattern": {"0.mlp.up_proj": 2},
        },
    ),
}
NAMES = {
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rslora": "use_rslora",
    "dropout": "lora_dropout",
    "save_modules": "modules_to_save",
    "task": "task_type",
}


def in_peft(case: str) -> dict:
    settings = {NAMES.get(k, k): v for k, v in CASES[case][1].items()}
    # "tied saved" is taken as PEFT has it by default: the embedding alone is trained, and the head stays the base's.
    return settings | ({"fan_in_fan_out": True} if CASES[case][0] is tiny.gpt2 else {})


def load_in_peft(model: nn.Module, folder) -> nn.Module:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    return loaded.eval()


@pytest.mark.parametrize("case", [*CASES, *OURS_ALONE])
def test_an_adapter_trained_here_gives_the_same_logits_in_peft(case, tmp_path):
    make, settings = (CASES | OURS_ALONE)[case]
    model = make()
    base = tiny.logits(model)
    lk.attach(model, lk.LoraConfig(**{"rank": 4, "alpha": 6} | settings))
    tiny.randomise_factors(model)
    ours = tiny.logits(model)
    lk.capture(model).save(tmp_path)
    torch.testing.assert_close(tiny.logits(load_in_peft(make(), tmp_path)), ours, **TIGHT)
    torch.testing.assert_close(tiny.logits(lk.attach(make(), lk.Adapter.load(tmp_path))), ours, **TIGHT)
    assert not torch.allclose(ours, base, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(case, tmp_path):
    make = CASES[case][0]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | in_peft(case))
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = tiny.logits(theirs)
    theirs.save_pretrained(tmp_path)
    model = make()
    base = tiny.logits(model)
    adapter = lk.Adapter.load(tmp_path)
    lk.attach(model, adapter)
    torch.testing.assert_close(tiny.logits(model), expected, **TIGHT)
    assert not torch.allclose(expected, base, atol=1e-3)
    # ... and once more round: captured, written by us, read by PEFT.
    lk.capture(model).save(tmp_path / "again")
    torch.testing.assert_close(tiny.logits(load_in_peft(make(), tmp_path / "again")), expected, **TIGHT)
    # ... and without a model in between.
    adapter.save(tmp_path / "converted")
    torch.testing.assert_close(tiny.logits(load_in_peft(make(), tmp_path / "converted")), expected, **TIGHT)


def test_pefts_tied_training_attaches_as_one_weight(tmp_path):
    """With ensure_weight_tying PEFT saves both ends."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(tied(), config).eval()
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.modules_to_save.default.weight.add_(0.3)
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = lk.attach(tied(), lk.Adapter.load(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)


def test_pefts_own_grouped_convolution_attaches_and_does_not_merge(tmp_path):
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        grouped(), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["conv2"])
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = lk.attach(grouped(), lk.Adapter.load(tmp_path))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)
    with pytest.raises(StateError, match="reads across the convolution's groups"):
        lk.merge(model)
    lk.capture(model).save(tmp_path / "again")
    torch.testing.assert_close(tiny.logits(load_in_peft(grouped(), tmp_path / "again")), tiny.logits(theirs), **TIGHT)


def test_conv_padding_modes_follow_the_base_where_peft_drops_them(tmp_path):
    """PEFT computes the update with zero padding; ours is that of the merged weight."""
    model = tiny.cnn()
    lk.attach(model, lk.LoraConfig(rank=4, targets=["conv2_circular"]))
    tiny.randomise_factors(model)
    before = tiny.logits(model)
    lk.merge(model)
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [{"packed": {"c_attn": [True, False, True]}, "targets": ["c_attn"]}, {"targets": "all-linear"}], ids=str
)
def test_what_is_written_is_read_back_equal(config, tmp_path, tiny_gpt2):
    lk.attach(
        tiny_gpt2,
        lk.LoraConfig(
            **config, rank=3, rslora=True, bias="lora_only", save_modules=["ln_f"], init="gaussian", base="some/base"
        ),
    )
    tiny.randomise_factors(tiny_gpt2)
    value = lk.capture(tiny_gpt2)
    value.save(tmp_path)
    again = lk.Adapter.load(tmp_path)
    assert list(again.factors) == sorted(value.factors)
    for m, f in value.factors.items():
        g = again.factors[m]
        assert torch.equal(f.A, g.A)
        assert torch.equal(f.B, g.B)
        assert (f.alpha, f.kind, f.rslora, f.transposed, f.parts, f.groups) == (
            g.alpha,
            g.kind,
            g.rslora,
            g.transposed,
            g.parts,
            g.groups,
        )
    assert {n: t.tolist() for n, t in again.saved.items()} == {n: t.tolist() for n, t in value.saved.items()}
    assert dict(again.metadata) == dict(value.metadata)
    assert (again.config.base, again.config.bias, again.config.init) == ("some/base", "lora_only", "gaussian")
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(tmp_path / "two")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}


def test_the_grouped_form_comes_back_compact(tmp_path):
    model = tiny.randomise_factors(lk.attach(grouped(), lk.LoraConfig(rank=3, targets=["conv2"])))
    lk.capture(model).save(tmp_path)
    f = lk.Adapter.load(tmp_path).factors["conv2"]
    assert (f.A.shape, f.rank, f.groups) == ((3, 2, 3, 2), 3, 2)
    again = lk.attach(grouped(), lk.Adapter.load(tmp_path))
    lk.merge(again)
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), **TIGHT)


def test_the_config_on_disk_is_laid_out_as_peft_does(tmp_path, tiny_llama):
    lk.capture(lk.attach(tiny_llama, lk.LoraConfig(rank=4, targets=["v_proj", "q_proj"], task="CAUSAL_LM"))).save(
        tmp_path
    )
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True)
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"], values["inference_mode"], values["peft_type"]) == (4, 32, True, "LORA")
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert set(values) <= known, "no key that another reader would choke on"


def test_the_weights_on_disk_hold_the_factors_and_nothing_else(tmp_path):
    """PEFT writes the frozen embedding beside a LoRA on it: gigabytes for nothing."""
    lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(rank=4, targets=["embed_tokens", "lm_head"]))).save(tmp_path)
    keys = {k: list(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert keys == {
        "base_model.model.model.embed_tokens.lora_embedding_A": [4, 48],
        "base_model.model.model.embed_tokens.lora_embedding_B": [16, 4],
        "base_model.model.lm_head.lora_A.weight": [4, 16],
        "base_model.model.lm_head.lora_B.weight": [48, 4],
    }


def test_adapters_written_in_another_precision_are_smaller_and_close(tmp_path, tiny_llama):
    value = lk.capture(tiny.randomise_factors(lk.attach(tiny_llama, lk.LoraConfig(rank=4))))
    value.save(tmp_path, dtype=torch.bfloat16)
    again = lk.Adapter.load(tmp_path)
    for m, f in value.factors.items():
        assert again.factors[m].A.dtype == torch.bfloat16
        torch.testing.assert_close(again.factors[m].A.float(), f.A, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        tiny.logits(lk.attach(tiny.llama(), again)), tiny.logits(tiny_llama), atol=0.05, rtol=0.05
    )


def test_a_pefts_named_adapter_loads_from_its_own_folder(tmp_path):
    theirs = peft.get_peft_model(
        tiny.mlp(), peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["lin0"]), adapter_name="sql"
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = lk.attach(tiny.mlp(), lk.Adapter.load(tmp_path / "sql"), name="sql")
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)


def test_saving_over_an_older_pickle_leaves_no_old_weights(tmp_path, tiny_mlp):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    lk.capture(lk.attach(tiny_mlp, lk.LoraConfig(rank=2))).save(tmp_path)
    assert not (tmp_path / "adapter_model.bin").exists()
    assert not list(tmp_path.glob(".*"))
