"""Preferences: learn from answers of which one is better, or that are good or bad, without a reward model.

    pairs (chosen, rejected)      dpo, ipo, orpo, simpo; kto takes them apart
    answers with a label          kto

The losses are in `preferences/losses/`, a file each with its equation. A step's loss is the mean over its rows. The two
answers of a pair share a forward pass; the reference is computed before the first step (`preferences/reference.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..config import Choice, RunSettings, part
from ..errors import ConfigError
from ..nondefault import nondefault
from .causal_lm import Packing, Writing, check, load, packs, prompts, resolved, samples, skeleton  # noqa: F401 (names of the task)
from .preferences.settings import LossSettings, check_settings
from .task import Base, Data
from .text import base as text
from .text.base import (  # noqa: F401 (names of the task)
    asked,
    blueprint,
    checkpoint,
    compares,
    configure,
    defaults,
    drawn,
    for_run,
    loss_labels,
    rate_factor,
    recorded,
    samples_from_file,
    save_adapter,
    save_beside,
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    uses_all,
    writes,
)
from .text.samples import base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Lengths, LongContext, Prompts, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.preference_items import PreferenceItem, Preferences
    from ..data.questions import Question


class PreferenceSettings(LossSettings, Lengths, LongContext, Packing, Writing, Columns, Prompts, Sampling):
    """Those that have no meaning here are errors (`_NOT_HERE`)."""


# Settings of `Writing` that this task does not have -> why.
_NOT_HERE = {
    "answer_after": "answers are columns of their own",
    "train_on": "the loss is of the answers",
    "turns": "the loss is of the answers; turns of the prompt are context",
}
# Preference losses act on sums over an answer's tokens, and move a model that already answers: rates a tenth as high
# as supervised training's learn as much there in as many steps (docs/preference.md).
RATE = 0.1

settings = PreferenceSettings
peft_type = "CAUSAL_LM"
summary = "learn which of two answers is better (DPO and others), or which answers are good (KTO)"
unit = "rows"
shares = False  # a row is two rows of the forward pass


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    for name in nondefault(config, _NOT_HERE):
        raise ConfigError(f"{name}: task: preference does not have it\n  remove {name}: {_NOT_HERE[name]}")
    check_settings(part(config, LossSettings))
    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.chat_record import TEMPLATE_FILE, record
    from ..data.dataset import held_out_of
    from ..data.preference_items import with_mismatches
    from .causal_lm import chat_options, chat_tokenizer
    from .preferences.objective import objective_of
    from .text.held_out import held_out_notes
    from .text.lengths import check_limit, described
    from .text.vocabulary import check_vocabulary

    own = part(config, PreferenceSettings)
    if own.answer_after is not None:
        raise ConfigError("answer_after: preferences have their answers in columns\n  remove answer_after")
    check_limit(config)
    tokenizer, options = chat_tokenizer(own, processor), chat_options(own)
    dataset = _read(config, config.data, config.split, own.max_length, tokenizer)
    objective = objective_of(config, len(dataset.items[0].answers))
    counts = {"dropped": dataset.dropped, "cut": dataset.cut}
    length = described(dataset.lengths, dataset.max_length, dataset.max_length_reason, counts, config)
    notes = dict(dataset.notes)
    if isinstance(config.validation, str):
        validation = _read(config, config.validation, None, dataset.max_length, tokenizer)
        train, held_out = dataset.items, validation.items
        limit, cut, dropped = dataset.max_length, validation.cut, validation.dropped
        notes |= held_out_notes(config.validation, validation.notes, limit, cut, dropped)
    else:
        train, held_out = held_out_of(dataset.items, config.validation)
    before_step = None
    if objective.loss.answers == 1:
        before_step = keep_divergence
        train = with_mismatches(train, dataset.max_length)
        held_out = with_mismatches(held_out, dataset.max_length, train)
    check_vocabulary(config, processor, [answer for item in chain(train, held_out) for answer in item.answers])
    about = record(dataset, tokenizer, options, own.chat_template is not None)
    files = {TEMPLATE_FILE: tokenizer.chat_template} if "chat_template" in about else {}
    facts = [("loss", objective.facts()), ("length", f"{length}, of a prompt with one answer")]
    if objective.loss.answers == 1:
        facts.append(("answers", _balance(train, objective.own)))
    about |= {"preference": objective.recorded()}
    shape = f"shape {dataset.shape}"
    return Data(train, held_out, shape, facts, about, notes, files, before_step=before_step)


def _read(config: RunSettings, source: str, split: str | None, max_length: Any, tokenizer: Any) -> Preferences:
    from ..bases.load import end_tokens
    from ..data.preference_items import build_preferences
    from ..data.read import read_rows
    from .causal_lm import chat_options
    from .preferences.losses import loss_of

    own = part(config, PreferenceSettings)
    return build_preferences(
        read_rows(source, split),
        tokenizer,
        apart=None if own.loss == "auto" else loss_of(own.loss).answers == 1,
        columns=own.columns,
        template=own.template,
        max_length=max_length,
        on_long=own.on_long,
        options=chat_options(own),
        ends=end_tokens(config.model, config.revision, config.trust_remote_code),
    )


def _balance(items: Sequence[PreferenceItem], own: LossSettings) -> str:
    """Say how many answers are desirable and, where the weighted sides differ much, which weight would balance them.

    The paper keeps λ_D n_D / λ_U n_U between 1 and 4/3 (KTO, equation 8).
    """
    desirable = sum(bool(item.desirable) for item in items)
    text = f"{desirable:,} desirable, {len(items) - desirable:,} undesirable"
    if not 0 < desirable < len(items):
        return f"{text}: with one kind only, the loss has nothing to compare with"
    good, bad = own.desirable_weight * desirable, own.undesirable_weight * (len(items) - desirable)
    if not bad or 1 <= good / bad <= 4 / 3:
        return text
    name, weight = (
        ("desirable_weight", own.desirable_weight * bad / good)
        if good < bad
        else ("undesirable_weight", own.undesirable_weight * good / bad)
    )
    return f"{text}; {name}: {weight:.2g} would balance them"


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    from ..data.preferences import is_preference, may_be_preference

    return is_preference(row) or may_be_preference(row, rows)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """Return the loss and its settings, as far as they are known."""
    own = about.get("preference")
    return {k: v for k, v in own.items() if k in LossSettings.model_fields} if isinstance(own, Mapping) else {}


# ------------------------------------------------------------------------------------- the base


def prepare(base: Base, items: Any) -> None:
    """Compute the reference of all items, if the loss has one. Raises NotFiniteError, naming a row."""
    from .preferences.reference import prepare_references

    items = list(items)
    if items and _objective(base, items).loss.has_reference:
        prepare_references(base, items)


def size_at_once(device: torch.device) -> int | None:
    """Return half of what other text tasks have, as a row is two."""
    size = text.size_at_once(device)
    return None if size is None else size // 2


def learning_rate(config: RunSettings, model: Any) -> Choice:
    suited = text.learning_rate(config, model)
    return Choice(suited.value * RATE, f"{RATE:g} of supervised training's, {suited.reason}")


def margin(base: float) -> float:
    """Return at least half of the base's loss: IPO's is 25 before training with a beta of 0.1."""
    return max(text.margin(base), base / 2)


def check_together(model: Any) -> None:
    """Do nothing: the runs of a sweep share no forward pass."""


def alone(config: RunSettings) -> str | None:
    return None


# ------------------------------------------------------------------------------------- batches and losses


def saved_padding(batches: Sequence[Sequence[PreferenceItem]]) -> str:
    from .text.packed import saved_padding

    return saved_padding([[answer.size for item in batch for answer in item.answers] for batch in batches])


def keep_divergence(base: Base, items: Sequence[PreferenceItem]) -> None:
    """Estimate the KL divergence from the reference, for KTO: over all rows of a step, before its first batch."""
    base.kept["kl"] = _divergence(base, items)


def _divergence(base: Base, items: Sequence[PreferenceItem]) -> float:
    """Return max(0, mean of log π/π_ref over the items' mismatched rows)."""
    from .preferences.reference import references_of
    from .preferences.scores import log_probabilities

    rows = [item.mismatched for item in items if item.mismatched is not None]
    policy = log_probabilities(base.model, base.processor, rows)
    reference = [values[-1] for values in references_of(base, items)]
    return max(0.0, sum(p - r for p, r in zip(policy, reference, strict=True)) / len(rows))


def _objective(base: Base, items: Sequence[PreferenceItem]) -> Any:
    from .preferences.objective import objective_of

    return objective_of(base.config, len(items[0].answers))


def collate(items: Sequence[PreferenceItem], base: Base, packed: bool = False) -> dict[str, Any]:
    """Return the answers as rows of tokens, [k · items, length], as causal_lm's; `tokens`, `reference`: [items, k]."""
    import torch

    from ..data.preference_items import token_rows
    from . import causal_lm
    from .preferences.reference import references_of

    objective = _objective(base, items)
    batch: dict[str, Any] = causal_lm.collate(token_rows(items), base, packed)
    batch["tokens"] = torch.tensor([[answer.weight for answer in item.answers] for item in items])
    answers = objective.loss.answers
    known = references_of(base, items) if objective.loss.has_reference else [(0.0,) * answers] * len(items)
    batch["reference"] = torch.tensor([values[:answers] for values in known])
    batch["objective"] = objective
    if answers == 1:
        batch["desirable"] = torch.tensor([item.desirable for item in items])
        batch["kl"] = torch.tensor(base.kept.get("kl", 0.0))
    return batch


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Any]:
    """Return pairs for DPO. All tokens count as the answers': how long prompts are is not known from `share`."""
    import torch

    from . import causal_lm
    from .preferences.objective import Objective

    batch: dict[str, Any] = causal_lm.example(2 * rows, size, 1.0, packed)
    tokens = torch.full((rows, 2), size - 1)
    objective = Objective(LossSettings(loss="dpo", beta=0.1))
    return batch | {"tokens": tokens, "reference": torch.zeros(rows, 2), "objective": objective}


def losses(model: Any, batch: dict[str, Any]) -> Tensor:
    from .preferences.scores import scores_of

    scores, objective = scores_of(model, batch), batch["objective"]
    batch["logged"] = objective.figures(scores)
    losses: Tensor = objective.losses(scores)
    return losses


def evaluate(base: Base, items: Sequence[PreferenceItem], batch_size: int) -> dict[str, float]:
    """Return the loss, the rewards, their margin and accuracy; for pairs how often the chosen answer is the likelier.

    An item whose reference is not known, of rows that were not in the run, is compared with the base. A fully
    fine-tuned model alone has no base to be compared with: its loss is NaN then, and it has no rewards.
    """
    from .preferences.measures import measures
    from .preferences.reference import add_references, is_its_own

    objective = _objective(base, items)
    if objective.loss.has_reference:
        alone = is_its_own(base, items)
        add_references(base, items)
        if alone:
            found = measures(base.model, objective, items, batch_size, partial(collate, base=base))
            return {"loss": math.nan} | {name: found[name] for name in ("likelihood_accuracy",) if name in found}
    kept = dict(base.kept)
    try:
        if objective.loss.answers == 1:
            base.kept["kl"] = _divergence(base, items)
        return measures(base.model, objective, items, batch_size, partial(collate, base=base))
    finally:
        base.kept.clear()
        base.kept.update(kept)


def to_predict(config: RunSettings, processor: Any) -> list[Question]:
    """Read the prompts of preferences, or rows of prompts alone as causal_lm does."""
    from ..bases.load import end_tokens
    from ..data.preferences import is_preference, read_preferences
    from ..data.questions import Question
    from ..data.read import read_rows
    from ..data.render import Renderer
    from ..data.shapes import WEIGHT
    from . import causal_lm

    own = part(config, PreferenceSettings)
    rows = read_rows(config.data, config.split)
    names = {theirs: ours for ours, theirs in own.columns.items()}
    if not rows or not is_preference({names.get(name, name): value for name, value in rows[0].values.items()}):
        return causal_lm.to_predict(config, processor)
    every = [replace(row, values={k: v for k, v in row.values.items() if k != WEIGHT}) for row in rows]
    _, preferences = read_preferences(every, own.columns)
    tokenizer, options = causal_lm.chat_tokenizer(own, processor), causal_lm.chat_options(own)
    ends = end_tokens(config.model, config.revision, config.trust_remote_code)
    renderer = Renderer(tokenizer, own.template, options=options, ends=ends)
    return [Question(renderer.prompt(each.answers[0]), each.row) for each in preferences]


def predict(config: RunSettings, base: Base, items: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """Answer, as causal_lm does."""
    from . import causal_lm

    return causal_lm.predict(config, base, items, batch_size)
