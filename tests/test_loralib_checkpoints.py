"""loralib checkpoints as `Adapter`s: those our layers write, and the real one of RoBERTa base on MNLI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
import lorakit.loralib as lora
from lorakit.errors import AdapterError

REAL = Path(__file__).parent / "fixtures" / "loralib_roberta_mnli" / "roberta_base_lora_mnli.bin"


class Net(nn.Module):
    """The same names with lora layers or with torch's own."""

    def __init__(self, adapted: bool):
        super().__init__()
        if adapted:
            self.embed: nn.Module = lora.Embedding(10, 12, r=2, lora_alpha=8)
            self.qkv: nn.Module = lora.MergedLinear(12, 36, r=2, lora_alpha=8, enable_lora=[True, False, True])
            self.out: nn.Module = lora.Linear(12, 12, r=4, lora_alpha=8)
        else:
            self.embed, self.qkv, self.out = nn.Embedding(10, 12), nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


@pytest.fixture
def trained() -> Net:
    torch.manual_seed(0)
    net = Net(adapted=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def plain_twin(net: Net) -> Net:
    plain = Net(adapted=False)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "lora_" not in k})
    return plain


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_our_layers_gives_the_same_forward_on_a_plain_model(trained, bias, suffix, tmp_path):
    ids = torch.randint(10, (2, 7))
    plain = plain_twin(trained)
    state = lora.lora_state_dict(trained, bias=bias)
    if bias == "lora_only":  # so that only the file can bring them back
        nn.init.zeros_(plain.qkv.bias)
        nn.init.zeros_(plain.out.bias)
    if suffix == ".pt":
        torch.save(state, tmp_path / "lora.pt")
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / "lora.safetensors")
    adapter = lk.Adapter.load(tmp_path / f"lora{suffix}", alpha=8, packed={"qkv": [True, False, True]})
    before = plain(ids)
    lk.attach(plain, adapter)
    torch.testing.assert_close(plain(ids), trained(ids))
    assert not torch.allclose(plain(ids), before)
    lk.merge(plain)
    torch.testing.assert_close(plain(ids), trained.eval()(ids))


def test_an_adapter_written_as_loralib_loads_into_our_layers(trained, tmp_path):
    plain = plain_twin(trained)
    lk.attach(
        plain,
        lk.LoraConfig(
            rank=2, alpha=8, targets=["qkv", "out"], rank_pattern={"out": 4}, packed={"qkv": [True, False, True]}
        ),
    )
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    lk.capture(plain).save(tmp_path / "lora.pt", format="loralib")
    result = trained.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    assert not result.unexpected_keys
    nn.init.zeros_(trained.embed.lora_A)
    ids = torch.randint(10, (2, 7))
    torch.testing.assert_close(trained(ids), plain(ids))


def test_a_checkpoint_without_its_alpha_or_its_packed_parts_is_refused(trained, tmp_path):
    torch.save(lora.lora_state_dict(trained), tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=r"does not hold alpha\n.*--alpha 16"):
        lk.Adapter.load(tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=r"'qkv' has A \[4, 12\] and B \[24, 2\]: a MergedLinear\n.*packed="):
        lk.Adapter.load(tmp_path / "lora.pt", alpha=8)


def test_microsofts_roberta_checkpoint_gives_the_logits_of_its_update_added_by_hand():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    # roberta-base but for the vocabulary, which the adapter does not touch, and fewer positions.
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=64, max_position_embeddings=32, num_labels=3)
    ).eval()
    ids = torch.randint(3, 64, (2, 9))
    adapter = lk.Adapter.load(REAL, alpha=16)
    assert (adapter.rank, len(adapter.factors), len(adapter.saved)) == (8, 24, 4)
    with torch.no_grad():
        base = model(ids).logits
        lk.attach(model, adapter)
        attached = model(ids).logits
        lk.detach(model)
        assert torch.equal(model(ids).logits, base)

        state = torch.load(REAL, map_location="cpu", weights_only=True)
        own = model.state_dict()
        for key, value in state.items():
            if key.endswith(".lora_A"):
                module = key.removesuffix(".lora_A")
                own[f"{module}.weight"] += 16 / 8 * state[f"{module}.lora_B"] @ value
            elif not key.endswith(".lora_B"):
                own[key].copy_(value)
        expected = model(ids).logits
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(attached, expected, atol=1e-5, rtol=1e-4)
