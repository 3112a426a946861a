"""Sounds: samples as they were written, rates changed as the maths says, rows that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_lm
import tiny_speech

from lorakit.data.read import read_rows
from lorakit.data.sound.resample import resample
from lorakit.data.sound.rows import is_spoken, read_spoken
from lorakit.data.sound.wav import read_wav
from lorakit.errors import DataError


@pytest.mark.parametrize(("width", "within"), [(1, 1 / 120), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_samples_of_every_width_are_read_as_they_were(tmp_path, width, within):
    samples = tiny_speech.tone(440.0, 0.1)
    path = tiny_speech.write_wav(tmp_path / "a.wav", samples, width=width)
    sound = read_wav(path.read_bytes(), "a.wav")
    assert (sound.rate, sound.samples.dtype) == (16000, np.float32)
    assert sound.seconds == pytest.approx(0.1)
    np.testing.assert_allclose(sound.samples, samples, atol=within)


def test_the_extremes_of_each_width_are_minus_one_and_almost_one(tmp_path):
    for width in (1, 2, 3, 4):
        path = tiny_speech.write_wav(tmp_path / "a.wav", np.array([-1.0, 0.0, 1.0]), width=width)
        low, zero, high = read_wav(path.read_bytes(), "a.wav").samples
        assert zero == 0
        assert -1 <= low < -0.98
        assert 0.98 < high <= 1


def test_channels_are_averaged(tmp_path):
    left, right = tiny_speech.tone(440.0, 0.05), tiny_speech.tone(330.0, 0.05)
    path = tiny_speech.write_wav(tmp_path / "a.wav", np.stack([left, right], 1).ravel(), channels=2)
    np.testing.assert_allclose(read_wav(path.read_bytes(), "a").samples, (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("rate", "target"), [(48000, 16000), (44100, 16000), (8000, 16000), (22050, 16000), (16000, 11025)]
)
def test_a_tone_keeps_its_pitch_level_and_phase_at_another_rate(rate, target):
    for pitch in (100.0, 1000.0, 3000.0):
        made = resample(tiny_speech.tone(pitch, 0.5, rate, phase=0.3).astype(np.float32), rate, target)
        exact = tiny_speech.tone(pitch, 1.0, target, phase=0.3)[: len(made)]
        assert len(made) == -(-int(0.5 * rate) * target // rate)
        inside = slice(200, -200)  # the edges see the silence around
        np.testing.assert_allclose(made[inside], exact[inside], atol=2e-3)


@pytest.mark.parametrize("rate", [48000, 44100])
def test_what_the_new_rate_cannot_hold_is_removed_rather_than_folded_back(rate):
    made = resample(tiny_speech.tone(9000.0, 0.5, rate).astype(np.float32), rate, 16000)
    assert np.abs(made[200:-200]).max() < 0.005  # at 0.5 before; folded back it would be a tone of 7,000 Hz


def test_the_same_rate_and_silence_stay_as_they_are():
    samples = tiny_speech.tone(440.0, 0.1).astype(np.float32)
    assert resample(samples, 16000, 16000) is samples
    level = resample(np.full(4000, 0.25, np.float32), 44100, 16000)
    np.testing.assert_allclose(level[100:-100], 0.25, atol=1e-5)
    assert len(resample(np.ones(3, np.float32), 48000, 16000)) == 1


def rows_of(tmp_path, *rows):
    return read_rows(tiny_lm.write_rows(tmp_path / "rows.jsonl", rows))


def test_sounds_that_cannot_be_used_are_named_together(tmp_path):
    good = tiny_speech.write_wav(tmp_path / "good.wav", tiny_speech.tone(440.0, 0.2))
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "cut.wav").write_bytes(good.read_bytes()[:2000])
    tiny_speech.write_wav(tmp_path / "long.wav", tiny_speech.tone(440.0, 1.2))
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    names = ("good.wav", "text.wav", "cut.wav", "long.wav", "a.mp3")
    with pytest.raises(DataError) as error:
        read_spoken(rows_of(tmp_path, *({"audio": name, "text": "x"} for name in names)), {}, 1.0)
    said = str(error.value)
    assert "4 of 5 sounds cannot be used" in said
    assert "text.wav: not a WAV file" in said
    assert "convert it: ffmpeg -i a.mp3" in said
    assert "1.2 s long, and the base hears 1 s at once" in said
    assert "cut.wav: " in said
    assert "good.wav" not in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"audio": "god.wav", "text": "x"}, r"there is no sound 'god\.wav'(.|\n)*did you mean 'good\.wav'"),
        ({"audio": "good.wav"}, "its text is None"),
        ({"audio": "good.wav", "text": " "}, "its text is empty"),
        ({"sound": "good.wav", "text": "x"}, "no audio; columns found: sound, text"),
        ({"audio": 3, "text": "x"}, "its sound is '3'"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, row, said):
    tiny_speech.write_wav(tmp_path / "good.wav", tiny_speech.tone(440.0, 0.2))
    with pytest.raises(DataError, match=said):
        read_spoken(rows_of(tmp_path, row), {}, 30.0)


def test_other_columns_are_renamed_or_noted_and_stored_bytes_are_read(tmp_path):
    path = tiny_speech.write_wav(tmp_path / "good.wav", tiny_speech.tone(440.0, 0.2))
    rows = rows_of(tmp_path, {"file": "good.wav", "said": "hello", "speaker": 3})
    (found,), notes = read_spoken(rows, {"audio": "file", "text": "said"}, 30.0)
    assert (found.text, found.sound.seconds) == ("hello", pytest.approx(0.2))
    assert notes == {"columns that are not used: speaker": 1}
    rows[0].values.update(file={"bytes": path.read_bytes(), "path": None})
    (stored,), _ = read_spoken(rows, {"audio": "file", "text": "said"}, 30.0)
    assert stored.sound.content == found.sound.content


def test_rows_of_sounds_are_recognized():
    assert is_spoken({"audio": "a.wav", "text": "x"})
    assert is_spoken({"audio": "a.mp3", "text": "x"})  # refused later, with how to convert it
    assert is_spoken({"audio": {"bytes": b"", "path": None}, "text": "x"})
    assert not is_spoken({"audio": "a.png", "text": "x"})
    assert not is_spoken({"audio": "a.wav"})
