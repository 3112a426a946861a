"""Language models whose trunk is called "transformer" are no diffusion pipelines: cards, files, heat maps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

import lorakit as lk
from lorakit.analysis.heatmap import grids
from lorakit.cli.shared.loading import _check_for_text
from lorakit.errors import AdapterError
from lorakit.formats import diffusers, format_of
from lorakit.module_names import is_language_trunk
from lorakit.share import card_of

SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 40},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40},
    "codegen": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 40, "n_ctx": 16},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 40,
        "attention_types": [[["global"], 1]],
    },
    "gpt_bigcode": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
}


def trunk(architecture):
    """The model as a language model holds it: a module whose child `transformer` it is."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**SIZES[architecture]))


def adapter_for(architecture):
    model = trunk(architecture).to_empty(device="cpu")
    torch.nn.init.normal_(next(model.parameters()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return lk.capture(lk.attach(model, lk.LoraConfig(rank=2, task="CAUSAL_LM")))


@pytest.mark.parametrize("architecture", SIZES)
def test_every_module_of_such_a_model_is_a_language_models(architecture):
    names = [n for n, p in trunk(architecture).named_parameters() if n.startswith("transformer.")]
    assert names
    assert all(is_language_trunk(name.rpartition(".")[0]) for name in names), names


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_so_are_those_of_a_class_for_question_answering(family):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=40)
        model = getattr(transformers, f"{family}ForQuestionAnswering")(config)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert sum(name.startswith("transformer.") for name in names) == 8
    shared = {"transformer.layers.0.mlp.gate_proj", "transformer.layers.0.mlp.up_proj"}  # ERNIE-Image's are called so
    assert {name for name in names if not is_language_trunk(name)} == {"qa_outputs", *shared}
    adapter = lk.capture(
        lk.attach(getattr(transformers, f"{family}ForQuestionAnswering")(config), lk.LoraConfig(rank=2))
    )
    _check_for_text("adapter", adapter)  # by its other names it is a language model's


@pytest.mark.parametrize(
    "module",
    [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.3.proj_mlp",
        "transformer.blocks.0.attn1.to_q",  # Wan
        "transformer.blocks.0.ffn.net.0.proj",
        "transformer.layers.4.attention.to_q",  # Z-Image
        "transformer.x_embedder",
        "transformer.norm_out.linear",
        "unet.conv_in",
    ],
)
def test_a_pipelines_modules_are_not(module):
    assert not is_language_trunk(module)


@pytest.mark.parametrize("architecture", SIZES)
def test_its_card_is_a_language_models_and_diffusers_files_refuse_it(architecture, tmp_path):
    adapter = adapter_for(architecture)
    adapter.save(tmp_path / "adapter")
    text = card_of(tmp_path / "adapter").text
    assert "pipeline_tag: text-generation" in text
    assert "text-to-image" not in text
    assert "diffusers" not in text
    with pytest.raises(AdapterError, match="modules of a language model, whose trunk is called transformer"):
        adapter.save(tmp_path / "x.safetensors", format="diffusers")
    assert not (tmp_path / "x.safetensors").exists()
    assert len(diffusers.losses(adapter)) == 1
    assert format_of(tmp_path / "adapter") == "peft"


def test_its_heat_map_has_its_layers(tmp_path):
    (grid,) = grids({"transformer.blocks.0.attn.Wqkv": 1.0, "transformer.blocks.1.attn.Wqkv": 2.0}, "norm")
    assert grid.layers == ("0", "1")


def test_a_trunk_on_its_own_is_adapted_all_the_same():
    from transformers import CONFIG_MAPPING

    model = AutoModel.from_config(CONFIG_MAPPING["gpt2"](**SIZES["gpt2"]))
    assert next(iter(lk.capture(lk.attach(model, lk.LoraConfig(rank=2))).updates)).startswith("h.0.")
