"""Pictures in other styles: an ink drawing, neon lines, two colours.

The base model never sees them. They are among the autoencoder's pictures, so that a LoRA can learn such a style.
Pixels are [n, 3, 32, 32] in -1..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER, INK = (0.97, 0.95, 0.88), (0.12, 0.18, 0.55)
DARK = (0.05, 0.04, 0.12)
SHADE, LIGHT = (0.12, 0.10, 0.35), (1.0, 0.86, 0.55)


def blend(share: Tensor, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """Between two colours: `share` [n, 1, 32, 32] in 0..1."""
    first, second = (torch.tensor(c).view(1, 3, 1, 1) for c in (low, high))
    return (first + (second - first) * share) * 2 - 1


def luminance(pictures: Tensor) -> Tensor:
    """[n, 1, 32, 32] in 0..1, by the weights of BT.601."""
    return ((pictures + 1) / 2 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def edges(pictures: Tensor) -> Tensor:
    """[n, 3, 32, 32]: how much each channel changes across a pixel, in 0..1."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return (across.hypot(down) / 1.4).clamp(0, 1)


def ink(pictures: Tensor) -> Tensor:
    """Dark blue lines and light shading on paper."""
    lines = edges(pictures).amax(1, keepdim=True)
    return blend((lines + 0.25 * (1 - luminance(pictures))).clamp(0, 1), PAPER, INK)


def neon(pictures: Tensor) -> Tensor:
    """Edges in the picture's own colours on a dark ground."""
    glow = edges(pictures).amax(1, keepdim=True)
    colours = (pictures + 1.4).clamp(0, 2)
    bright = colours / colours.amax(1, keepdim=True).clamp(min=0.2)
    dark = torch.tensor(DARK).view(1, 3, 1, 1)
    return (dark * (1 - glow) + bright * glow) * 2 - 1


def duotone(pictures: Tensor) -> Tensor:
    """Light and dark only, in two colours."""
    return blend(luminance(pictures), SHADE, LIGHT)


STYLES = {"ink": ink, "neon": neon, "duotone": duotone}
STYLED_SHARE = 0.25  # of the autoencoder's pictures


def some_styled(pictures: Tensor) -> Tensor:
    """The last STYLED_SHARE of a batch in the styles, by turns; the rest as it is."""
    count = round(len(pictures) * STYLED_SHARE)
    if not count:
        return pictures
    plain, rest = pictures[:-count], pictures[-count:]
    makers = list(STYLES.values())
    return torch.cat([plain, *(makers[n % len(makers)](rest[n : n + 1]) for n in range(count))])
