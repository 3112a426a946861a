"""What an encoder-decoder's generation begins with: what its targets begin with in training."""

from __future__ import annotations

from typing import Any


def start_as_trained(model: Any, tokenizer: Any) -> None:
    """Set the tokens that generation begins with, from how the model shifts a target of the tokenizer.

    The decoder's first input is the start token, or mBART's language. A special token that every target begins with
    (BART's <s>, M2M100's language) is the first that is generated.
    """
    import torch

    from ...data.pairs import target_ids
    from .target_loss import decoder_inputs

    target = target_ids(tokenizer, "x")
    shifted = decoder_inputs(model, torch.tensor([target], device=model.device))
    settings = model.generation_config
    if shifted is not None:
        settings.decoder_start_token_id = int(shifted[0, 0])
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - {tokenizer.unk_token_id}
    settings.forced_bos_token_id = target[0] if len(target) > 1 and target[0] in special else None
