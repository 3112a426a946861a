"""A tiny Whisper on disk with its processor, and tones to transcribe: each pitch is a word."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

RATE, SECONDS = 16000, 1
PITCHES = {"low": 200.0, "mid": 700.0, "high": 2400.0}
MELS = 16


def tokenizer(several: bool = True) -> Any:
    """One token a byte; with `several`, languages and tasks as in multilingual Whispers."""
    from tokenizers import pre_tokenizers
    from transformers import WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    made = WhisperTokenizer(vocab=vocabulary, merges=[])
    languages = [f"<|{code}|>" for code in LANGUAGES] if several else []
    tasks = ["<|translate|>", "<|transcribe|>"] if several else []
    special = ["<|startoftranscript|>", *languages, *tasks, "<|notimestamps|>"]
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def processor(several: bool = True) -> Any:
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    return WhisperProcessor(WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS), tokenizer(several))


def whisper(size: int, start: int, end: int, seed: int = 0) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=size,
        num_mel_bins=MELS,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=SECONDS * 50,
        max_target_positions=40,
        init_std=0.15,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def save(folder: Path, several: bool = True) -> Path:
    made = processor(several)
    start = made.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    whisper(len(made.tokenizer), start, made.tokenizer.eos_token_id).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def tone(pitch: float, seconds: float = 0.5, rate: int = RATE, phase: float = 0.0) -> np.ndarray:
    """[n] float64 in −1..1."""
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate + phase)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """PCM samples of `width` bytes."""
    values = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i8")
    if width == 1:
        values += 128
    raw = values.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


def write_rows(folder: Path, count: int = 24) -> Path:
    """One or two tones each, with their words. Phases differ, so that no two sounds are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        words = [list(PITCHES)[(number + k) % 3] for k in range(1 + number % 2)]
        samples = np.concatenate([tone(PITCHES[word], 0.4, phase=0.1 * number) for word in words])
        write_wav(folder / f"{number:02}.wav", samples)
        rows.append({"audio": f"{number:02}.wav", "text": " ".join(words)})
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
