"""A Whisper's processor with a run's language: sounds to spectrograms, texts to ids, and what generation starts from.

A spectrogram is [mel bands, frames], of a sound padded with silence to the length that the base hears at once (30 s).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bases.load_processor import load_speech_processor
from ...errors import ConfigError, LorakitError

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.sound.rows import SoundFile

LANGUAGES = ("<|transcribe|>", "<|translate|>")  # tokens of bases that know several languages


class Listening:
    """`start`: the ids that the decoder starts from: start of transcript, language, task, no timestamps."""

    def __init__(self, processor: Any, name: str, language: str | None, translate: bool, tokens: int):
        """`name`: the base's; `tokens`: of a transcript at evaluations, 0 for none. Raises LorakitError for a base that
        is no Whisper, ConfigError for a language that it does not have.
        """
        self.processor, self.name, self.tokens = processor, name, tokens
        self.tokenizer, self.extractor = processor.tokenizer, processor.feature_extractor
        if not hasattr(self.tokenizer, "set_prefix_tokens") or not hasattr(self.extractor, "n_samples"):
            raise LorakitError(
                f"'{name}' is no Whisper: its processor is a {type(processor).__name__}, and what its decoder starts "
                "from is not known here\n  choose a Whisper (--model)"
            )
        self._set_language(language, translate)
        self.start = tuple(self.tokenizer.prefix_tokens)

    @property
    def rate(self) -> int:
        """Samples a second that the base hears."""
        return int(self.extractor.sampling_rate)

    @property
    def seconds(self) -> float:
        """How much the base hears at once."""
        return float(self.extractor.n_samples / self.extractor.sampling_rate)

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, with the end token."""
        return (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)

    def features(self, sounds: Sequence[SoundFile]) -> Tensor:
        """Return the sounds' spectrograms: [rows, mel bands, frames], float32. DataError if a file has gone."""
        made: Tensor = self.extractor(
            [sound.samples(self.rate) for sound in sounds], sampling_rate=self.rate, return_tensors="pt"
        )["input_features"]
        return made

    def save_pretrained(self, folder: Path) -> None:
        """Save the processor, as full fine-tuning does with its model."""
        self.processor.save_pretrained(folder)

    def _set_language(self, language: str | None, translate: bool) -> None:
        several = all(token in self.tokenizer.get_added_vocab() for token in LANGUAGES)
        if not several:
            given = "language" if language else "translate" if translate else None
            if given:
                raise ConfigError(f"{given}: '{self.name}' knows one language only\n  remove {given}")
            return
        if language is None:
            raise ConfigError(
                f"language: '{self.name}' knows several; say which one is spoken\n"
                "  language: en (or english); with translate: true the texts are English"
            )
        try:
            self.tokenizer.set_prefix_tokens(
                language=language, task="translate" if translate else "transcribe", predict_timestamps=False
            )
            found = self.tokenizer.prefix_tokens
        except ValueError as error:
            raise ConfigError(f"language: {str(error).splitlines()[0]}") from error
        unknown = self.tokenizer.unk_token_id
        if None in found or (unknown is not None and unknown in found[1:] and unknown != self.tokenizer.eos_token_id):
            raise ConfigError(f"language: '{self.name}' has no token for {language}")


def load_listening(config: Any, language: str | None, translate: bool, tokens: int) -> Listening:
    """Load the processor of a run's base. Raises LorakitError and ConfigError; see `Listening`."""
    processor = load_speech_processor(config.model, config.revision, config.trust_remote_code)
    return Listening(processor, config.model, language, translate, tokens)
