"""lorakit's calls on a whole diffusers pipeline: names with components, real diffusers as the judge, errors."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import close, draw, models, tiny_sd1, tiny_sdxl, trained

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.checkpoint.merge import merge_checkpoint
from lorakit.errors import AdapterError, StateError, TargetError

ALL = {"sd1": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}
MAKE = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}


@pytest.fixture
def sd1():
    return tiny_sd1()


@pytest.fixture(params=MAKE)
def family(request):
    return request.param


def applied(pipe) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(m, BaseTunerLayer) for model in models(pipe) for m in model.modules())


def test_attach_gives_the_pipeline_back_and_detach_leaves_no_trace(family):
    pipe = MAKE[family]()
    as_module(pipe).requires_grad_(False)  # torch's own matmul rounds otherwise where weights require gradients
    before, classes = draw(pipe), [[type(m) for m in model.modules()] for model in models(pipe)]
    as_module(pipe).requires_grad_(True)
    keys = [list(model.state_dict()) for model in models(pipe)]
    flags = [[p.requires_grad for p in model.parameters()] for model in models(pipe)]
    assert lk.attach(pipe, lk.LoraConfig(rank=2, targets="locon", components=ALL[family])) is pipe
    assert torch.equal(draw(pipe), before)  # ΔW = 0
    assert not any(p.requires_grad for n, p in pipe.unet.named_parameters() if "lora_" not in n)
    assert lk.detach(pipe) is pipe
    assert [[type(m) for m in model.modules()] for model in models(pipe)] == classes
    assert [list(model.state_dict()) for model in models(pipe)] == keys
    assert [[p.requires_grad for p in model.parameters()] for model in models(pipe)] == flags
    as_module(pipe).requires_grad_(False)
    assert torch.equal(draw(pipe), before)
    assert not any(vars(o).get("save_pretrained") for o in (pipe, *models(pipe)))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_real_diffusers_draws_with_the_file_what_we_draw(family, format, tmp_path):
    pipe = MAKE[family]()
    adapter = trained(pipe, components=ALL[family], targets="locon", rank_pattern={"ff.net.2": 4})
    assert {m.partition(".")[0] for m in adapter.updates} == set(ALL[family])
    assert all(".text_model." in m for m in adapter.updates if m.startswith("text_encoder"))
    ours = draw(pipe)
    file = adapter.save(tmp_path / "it.safetensors", format=format)
    theirs = MAKE[family]()
    plain = draw(theirs)
    theirs.load_lora_weights(str(file))
    assert applied(theirs) == len(adapter.updates)
    close(draw(theirs), ours)
    assert (ours - plain).abs().max() > 0.01
    # ... and the file on a live pipeline of ours
    again = MAKE[family]()
    lk.attach(again, lk.Adapter.load(file))
    close(draw(again), ours)
    assert lk.capture(again).updates.keys() == adapter.updates.keys()


def test_every_component_alone_changes_the_picture(family):
    pipe = MAKE[family]()
    adapter, plain = trained(pipe, components=ALL[family]), draw(MAKE[family]())
    for component in ALL[family]:
        one = MAKE[family]()
        lk.attach(one, adapter.select(rf"{component}\..*"))
        assert (draw(one) - plain).abs().max() > 1e-4, component


def test_a_text_encoder_in_either_spelling_is_attached(sd1):
    adapter = trained(sd1, components=["text_encoder"])
    ours = draw(sd1)
    flat = adapter.rename({"text_encoder.text_model": "text_encoder"})
    other = tiny_sd1()
    lk.attach(other, flat)
    assert torch.equal(draw(other), ours)
    assert lk.capture(other).updates.keys() == flat.updates.keys()  # under its own names again
    twice = lk.combine([adapter, flat], force=True)
    with pytest.raises(AdapterError, match=r"two updates of the module 'text_encoder\.text_model"):
        lk.attach(tiny_sd1(), twice)


def test_a_part_of_a_pipeline_takes_the_pipelines_adapter_and_gives_it_back(sd1, tmp_path):
    adapter = trained(sd1)
    ours = draw(sd1)
    alone = tiny_sd1()
    lk.attach(alone.unet, adapter)
    assert torch.equal(draw(alone), ours)
    back = lk.capture(alone.unet)
    assert back.digest() == adapter.digest()
    back.save(tmp_path / "again.safetensors", format="kohya")
    words = trained(sd1, "words", components=["text_encoder"])
    lk.attach(alone.text_encoder, words)
    assert lk.capture(alone.text_encoder).digest() == words.digest()


def test_an_adapter_of_a_unet_alone_fits_the_pipeline(sd1):
    lk.attach(sd1.unet, lk.LoraConfig(rank=2, targets="kohya"))
    adapter = lk.capture(tiny.randomise_factors(sd1.unet, size=0.2))
    assert not any(m.startswith("unet.") for m in adapter.updates)
    ours, pipe = draw(sd1), tiny_sd1()
    lk.attach(pipe, adapter)
    assert torch.equal(draw(pipe), ours)
    assert lk.capture(pipe).digest() == adapter.digest()


def test_parts_that_both_fit_are_not_guessed():
    pipe = tiny_sdxl()
    adapter = trained(pipe, components=["text_encoder", "text_encoder_2"])
    with pytest.raises(TargetError, match=r"text_encoder and of text_encoder_2\n.*attach it to the pipeline"):
        lk.attach(tiny_sdxl().text_encoder, adapter)
    with pytest.raises(TargetError, match=r"adapter.rename\(\{'': 'text_encoder'\}\)"):
        lk.attach(tiny_sdxl(), adapter.select(r"text_encoder\..*").rename({"text_encoder": ""}))


def test_components_that_the_model_lacks_are_named(sd1):
    both = trained(tiny_sdxl(), components=["text_encoder", "text_encoder_2"])
    with pytest.raises(TargetError, match=r"12 of .* 24 .*\n.*no text_encoder_2, only unet, text_encoder; strict"):
        lk.attach(sd1, both)
    lk.attach(sd1, both, strict=False, force=True)
    assert len(lk.summary(sd1).skipped) == 12
    lk.detach(sd1)
    everything = trained(sd1, components=["unet", "text_encoder"])
    with pytest.raises(TargetError, match=r"pipeline's text_encoder: attach the adapter to the pipeline"):
        lk.attach(tiny_sd1().unet, everything)
    bare = tiny_sd1().unet
    lk.attach(bare, everything, strict=False)
    assert len(lk.capture(bare).updates) == 48


def test_another_base_is_noticed_by_component(sd1, tmp_path):
    adapter = trained(sd1, components=["unet", "text_encoder"])
    path = adapter.save(tmp_path / "it.safetensors", format="diffusers")
    loaded = lk.Adapter.load(path)
    assert loaded.metadata["fingerprint"] == adapter.metadata["fingerprint"]
    with pytest.raises(AdapterError, match=r"another base:\n  weights: "):
        lk.attach(tiny_sd1(seed=1), loaded)
    unet = loaded.select(r"unet\..*")
    mixed = tiny_sd1(seed=1)
    mixed.unet = tiny_sd1().unet
    lk.attach(mixed, unet)  # the text encoder is another one, which this adapter does not change
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(mixed, loaded.select(r"text_encoder\..*"), "words")
    for wrong in (tiny_sd1(seed=1).unet, tiny_sdxl().unet):
        with pytest.raises((AdapterError, TargetError)):
            lk.attach(wrong, unet)
    alone = tiny_sd1().unet
    lk.attach(alone, lk.LoraConfig(rank=2, targets="attention"))
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(tiny_sd1(seed=1), lk.capture(alone))


def test_adapters_of_different_components_can_be_added(sd1):
    style = trained(sd1, "style", components=["unet"])
    words = trained(sd1, "words", seed=2, components=["text_encoder"])
    lk.activate(sd1, {"style": 1.0, "words": 1.0})
    both, together = draw(sd1), tiny_sd1()
    lk.attach(together, style + words)
    close(draw(together), both)
    assert set(lk.capture(together).metadata["fingerprint"]["components"]) == {"unet", "text_encoder"}
    with pytest.raises(AdapterError, match="different bases"):
        style + trained(tiny_sdxl(), components=["unet"])


def test_merge_and_unmerge_of_a_pipeline(family):
    pipe = MAKE[family]()
    before = [tiny.bits(model) for model in models(pipe)]
    trained(pipe, components=ALL[family], targets="locon")
    ours = draw(pipe)
    lk.merge(pipe)
    close(draw(pipe), ours, 1e-4)
    lk.unmerge(pipe)
    assert torch.equal(draw(pipe), ours)
    lk.detach(pipe)
    assert all(tiny.same_bits(a, tiny.bits(model)) for a, model in zip(before, models(pipe), strict=True))


def test_a_replaced_component_is_an_error_and_not_silence(sd1):
    trained(sd1)
    old, sd1.unet = sd1.unet, tiny_sd1(seed=1).unet
    for call in (lk.capture, lk.summary, lk.merge, lk.active, lambda p: lk.activate(p, None), lk.detach):
        with pytest.raises(StateError, match="the pipeline's unet was replaced while adapters are attached"):
            call(sd1)
    sd1.unet = None
    with pytest.raises(StateError, match="the pipeline's unet was replaced"):
        lk.detach(sd1)
    sd1.unet = old
    lk.detach(sd1)
    sd1.unet = tiny_sd1(seed=1).unet
    lk.attach(sd1, lk.LoraConfig(rank=2, targets="attention"))


def test_a_component_without_adapters_may_go(sd1):
    """As trainers free text encoders once prompts are encoded."""
    adapter = trained(sd1)
    embeds, negative = sd1.encode_prompt("a cat", "cpu", 1, True)
    ours, encoder = draw(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative), sd1.text_encoder
    sd1.text_encoder = None
    assert lk.capture(sd1).digest() == adapter.digest()
    lk.merge(sd1)
    close(draw(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative), ours, 1e-4)
    lk.unmerge(sd1)
    assert list(as_module(sd1).components) == ["unet"]
    with pytest.raises(TargetError, match="no 'text_encoder' to adapt"):
        lk.attach(sd1, lk.LoraConfig(components=["text_encoder"]), "words")
    sd1.text_encoder = encoder
    trained(sd1, "words", components=["text_encoder"])
    sd1.text_encoder = None
    with pytest.raises(StateError, match="the pipeline's text_encoder was replaced"):
        lk.activate(sd1, "default")
    sd1.text_encoder = encoder
    lk.detach(sd1)
    assert torch.equal(draw(sd1), draw(tiny_sd1()))


def test_what_is_no_model_is_said(sd1):
    for wrong in (None, sd1.components, "folder"):
        with pytest.raises(StateError, match=r"the model is a .*\n  expected a torch\.nn\.Module, or a pipeline"):
            lk.attach(wrong, lk.LoraConfig())


def test_adapters_are_on_the_pipeline_or_on_its_part_and_not_on_both(sd1):
    lk.attach(sd1.unet, lk.LoraConfig(rank=2, targets="attention"))
    with pytest.raises(StateError, match=r"attached to 'unet' by itself.*StableDiffusionPipeline"):
        lk.attach(sd1, lk.LoraConfig(rank=2, targets="attention"))
    with pytest.raises(StateError, match="no adapter is attached to this StableDiffusionPipeline"):
        lk.capture(sd1)
    lk.detach(sd1.unet)
    lk.attach(sd1, lk.LoraConfig(rank=2, targets="attention"))
    with pytest.raises(StateError, match="of this UNet2DConditionModel has adapters, which were attached to another"):
        lk.attach(sd1.unet, lk.LoraConfig(rank=2, targets="attention"))
    assert lk.adapters(sd1) == ["default"]
    assert lk.active(sd1) == {"default": 1.0}


def test_layers_of_peft_are_named_whatever_the_targets(sd1, tmp_path):
    file = trained(sd1).save(tmp_path / "it.safetensors", format="diffusers")
    pipe = tiny_sd1()
    pipe.load_lora_weights(str(file))
    for targets in ("kohya", ["conv1"], "all-linear"):
        with pytest.raises(StateError, match=r"layers of PEFT \(unet\..*\n.*unload_lora_weights"):
            lk.attach(pipe, lk.LoraConfig(targets=targets))
    with pytest.raises(StateError, match="layers of PEFT"):
        lk.attach(pipe.unet, lk.LoraConfig(targets=["conv1"]))
    pipe.unload_lora_weights()
    lk.attach(pipe, lk.Adapter.load(file))
    close(draw(pipe), draw(sd1))


def test_loha_on_a_pipeline(sd1, tmp_path):
    adapter = trained(sd1, variant="loha", targets="locon", components=["unet", "text_encoder"])
    ours, before = draw(sd1), tiny.bits(sd1.unet)
    lk.merge(sd1)
    close(draw(sd1), ours, 1e-4)
    lk.unmerge(sd1)
    assert tiny.same_bits(before, tiny.bits(sd1.unet))
    again = tiny_sd1()
    lk.attach(again, lk.Adapter.load(adapter.save(tmp_path / "it.safetensors", format="kohya")))
    close(draw(again), ours)


def test_rank_and_alpha_by_block(sd1):
    config = lk.LoraConfig(
        rank=2,
        targets="kohya",
        rank_pattern={r"unet\.down_blocks\..*": 4, r"unet\.mid_block\..*": 3},
        alpha_pattern={r"unet\.mid_block\..*": 1.5},
    )
    lk.attach(sd1, config)
    for name, factors in lk.capture(sd1).factors.items():
        expected = 4 if "down_blocks" in name else 3 if "mid_block" in name else 2
        assert (factors.rank, factors.alpha) == (expected, 1.5 if "mid_block" in name else 32.0)


def test_components_choose_where_names_are_looked_for(sd1):
    def chosen(**config):
        lk.attach(sd1, lk.LoraConfig(rank=2, **config))
        found = {m.partition(".")[0] for m in lk.capture(sd1).updates}
        assert lk.capture(sd1).config.components == sorted(found, key=["unet", "text_encoder"].index)
        lk.detach(sd1)
        return found

    assert chosen() == chosen(targets="attention") == {"unet"}  # never the VAE, nor a text encoder unasked
    assert chosen(targets=["to_q", "q_proj"], components=["unet", "text_encoder"]) == {"unet", "text_encoder"}
    assert chosen(targets=r"text_encoder\..*q_proj") == {"text_encoder"}
    full = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert chosen(targets=["to_q", full]) == {"unet", "text_encoder"}
    with pytest.raises(TargetError, match=r"'q_proj' .*\n.*in text_encoder: LoraConfig\(components"):
        chosen(targets=["q_proj"])
    with pytest.raises(TargetError, match=r"no 'unett' to adapt .*did you mean 'unet'\?\n  it has unet, text_encoder"):
        chosen(components=["unett"])
    with pytest.raises(TargetError, match="is no pipeline"):
        lk.attach(sd1.unet, lk.LoraConfig(components=["unet"]))


def test_summary_is_by_component(sd1):
    trained(sd1, components=["unet", "text_encoder"])
    text = str(lk.summary(sd1))
    assert "unet: 48 modules" in text
    assert "text_encoder: 12 modules" in text
    assert "to_out.0" in text
    lk.detach(sd1)
    trained(sd1)
    assert "text_encoder: not adapted" in str(lk.summary(sd1))


def test_guidance_doubles_the_batch_in_blocks(sd1):
    for name, seed in (("a", 1), ("b", 2)):
        trained(sd1, name, seed)
    choices = ["a", None, {"a": 0.5, "b": 0.7}]
    prompts = ["a cat", "a red dog", "sks"]
    with lk.route(sd1, choices * 2):
        together = draw(sd1, prompts)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for row, choice in enumerate(choices):
        lk.activate(sd1, choice)
        alone = sd1(
            prompts[row],
            latents=noise[row : row + 1],
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
            height=16,
            width=16,
        ).images
        close(together[row : row + 1], alone)
    with pytest.raises(StateError, match="rows"), lk.route(sd1, choices):
        draw(sd1, prompts)


def test_convolutions_keep_the_memory_format(sd1):
    sd1.unet.to(memory_format=torch.channels_last)
    adapter = trained(sd1, targets="locon")
    again = tiny_sd1()
    again.unet.to(memory_format=torch.channels_last)
    lk.attach(again, adapter)
    for pipe in (sd1, again):
        A = pipe.unet.down_blocks[0].resnets[0].conv1.lora_default.A
        assert A.shape[2:] == (3, 3)
        assert A.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(draw(again), draw(sd1))
    assert all(f.A.is_contiguous() for f in adapter.factors.values())  # in files as ever
    plain = tiny_sd1()
    lk.attach(plain, adapter)
    assert plain.unet.down_blocks[0].resnets[0].conv1.lora_default.A.is_contiguous()
    close(draw(plain), draw(sd1))


def test_a_copy_of_a_pipeline_has_adapters_of_its_own(sd1):
    trained(sd1, components=["unet", "text_encoder"])
    ours, other = draw(sd1), copy.deepcopy(sd1)
    assert torch.equal(draw(other), ours)
    lk.detach(other)
    assert torch.equal(draw(other), draw(tiny_sd1()))
    assert torch.equal(draw(sd1), ours)


def test_gradients_arrive_at_every_factor(sd1):
    lk.attach(sd1, lk.LoraConfig(rank=2, targets="locon", components=["unet", "text_encoder"]))
    for model in models(sd1):
        tiny.randomise_factors(model, size=0.2)
    latents = torch.randn(2, 4, 8, 8)
    output, _ = as_module(sd1)(latents, torch.tensor([3, 700]), prompt=["a cat", "sks"], guidance_scale=1.0)
    output.square().sum().backward()
    named = [(n, p) for n, p in as_module(sd1).named_parameters() if p.requires_grad]
    assert len(named) == 2 * len(lk.capture(sd1).updates)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in named)


def test_a_captured_adapter_is_merged_into_the_pipelines_folder(sd1, tmp_path):
    plain, other = tiny_sd1(), tiny_sd1(seed=1)
    plain.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "other")
    adapter = trained(sd1, components=["unet", "text_encoder"])
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    close(draw(loaded), draw(sd1), 1e-4)
    with pytest.raises(AdapterError, match="another base"):
        merge_checkpoint(tmp_path / "other", adapter, tmp_path / "wrong")
