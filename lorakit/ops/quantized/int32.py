"""Small unsigned integers in the words of an int32 tensor, as GPTQ and AWQ files have them.

    pack      [n, m] integers of `bits` bits -> [n · bits / 32, m] int32
    unpack    the reverse

Along the first dimension the integers are one string of bits, lowest first. With 2, 4 and 8 bits a word holds 16, 8
and 4 of them; with 3 bits 32 integers fill 3 words, and two of them lie across the border of two words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers 0 <= c < 2**bits along the first dimension. `n · bits` must be a multiple of 32."""
    n, m = codes.shape
    words = torch.zeros(n * bits // WORD, m, dtype=torch.int64, device=codes.device)
    at, codes = torch.arange(n, device=codes.device) * bits, codes.long()
    first, shift = at // WORD, (at % WORD).unsqueeze(1)
    words.index_add_(0, first, codes << shift & 0xFFFFFFFF)
    across = (at % WORD + bits > WORD).nonzero().flatten()
    words.index_add_(0, first[across] + 1, codes[across] >> (WORD - shift[across]))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()  # the same bits, signed


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the integers packed along the first dimension: [words · 32 / bits, m] uint8."""
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
        # The shift copies the sign into the upper bits; the mask removes it.
        return (words.unsqueeze(1) >> shifts & mask).to(torch.uint8).flatten(0, 1)
    wide = words.long() & 0xFFFFFFFF
    at = torch.arange(len(words) * WORD // bits, device=words.device) * bits
    first, shift = at // WORD, (at % WORD).unsqueeze(1)
    following = wide[(first + 1).clamp_max(len(words) - 1)]
    return ((wide[first] >> shift | following << (WORD - shift)) & mask).to(torch.uint8)
