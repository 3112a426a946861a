"""WAV files with PCM samples of 8, 16, 24 or 32 bits, as one channel of float32 in −1..1.

Several channels are averaged. Samples of n bits are divided by 2ⁿ⁻¹; those of 8 bits are unsigned, around 128. Other
formats, and WAV files with anything but PCM, are refused with the command that converts them.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass

import numpy as np

from ...errors import DataError

SUFFIX = ".wav"
OTHERS = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aiff", ".webm", ".mp4")


@dataclass(frozen=True)
class Sound:
    """`samples`: [n] float32; `rate`: samples a second."""

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def read_wav(data: bytes, where: str) -> Sound:
    """Decode a WAV file's bytes. `where`: names it in errors. Raises DataError for what is not PCM, or not complete."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            count = file.getnframes()
            raw = file.readframes(count)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "the file ends too early"
        raise DataError(f"{where}: not a WAV file with PCM samples: {reason}\n  {conversion(where)}") from error
    if not count or not rate:
        raise DataError(f"{where}: no samples in it\n  remove the row, or record it again")
    if len(raw) < count * channels * width:
        raise DataError(
            f"{where}: {len(raw) // (channels * width):,} of {count:,} samples are there; the file was cut off\n"
            "  copy or record it again"
        )
    return Sound(_floats(raw, width, where).reshape(count, channels).mean(1, dtype=np.float32), rate)


def _floats(raw: bytes, width: int, where: str) -> np.ndarray:
    """Return little-endian samples of `width` bytes as float32."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:  # put into the upper bytes of 32 bits, so that the sign is right
        bytes_of = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wide = np.concatenate([np.zeros((len(bytes_of), 1), np.uint8), bytes_of], 1)
        return (wide.copy().view("<i4")[:, 0] / 2**31).astype(np.float32)
    if width in (2, 4):
        return (np.frombuffer(raw, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)
    raise DataError(f"{where}: samples of {8 * width} bits; expected 8, 16, 24 or 32\n  {conversion(where)}")


def conversion(where: str) -> str:
    """Return the command that makes a WAV file with PCM samples of a sound."""
    name = where.rpartition(": ")[2]
    return f"convert it: ffmpeg -i {name} -ac 1 -ar 16000 -c:a pcm_s16le NEW.wav"
