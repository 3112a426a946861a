"""P-tuning on a live model (Liu et al. 2021): prompt tuning whose vectors an encoder computes in training, an MLP or an
LSTM (`virtual.encoder`).
"""

from __future__ import annotations

from .prompt import PromptTokens


class EncodedTokens(PromptTokens):
    kind = "p_tuning"


Live = EncodedTokens
