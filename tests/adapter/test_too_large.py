"""Numbers that grow beyond their precision by casting, folding or adding: the error says so, and does not blame the
training.
"""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.adapter.algebra.edit import cast
from lorakit.adapter.dense import Dense
from lorakit.errors import AdapterError
from lorakit.formats.scale import folded

FP16 = torch.float16


def large(size: float, alpha: float = 2.0, dtype=torch.float32) -> lk.Adapter:
    f = lk.Factors(torch.ones(2, 6, dtype=dtype), torch.full((6, 2), size, dtype=dtype), alpha)
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=alpha, targets=["q"]), {"l.0.q": f})


def test_casting_names_the_module_and_a_wider_precision(tmp_path):
    with pytest.raises(
        AdapterError, match=r"(?s)'l\.0\.q', B: values up to 7e\+04 are too large for float16.*\(--dtype bf16\)"
    ):
        cast(large(7e4), FP16)
    with pytest.raises(AdapterError, match="too large for float16"):
        large(7e4).save(tmp_path / "x.pt", "loralib", dtype=FP16)
    assert not list(tmp_path.iterdir())


def test_casting_checks_saved_weights_and_tokens_too():
    held = lk.Adapter(lk.LoraConfig(targets=["q"]), {}, saved={"head.weight": torch.full((2, 2), 1e5)})
    with pytest.raises(AdapterError, match=r"saved weight 'head\.weight'.*too large for float16"):
        cast(held, FP16)
    token = lk.Adapter(lk.LoraConfig(targets=["q"]), {}, embeddings={"<s1>": torch.full((2,), 1e5)})
    with pytest.raises(AdapterError, match=r"embedding '<s1>'.*too large for float16"):
        cast(token, FP16)


def test_folding_widens_fp16_and_refuses_what_no_float32_holds():
    wide = folded(torch.full((2, 2), 6e4, dtype=FP16), 3.0)
    assert wide.dtype == torch.float32
    assert wide[0, 0] == 3 * torch.tensor(6e4, dtype=FP16).float()
    with pytest.raises(
        AdapterError, match=r"(?s)a scale of 1e\+38, folded into B: .*too large for float32.*alpha or a weight mistyped"
    ):
        folded(torch.full((2, 2), 1e3), 1e38)


def test_sums_and_cuts_that_overflow_say_so():
    with pytest.raises(AdapterError, match=r"weight and scale, 1e\+38: .*too large for float32"):
        lk.combine([large(1e3), large(1.0)], [1e38, 1.0])
    whole = lk.Adapter(lk.LoraConfig(targets=["q"]), {"l.0.q": Dense(torch.full((2, 2), 6e4, dtype=FP16))})
    with pytest.raises(AdapterError, match=r"'l\.0\.q' times 2: .*too large for float16"):
        2.0 * whole


def test_infinities_of_an_fp16_file_are_told_from_a_training_that_diverged():
    with pytest.raises(AdapterError, match="values beyond 65504 were written in fp16"):
        large(float("inf"), dtype=FP16).check()
    for value, dtype in ((float("nan"), FP16), (float("inf"), torch.float32)):
        with pytest.raises(AdapterError, match="the training diverged or the file is damaged"):
            large(value, dtype=dtype).check()
