"""diffusers' LoRA files: what diffusers makes of ours, what we make of its own, and every spelling of them."""

from __future__ import annotations

import json

import diffusers as hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lorakit as lk
from lorakit import formats
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError
from lorakit.formats import diffusers, spellings

STRENGTHS = ((2, 1.0), (3, 4.0), (4, 6.5), (4, 2.0), (4, 4.0))  # rank and alpha, mixed over the modules


def clip(kind=CLIPTextModel):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=10,
        projection_dim=12,
        bos_token_id=1,
        eos_token_id=2,
    )
    return kind(config)


def unet(**more):
    torch.manual_seed(0)
    return hub.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )


def flux():
    torch.manual_seed(0)
    return hub.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


def stable_diffusion():
    parts = {"vae": None, "tokenizer": None, "scheduler": None, "safety_checker": None, "feature_extractor": None}
    return hub.StableDiffusionPipeline(unet=unet(), text_encoder=clip(), requires_safety_checker=False, **parts)


def full_name(component: str, name: str) -> str:
    """As an `Adapter` has it: CLIP's layers are below `text_model` whatever transformers' version."""
    layers = component.startswith("text_encoder") and name.startswith("encoder.")
    return f"{component}.text_model.{name}" if layers else f"{component}.{name}"


def adapter_for(components: dict[str, nn.Module], wanted=lambda name: True, dora: bool = False) -> lk.Adapter:
    made, factors = torch.Generator().manual_seed(1), {}
    for component, model in components.items():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and wanted(name):
                rank, alpha = STRENGTHS[len(factors) % len(STRENGTHS)]
                weight, ones = module.weight, (1,) * (module.weight.dim() - 2)
                A, B = (
                    torch.randn(rank, *weight.shape[1:], generator=made),
                    torch.randn(weight.shape[0], rank, *ones, generator=made),
                )
                f = lk.Factors(A, B, alpha, "conv" if weight.dim() > 2 else "linear")
                factors[full_name(component, name)] = (
                    Dora(f, torch.rand(weight.shape[0], 1, generator=made) + 0.5) if dora else f
                )
    return lk.Adapter(lk.LoraConfig(rank=4, alpha=4), factors)


def exact(f: lk.Factors) -> torch.Tensor:
    """ΔW in float64."""
    return f.alpha / f.rank * torch.einsum("or,r...->o...", f.B.double().flatten(1), f.A.double())


def applied(components: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The ΔW that PEFT's layers in the models now compute, by the module's name."""
    return {
        full_name(component, name): module.get_delta_weight(module.active_adapters[0]).detach().double()
        for component, model in components.items()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_applied(found: dict[str, torch.Tensor], adapter: lk.Adapter) -> None:
    assert found.keys() == adapter.factors.keys()
    for module, f in adapter.factors.items():
        torch.testing.assert_close(
            found[module], exact(f), atol=1e-5, rtol=1e-5, msg=lambda text, m=module: f"{m}: {text}"
        )


@pytest.mark.parametrize("fold", [False, True], ids=["alphas in the header", "alphas in the ups"])
def test_diffusers_gives_every_module_of_a_pipeline_its_own_strength(fold, tmp_path):
    pipe = stable_diffusion()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = adapter_for(models)
    assert len({f.scale for f in adapter.factors.values()}) > 3
    path = diffusers.write(adapter, tmp_path, fold=fold)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert all(".text_model." in key for key in load_file(path) if key.startswith("text_encoder."))
    pipe.load_lora_weights(str(tmp_path))
    assert_applied(applied(models), adapter)


def test_without_its_header_diffusers_would_lose_the_alphas_that_folding_keeps(tmp_path):
    adapter = adapter_for({"unet": unet()})
    for fold in (False, True):
        pipe = stable_diffusion()
        pipe.load_lora_weights(load_file(diffusers.write(adapter, tmp_path, fold=fold)))  # tensors alone
        found = applied({"unet": pipe.unet})
        off = [
            module for module, f in adapter.factors.items() if not torch.allclose(found[module], exact(f), atol=1e-5)
        ]
        assert bool(off) != fold


def test_a_text_encoder_adapted_in_its_mlp_alone_loads_in_diffusers(tmp_path):
    pipe = stable_diffusion()
    adapter = adapter_for({"text_encoder": pipe.text_encoder}, lambda name: name.endswith("fc1"))
    pipe.load_lora_weights(str(diffusers.write(adapter, tmp_path).parent))
    assert_applied(applied({"text_encoder": pipe.text_encoder}), adapter)


def test_both_text_encoders_of_sdxl_get_their_own(tmp_path):
    second = clip(CLIPTextModelWithProjection)
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 36,
    }
    parts = {"vae": None, "tokenizer": None, "tokenizer_2": None, "scheduler": None}
    pipe = hub.StableDiffusionXLPipeline(unet=unet(**more), text_encoder=clip(), text_encoder_2=second, **parts)
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    adapter = adapter_for(models, lambda name: name.endswith(("to_q", "q_proj", "fc2", "text_projection")))
    pipe.load_lora_weights(str(diffusers.write(adapter, tmp_path).parent))
    found = {
        m.replace("text_encoder_2.text_model.text_projection", "text_encoder_2.text_projection"): d
        for m, d in applied(models).items()
    }
    assert_applied(found, adapter)


def test_a_name_that_others_end_in_keeps_its_own_strength_in_a_transformer(tmp_path):
    model = flux()
    adapter = adapter_for({"transformer": model})
    outs = [f.scale for module, f in adapter.factors.items() if module.endswith("proj_out")]
    assert len(set(outs)) > 1  # "proj_out" and "single_transformer_blocks.0.proj_out"
    path = diffusers.write(adapter, tmp_path)
    model.load_lora_adapter(str(path.parent), prefix="transformer", weight_name=path.name)
    assert_applied(applied({"transformer": model}), adapter)


def test_a_dora_is_the_same_weight_in_diffusers(tmp_path):
    pipe = stable_diffusion()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = adapter_for(models, lambda name: name.endswith(("to_q", "q_proj", "fc1", "conv1")), dora=True)
    before = {
        full_name(c, n): m.weight.detach().double().clone()
        for c, model in models.items()
        for n, m in model.named_modules()
        if full_name(c, n) in adapter.factors
    }
    pipe.load_lora_weights(str(diffusers.write(adapter, tmp_path).parent))
    pipe.fuse_lora()
    again = lk.Adapter.load(tmp_path)
    for component, model in models.items():
        for name, module in model.named_modules():
            full = full_name(component, name.removesuffix(".base_layer"))
            if name.endswith(".base_layer") and full in adapter.factors:
                f = adapter.factors[full]
                direction = before[full] + exact(f)
                norm = direction.flatten(1).norm(dim=1)
                magnitude = adapter.updates[full].magnitude
                scale = (magnitude.double().flatten() / norm).reshape(-1, *[1] * (direction.dim() - 1))
                torch.testing.assert_close(module.weight.detach().double(), scale * direction, atol=1e-5, rtol=1e-5)
                assert torch.equal(again.updates[full].magnitude, magnitude)
                before.pop(full)
    assert not before


@pytest.mark.parametrize("spelled", ["peft", "diffusers"])
def test_what_diffusers_writes_is_read_with_every_strength(spelled, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    pipe = stable_diffusion()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers, notes = {}, {}
    for (component, model), targets in zip(models.items(), (["to_q", "to_out.0", "conv1"], ["q_proj", "out_proj"])):
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=targets,
            init_lora_weights=False,
            rank_pattern={r".*\.0\..*(to|out)_.*": 2},
            alpha_pattern={targets[0]: 3},
            use_rslora=component == "unet",
        )
        # by peft alone: transformers' add_adapter may ask for a peft that is not out yet
        inject_adapter_in_model(config, model)
        state = get_peft_model_state_dict(model, adapter_name="default")
        layers[component] = state if spelled == "peft" else convert_state_dict_to_diffusers(state)
        notes[component] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=notes["unet"],
        text_encoder_lora_adapter_metadata=notes["text_encoder"],
    )
    theirs, adapter = applied(models), lk.Adapter.load(tmp_path)
    assert adapter.factors.keys() == theirs.keys()
    assert len({f.scale for f in adapter.factors.values()}) > 3
    for module, delta in theirs.items():
        torch.testing.assert_close(adapter.factors[module].delta().double(), delta, atol=1e-5, rtol=1e-5)
    again = lk.Adapter.load(adapter.save(tmp_path / "again.safetensors", "diffusers"))
    for module, delta in theirs.items():
        torch.testing.assert_close(again.factors[module].delta().double(), delta, atol=1e-5, rtol=1e-5)


def test_without_any_alpha_the_strength_is_diffusers_own_of_one(tmp_path):
    adapter = adapter_for({"unet": unet()})
    path = diffusers.write(adapter, tmp_path)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    again = lk.Adapter.load(tmp_path / "bare.safetensors")
    assert {f.scale for f in again.factors.values()} == {1.0}
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(tmp_path), weight_name="bare.safetensors")
    assert_applied(applied({"unet": pipe.unet}), again)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = "encoder.layers.1.self_attn"


@pytest.mark.parametrize(
    "down, up, module",
    [
        (f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight", f"unet.{ATTENTION}.to_q"),
        (f"unet.{ATTENTION}.to_q.lora.down.weight", f"unet.{ATTENTION}.to_q.lora.up.weight", f"unet.{ATTENTION}.to_q"),
        (f"unet.{ATTENTION}.to_q.lora_down.weight", f"unet.{ATTENTION}.to_q.lora_up.weight", f"unet.{ATTENTION}.to_q"),
        (
            f"unet.{ATTENTION}.to_q.lora_A.default.weight",
            f"unet.{ATTENTION}.to_q.lora_B.default.weight",
            f"unet.{ATTENTION}.to_q",
        ),
        (
            f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
            f"unet.{ATTENTION}.processor.to_q_lora.up.weight",
            f"unet.{ATTENTION}.to_q",
        ),
        (
            f"{ATTENTION}.processor.to_out_lora.down.weight",
            f"{ATTENTION}.processor.to_out_lora.up.weight",
            f"unet.{ATTENTION}.to_out.0",
        ),
        (
            f"base_model.model.{ATTENTION}.to_k.lora_A.weight",
            f"base_model.model.{ATTENTION}.to_k.lora_B.weight",
            f"unet.{ATTENTION}.to_k",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
            "transformer.transformer_blocks.0.attn.to_q",
        ),
        (
            "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
            "diffusion_model.transformer_blocks.0.attn.to_q.lora_B.weight",
            "transformer.transformer_blocks.0.attn.to_q",
        ),
        (
            f"text_encoder.text_model.{LAYER}.q_proj.lora_linear_layer.down.weight",
            f"text_encoder.text_model.{LAYER}.q_proj.lora_linear_layer.up.weight",
            f"text_encoder.text_model.{LAYER}.q_proj",
        ),
        (
            f"text_encoder_2.{LAYER}.q_proj.lora_A.weight",
            f"text_encoder_2.{LAYER}.q_proj.lora_B.weight",
            f"text_encoder_2.text_model.{LAYER}.q_proj",
        ),
        (
            f"text_encoder.text_model.{LAYER}.to_out_lora.down.weight",
            f"text_encoder.text_model.{LAYER}.to_out_lora.up.weight",
            f"text_encoder.text_model.{LAYER}.out_proj",
        ),
    ],
)
def test_every_spelling_is_the_same_adapter(down, up, module, tmp_path):
    torch.manual_seed(0)
    A, B = torch.randn(3, 8), torch.randn(5, 3)
    save_file({down: A, up: B}, tmp_path / "x.safetensors")
    assert formats.format_of(tmp_path / "x.safetensors") == "diffusers"
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    assert list(adapter.factors) == [module]
    assert torch.equal(adapter.factors[module].delta(), B @ A)
    again = lk.Adapter.load(adapter.save(tmp_path / "again.safetensors", "diffusers"))
    assert torch.equal(again.factors[module].delta(), B @ A)


def test_a_file_of_one_model_without_names_in_front_takes_its_model_from_its_other_keys(tmp_path):
    pair = {"lora_A.weight": torch.randn(2, 4), "lora_B.weight": torch.randn(6, 2)}
    both = {
        f"{m}.{half}": t.clone()
        for m in ("transformer_blocks.0.attn.to_q", "norm_out.linear")
        for half, t in pair.items()
    }
    save_file(
        both,
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}})},
    )
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    assert {m: f.scale for m, f in adapter.factors.items()} == {
        "transformer.transformer_blocks.0.attn.to_q": 0.5,
        "transformer.norm_out.linear": 4.0,
    }


def test_alphas_magnitudes_and_a_tucker_core_behind_dotted_names_are_kept(tmp_path):
    torch.manual_seed(0)
    name = "unet.down_blocks.0.resnets.0.conv1"
    down, mid, up = torch.randn(2, 8, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(6, 3, 1, 1)
    linear = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.5),
        f"{linear}.lora_A.weight": torch.randn(2, 8),
        f"{linear}.lora_B.weight": torch.randn(6, 2),
        f"{linear}.dora_scale": torch.rand(6, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 9})})
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    expected = (
        1.5 / 3 * torch.einsum("oi,ijkl,jy->oykl", up.double().flatten(1), mid.double(), down.double().flatten(1))
    )
    torch.testing.assert_close(adapter.factors[name].delta().double(), expected, atol=1e-5, rtol=1e-5)
    assert adapter.factors[linear].alpha == 9
    assert torch.equal(adapter.updates[linear].magnitude, tensors[f"{linear}.dora_scale"])


def test_comfyui_own_paths_are_the_modules_that_kohya_has_for_them(tmp_path):
    torch.manual_seed(0)
    A, B = torch.randn(2, 3072), torch.randn(9216, 2)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "x.safetensors",
    )
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    rows = [adapter.factors[f"transformer.transformer_blocks.0.attn.{x}"].delta() for x in ("to_q", "to_k", "to_v")]
    torch.testing.assert_close(torch.cat(rows), 0.5 * B @ A)


def test_the_native_paths_of_an_unknown_model_stay_as_they_are(tmp_path):
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    save_file(
        {"diffusion_model.blocks.0.x.q.lora_A.weight": A, "diffusion_model.blocks.0.x.q.lora_B.weight": B},
        tmp_path / "x.safetensors",
    )
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    assert list(adapter.factors) == ["diffusion_model.blocks.0.x.q"]
    assert diffusers.losses(adapter) == []
    for again in (adapter.save(tmp_path / "again.safetensors", "diffusers"), tmp_path / "x.safetensors"):
        tensors = load_file(again)
        assert tensors.keys() == {f"diffusion_model.blocks.0.x.q.lora_{half}.weight" for half in "AB"}
        assert torch.equal(tensors["diffusion_model.blocks.0.x.q.lora_A.weight"], A)


def test_a_language_models_keys_are_not_taken_for_a_pipelines():
    for path in (
        "transformer.h.0.attn.c_attn",
        "model.layers.0.self_attn.q_proj",
        "transformer.encoder.layers.0.self_attention.dense",
    ):
        assert not spellings.is_spelling(f"base_model.model.{path}.lora_A.weight")


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = torch.ones(2, 4), torch.ones(6, 2)


@pytest.mark.parametrize(
    "tensors, header, said",
    [
        ({f"{Q}.lora_A.weight": A}, {}, f"{Q}.lora_up.weight' is missing"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora_B.bias": A[0]}, {}, "lora_B.bias' is no part"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora.down.weight": A, f"{Q}.lora_B.weight": B},
            {},
            "a second lora_down.weight",
        ),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": torch.ones(6, 3)}, {}, "do not fit together"),
        ({f"{Q}.lora_A.weight": A[0], f"{Q}.lora_B.weight": B}, {}, "expected matrices"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": A}, {}, "expected one number"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": torch.tensor(-1.0)}, {}, "alpha is -1.0"),
        ({f"{Q}.lora_A.weight": A * float("nan"), f"{Q}.lora_B.weight": B}, {}, "not finite"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, "elsewhere.lora_A.weight": A},
            {},
            "does not name its model",
        ),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, {"lora_adapter_metadata": "{"}, "not JSON"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'},
            "the alpha 'x'",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B},
            {"lora_adapter_metadata": '{"unet.alpha_pattern": 3}'},
            "expected an object",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B},
            {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 3}}'},
            "no regular expression",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B},
            {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(a+)+": 3}}'},
            "could take forever",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_the_key_at_fault(tensors, header, said, tmp_path):
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "x.safetensors", header or None)
    with pytest.raises(AdapterError, match=r"x\.safetensors") as caught:
        lk.Adapter.load(tmp_path / "x.safetensors", format="diffusers")
    assert said in str(caught.value)


def test_what_it_cannot_hold_is_listed_and_not_written(tmp_path):
    f = lk.Factors(A, B, 2.0)
    dora = Dora(f, torch.ones(6, 1))
    adapter = lk.Adapter(
        lk.LoraConfig(),
        {
            Q: dora,
            Q.replace("to_q", "to_k"): f,
            "model.layers.0.q": f,
            "unet.c": Dora(lk.Factors(A, B, 2.0), torch.ones(1, 4)),
            "unet.conv_out": Dense(torch.ones(2, 2)),
        },
        saved={"unet.conv_in.bias": torch.ones(2)},
        embeddings={"<s1>": torch.ones(3)},
    )
    lines = diffusers.losses(adapter)
    for said in (
        "all modules of a component DoRA or none",
        "with a component in front",
        "per output only",
        "no saved weights",
        "<s1>",
        "low-rank factors only",
    ):
        assert sum(said in line for line in lines) == 1, said
    with pytest.raises(AdapterError, match="cannot hold all of this adapter"):
        diffusers.write(adapter, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    assert diffusers.losses(lk.Adapter(lk.LoraConfig(), {Q: f})) == []


def test_folding_a_strength_that_half_precision_would_round_is_exact(tmp_path):
    torch.manual_seed(0)
    f = lk.Factors(torch.randn(3, 4).half(), torch.randn(6, 3).half(), 1.0)
    path = diffusers.write(lk.Adapter(lk.LoraConfig(), {Q: f}), tmp_path / "x.safetensors", fold=True)
    again = lk.Adapter.load(path).factors[Q]
    assert again.scale == 1
    torch.testing.assert_close(exact(again), exact(f), atol=0, rtol=3e-7)


def test_a_header_that_names_every_module_is_read_in_no_time(tmp_path):
    import time

    modules = [
        f"unet.up_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn1.to_q"
        for i in range(8)
        for j in range(8)
        for k in range(32)
    ]
    factors = {m: lk.Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0 + n % 7) for n, m in enumerate(modules)}
    path = diffusers.write(lk.Adapter(lk.LoraConfig(), factors), tmp_path, fold=False)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    start = time.process_time()  # of this process: others may have the machine
    again = diffusers.read(path, tensors, header)
    # matching 2,048 modules with 1,755 keys as regular expressions takes minutes
    assert time.process_time() - start < 5
    assert {m: f.alpha for m, f in again.factors.items()} == {m: f.alpha for m, f in factors.items()}
