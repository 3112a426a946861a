"""What a run trains can be saved, or the run is refused before its first step: every kind of update, beside all that a
run may train with it.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import tiny_lm
import tiny_pictures
from torch import nn

import lorakit as lk
from lorakit.config import VIRTUAL, LoraConfig, variants
from lorakit.errors import ConfigError
from lorakit.methods import method_of
from lorakit.model.capture import as_value, capture
from lorakit.tasks import task_of
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up

# What a kind's config needs, as in test_updates.
NEEDS: dict[str, dict[str, Any]] = {
    "bottleneck": {"alpha": 32.0},
    "ia3": {"rank": 16, "alpha": 32.0},
    "tokens": {"trainable_tokens": [1, 5]},
    "vera": {"alpha": 32.0},
}
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "trained tokens": {"trainable_tokens": [1, 5]},
    "all biases": {"bias": "all"},
    "its own biases": {"bias": "lora_only"},
    "a saved module": {"save_modules": ["lm_head"]},
    "a norm": {"save_modules": ["norm"]},
}
# What PEFT's folder has no place for. This base's linears have biases in the attention.
REFUSED = {
    *((kind, "trained tokens") for kind in ("bottleneck", "ia3", "loha", "lokr", "vera")),
    *((kind, beside) for kind in ("ia3", "loha", "lokr") for beside in ("all biases", "its own biases")),
    *(("tokens", beside) for beside in ("all biases", "its own biases", "a saved module", "a norm")),
}


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory):
    return str(tiny_lm.save(tmp_path_factory.mktemp("biased"), tiny_lm.biased()))


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("variant", variants())
def test_what_a_run_trains_is_saved_whole_or_refused_at_set_up(variant, beside, make_config, biased_folder, tmp_path):
    config = make_config(model=biased_folder, variant=variant, **{**NEEDS.get(variant, {}), **BESIDE[beside]})
    if (variant, beside) in REFUSED:
        with pytest.raises(ConfigError) as raised:
            set_up(config)
        message = str(raised.value)
        assert "PEFT's folder cannot hold what this run trains" in message
        for setting, value in BESIDE[beside].items():
            assert f"{setting}: {value}" in message
            assert re.search(rf"\n  change or omit .*{setting}", message)
        assert variant in message
        assert not RunFolder(config.out).metrics.exists()
        return
    job = set_up(config)
    folder = tmp_path / "result"
    write = partial(job.task.save_adapter, config, job.base.processor)
    job.method.save(job.model, job.base.processor, job.adapter, folder, {}, write)
    held, back = capture(job.model, job.adapter), lk.Adapter.load(folder)
    assert back.updates.keys() == held.updates.keys()
    assert back.saved.keys() == held.saved.keys()


@pytest.mark.parametrize("beside", BESIDE)
def test_virtual_tokens_beside_lora_and_what_else_is_trained_are_saved_whole(
    beside, make_config, biased_folder, tmp_path
):
    config = make_config(model=biased_folder, prompt="prefix", virtual_tokens=2, **BESIDE[beside])
    job = set_up(config)
    write = partial(job.task.save_adapter, config, job.base.processor)
    job.method.save(job.model, job.base.processor, job.adapter, tmp_path / "result", {}, write)
    held, back = capture(job.model, job.adapter), lk.Adapter.load(tmp_path / "result")
    assert back.updates.keys() == held.updates.keys()
    assert back.saved.keys() == held.saved.keys()
    assert back.digest() == held.digest()


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_alone_are_saved_with_saved_modules(kind, make_config, biased_folder, tmp_path):
    job = set_up(make_config(model=biased_folder, method=kind, virtual_tokens=2, save_modules=["lm_head", "norm"]))
    job.method.save(job.model, job.base.processor, job.adapter, tmp_path / "result", {})
    assert lk.Adapter.load(tmp_path / "result").digest() == capture(job.model, job.adapter).digest()


def test_an_added_token_beside_a_kind_without_tokens_is_refused_by_the_setting_that_asks_for_it(make_config):
    with pytest.raises(ConfigError, match=r"change or omit trainable_tokens or add_tokens, or use variant: lora"):
        set_up(make_config(variant="loha", add_tokens=["<new>"]))


def test_a_picture_run_is_refused_by_the_format_it_is_to_be_saved_in(tmp_path):
    model = tiny_pictures.save_pipeline(tmp_path / "sd1")
    pictures = tiny_pictures.write_pictures(tmp_path / "pictures", 4)
    config = tiny_pictures.config(model, pictures, tmp_path / "run", save_as="diffusers", variant="loha")
    with pytest.raises(ConfigError, match=r"variant: loha: (.|\n)*save_as: diffusers cannot hold(.|\n)*variant: lora"):
        set_up(config)
    assert set_up(config.replace(save_as="auto")).steps > 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def mixed_layouts() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.ModuleDict({"attention": Conv1D(8, 8), "other": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    ("model", "variant", "targets", "said"),
    [
        (Attention, "dora", ["attention", "out_proj"], "DoRA's magnitude of attention.out_proj"),
        (mixed_layouts, "vera", ["attention", "other"], "linears stored as [in, out] beside others"),
    ],
)
def test_layers_that_the_format_has_no_place_for_are_refused(model, variant, targets, said, make_config):
    """Through the method and the task, whatever loads such a base."""
    config = make_config(variant=variant, targets=targets, **NEEDS.get(variant, {}))
    base = lk.attach(model(), LoraConfig(variant=variant, targets=targets))
    with pytest.raises(ConfigError, match=rf"variant: {variant}: (.|\n)*{re.escape(said)}(.|\n)*use variant: lora"):
        method_of("lora").check_result(base, config, "default", partial(task_of(config.task).unsaved, config, None))


def test_the_check_copies_nothing(make_config):
    job = set_up(make_config(save_modules=["lm_head"]))
    value = as_value(job.model, job.adapter)
    own = {p.data_ptr() for p in job.model.parameters()}
    assert {t.data_ptr() for t in value.saved.values()} <= own
    assert all(f.A.data_ptr() in own and not f.A.requires_grad for f in value.factors.values())
