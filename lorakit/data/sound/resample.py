"""Change the rate of samples: interpolation with a windowed sinc, as a polyphase filter.

    y(t) = Σₙ x[n] h(t − n)        h(t) = c · sinc(c t) · w(t / half)        c = min(1, out / in)

t: time in samples of the input; w: a Kaiser window over `half` = ZEROS / c samples to each side. c lowers the cutoff
where the rate falls, so that what the new rate cannot hold is removed rather than folded back (aliasing). The rates'
ratio is up : down in lowest terms, so t − n takes only `up` different fractions: one filter each.

Smith, "Digital Audio Resampling" (CCRMA).
"""

from __future__ import annotations

from math import gcd

import numpy as np

ZEROS = 32  # zero crossings of the sinc to each side
BETA = 12.0  # of the Kaiser window: 0.01 of full scale is left of a tone that the new rate cannot hold, near its limit
ROLL_OFF = 0.95  # the cutoff as a share of the lower rate's half: the filter's slope stays below it


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Return the samples [n] at another rate: [ceil(n · target / rate)], float32."""
    if rate == target:
        return samples
    up, down = target // gcd(rate, target), rate // gcd(rate, target)
    cutoff = ROLL_OFF * min(1.0, target / rate)
    half = int(np.ceil(ZEROS / cutoff))
    count = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float32), (half, half + down))
    made = np.empty(count, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)  # [n + down, taps], centred on each sample
    for phase in range(min(up, count)):
        start, fraction = divmod(phase * down, up)  # the first output of this phase lies at start + fraction / up
        rows = windows[start::down][: len(range(phase, count, up))]
        made[phase::up] = rows @ _taps(fraction / up, half, cutoff)
    return made


def _taps(fraction: float, half: int, cutoff: float) -> np.ndarray:
    """Return h(fraction − n) for n = −half..half: [2·half + 1]. The sum is 1, so that silence and steps keep level."""
    t = fraction - np.arange(-half, half + 1)
    inside = np.clip(1 - (t / (half + 1)) ** 2, 0, None)
    taps = cutoff * np.sinc(cutoff * t) * np.i0(BETA * np.sqrt(inside)) / np.i0(BETA)
    return (taps / taps.sum()).astype(np.float32)
