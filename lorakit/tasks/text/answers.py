"""What a language model answers, generated as a run's settings say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...config import RunSettings, part
from ..task import Asked, Base
from .samples import TextSample
from .settings import Sampling

if TYPE_CHECKING:
    from ...data.questions import Question


def options_of(config: RunSettings) -> dict[str, Any]:
    """Return the run's sampling settings as arguments of `generate`."""
    own = part(config, Sampling)
    return {
        "max_new_tokens": own.sample_tokens,
        "temperature": own.sample_temperature,
        "top_p": own.sample_top_p,
        "beams": own.sample_beams,
    }


def answers(config: RunSettings, base: Base, questions: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer": text} for each question; "cut": true where the limit of new tokens ended the text.

    Sampled text draws from torch's default generator. Raises DataError for a question that is empty or too long.
    """
    from ...generate.generate import check_prompts, generate

    prompts, options = [question.ids for question in questions], options_of(config)
    check_prompts(base.model, prompts, options["max_new_tokens"], [question.where for question in questions])
    cut: set[int] = set()
    texts = generate(base.model, base.processor, prompts, batch_size=batch_size, on_cut=cut.add, **options)
    return [{"answer": text.strip()} | ({"cut": True} if i in cut else {}) for i, text in enumerate(texts)]


def sampled(config: RunSettings, base: Base, prompts: Sequence[Asked]) -> list[TextSample]:
    """Generate one answer per prompt. What is drawn depends on the run's seed alone."""
    from ...generate.generate import generate

    if not prompts:
        return []
    texts = generate(base.model, base.processor, [p.ids for p in prompts], seed=config.seed, **options_of(config))
    return [TextSample(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
