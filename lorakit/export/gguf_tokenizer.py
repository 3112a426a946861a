"""Convert a base's tokenizer to the `tokenizer.ggml.*` pairs of a GGUF model.

byte-level BPE (GPT-2, Llama 3, Qwen)     model "gpt2": tokens, types, merges, and the name of the pre-tokenizer ("pre")
BPE with byte fallback (Llama 2, Mistral) model "llama": tokens, types and scores; llama.cpp merges like SentencePiece

llama.cpp does not read the pre-tokenizer's regular expression from the file; it knows a fixed set by name. The name is
found from the tokenizer's definition. A pre-tokenizer without a name is an error, because text would silently get other
tokens than in training. Scores encode the merge order: SentencePiece merges the adjacent pair with the highest score,
BPE the pair listed first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import LorakitError, listing

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CASED_2 = r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_REST_2 = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (pre-tokenizer steps, whether a word that is a token skips merging: ignore_merges) -> llama.cpp's name
_NAMES = {
    ((_GPT2,), False): "gpt-2",
    (("digit", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_CASED + _CASED_2 + r"|\p{N}" + _REST_2,), True): "tekken",
    ((f"{_CASED}{_WORDS}?{_CASED_2}{_WORDS}?" + r"|\p{N}{1,3}" + _REST_2,), False): "gpt-4o",
}
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """`pairs`: by GGUF's full keys. `warnings`: where llama.cpp may tokenize text differently."""

    pairs: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def vocabulary(tokenizer: Any, size: int, eos: int | None = None) -> Vocabulary:
    """Read the vocabulary of a transformers tokenizer.

    size: rows of the embedding; the vocabulary is padded to it. eos: the model's end token, used if the tokenizer has
        none.
    LorakitError for a tokenizer that llama.cpp cannot reproduce.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LorakitError(
            f"the base's tokenizer is a {type(tokenizer).__name__} without a tokenizer.json, from which GGUF is written"
        )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}; expected BPE, as in llama.cpp for these architectures")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unsupported(f"its BPE has a {key} ({model[key]!r})")
    warnings: list[str] = []
    spm = bool(model.get("byte_fallback"))
    pairs = _sentencepiece(definition, warnings) if spm else _byte_level(definition, warnings)
    tokens, types = _tokens(definition, size, _id(tokenizer.unk_token_id), spm)
    pairs |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if spm:
        scores = _scores(model)
        pairs["tokenizer.ggml.scores"] = [scores.get(t, 0.0) for t in tokens]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    if ids["eos"] is None:
        ids["eos"] = eos
    for name, token_id in ids.items():
        if token_id is not None:
            pairs[f"tokenizer.ggml.{name}_token_id"] = int(token_id)
    if ids["eos"] is None:
        default = 2 if spm else 11  # llama.cpp's
        warnings.append(
            f"neither tokenizer nor model has an end token; llama.cpp uses {default} ({tokens[default : default + 1]})"
        )
    pairs |= _added(tokenizer, warnings)
    if tokenizer.chat_template:
        template, broken = chat_template(tokenizer.chat_template)
        if broken:
            warnings.append(
                f"the base's chat template is invalid ({broken}) and left out: llama.cpp will use its default"
            )
        else:
            pairs["tokenizer.chat_template"] = template
    return Vocabulary(pairs, warnings)


def chat_template(templates: Any) -> tuple[str, str]:
    """Return (the template, or the default one of several; its error, or ""). It is compiled but not run."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    named = templates if isinstance(templates, dict) else {"default": templates}
    template = named.get("default", next(iter(named.values()), None))
    if not isinstance(template, str):
        return "", f"expected text, got {type(template).__name__}"
    standard = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)  # a tag only transformers knows
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).compile(standard, raw=True)
    except (TemplateError, RecursionError) as error:
        line, message = getattr(error, "lineno", None), next(iter(str(error).splitlines()), type(error).__name__)
        return template, f"line {line}: {message.rstrip('.')}" if line else message
    return template, ""


def pre_name(definition: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer. Raises LorakitError if it has none."""
    steps, parts = [], definition.get("pre_tokenizer") or {}
    for part in parts.get("pretokenizers", [parts] if parts else []):
        steps.append(_step(part))
    ignore_merges = bool(definition["model"].get("ignore_merges"))
    name = _NAMES.get((tuple(s for s in steps if s != ""), ignore_merges))
    if name is None:
        raise _unsupported(
            f"llama.cpp has no known name for its pre-tokenizer: {json.dumps(parts, ensure_ascii=False)[:400]}"
            + (", with ignore_merges" if ignore_merges else "")
            + f"\n  known: {', '.join(_NAMES.values())}"
        )
    return name


def _step(part: dict[str, Any]) -> str:
    """Spell a step as in `_NAMES`: a regular expression, "digit", or "" for bytes;
    else its JSON, which matches none.
    """
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return _GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digit"
    expression = (part.get("pattern") or {}).get("Regex")
    # Isolate the matches, or remove the gaps between them: the same here, as these expressions match every character.
    if (
        kind == "Split"
        and expression
        and (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
    ):
        return expression
    return json.dumps(part)


def _byte_level(definition: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _unsupported(f"it normalizes text ({json.dumps(normalizer)[:200]}), which llama.cpp does not support")
    if normalizer is not None:
        warnings.append(
            "the tokenizer normalizes text (NFC), llama.cpp does not: combining accents may get other tokens"
        )
    merges = [
        m if isinstance(m, str) else " ".join(part.replace(" ", "Ġ") for part in m)
        for m in definition["model"]["merges"]
    ]
    merges = merges or ["[none] [none]"]  # llama.cpp requires one; this one never applies, as all text starts as bytes
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre_name(definition), "tokenizer.ggml.merges": merges}


def _sentencepiece(definition: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    prefix = _prefix(definition)
    if prefix and (definition.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        warnings.append("llama.cpp, like SentencePiece, adds one more space before text that begins with a space")
    inexact = _inexact(definition["model"])
    if inexact:
        warnings.append(
            "the tokenizer's merges differ from SentencePiece's; llama.cpp may split some words differently "
            f"(tokens: {listing(inexact, 3)})"
        )
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}


def _prefix(definition: dict[str, Any]) -> bool:
    """Whether a space is added before the text. Raises LorakitError if llama.cpp cannot treat spaces the same way."""
    normalizer, pre_tokenizer = definition.get("normalizer"), definition.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    metaspace = pre_tokenizer if pre_tokenizer and pre_tokenizer.get("type") == "Metaspace" else None
    if metaspace and metaspace.get("replacement") == _SPACE and not metaspace.get("split", True) and not steps:
        return metaspace.get("prepend_scheme") != "never"
    prepends = [s for s in steps if s["type"] == "Prepend" and s["prepend"] == _SPACE]
    replaces = [
        s for s in steps if s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"] == _SPACE
    ]
    splits = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    # no spaces are left to split at
    harmless = all(s.get("type") == "Split" and s.get("pattern") == {"String": " "} for s in splits)
    if len(replaces) == 1 and len(prepends) + len(replaces) == len(steps) and harmless:
        return bool(prepends)
    raise _unsupported(
        f"it treats spaces differently from llama.cpp: normalizer {json.dumps(normalizer)[:200]}, "
        f"pre-tokenizer {json.dumps(pre_tokenizer)[:200]}"
    )


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """Return the scores of merged tokens: minus the position of the first merge that produces each, from -1 down.

    Others have 0.
    """
    scores: dict[str, float] = {}
    for a, b in _pairs(model):
        scores.setdefault(a + b, -float(len(scores)) - 1.0)
    return scores


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, which newer files write as pairs and older ones as one text with a space between."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _inexact(model: dict[str, Any]) -> list[str]:
    """Find tokens that SentencePiece would merge from two others where these merges do not, or in a different order."""
    vocab, pairs = model["vocab"], _pairs(model)
    known, inexact, seen, last = set(pairs), [], set(), None
    for a, b in pairs:
        if a + b != last:
            if a + b in seen:
                inexact.append(a + b)
            seen.add(a + b)
            last = a + b
    for token in vocab:
        if any(
            token[:i] in vocab and token[i:] in vocab and (token[:i], token[i:]) not in known
            for i in range(1, len(token))
        ):
            inexact.append(token)
    return [t for t in dict.fromkeys(inexact) if not re.fullmatch(r"<.*>", t)]


def _tokens(definition: dict[str, Any], size: int, unknown: int | None, spm: bool) -> tuple[list[str], list[int]]:
    """Return (texts, types), indexed by token id and padded to `size`. `unknown`: id of the unknown token."""
    by_id = {token_id: (text, NORMAL) for text, token_id in definition["model"]["vocab"].items()}
    if spm:
        by_id |= {n: (t, BYTE) for n, (t, _) in by_id.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", t)}
    for token in definition.get("added_tokens") or ():
        by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if spm and unknown in by_id:
        by_id[unknown] = (by_id[unknown][0], UNKNOWN)
    last = max(by_id, default=-1)
    if last >= size:
        raise LorakitError(
            f"the tokenizer has token ids up to {last}, but the embedding has only {size} rows\n"
            "  use the tokenizer of this model, or resize the embedding and save it first"
        )
    if len(by_id) < size // 10:
        raise LorakitError(
            f"the tokenizer has {len(by_id):,} tokens, but the embedding has {size:,} rows: most would be padding\n"
            "  check that the tokenizer is complete and belongs to this model"
        )
    padded = [by_id.get(n, (f"[PAD{n}]", UNUSED)) for n in range(size)]
    return [text for text, _ in padded], [kind for _, kind in padded]


def _added(tokenizer: Any, warnings: list[str]) -> dict[str, bool]:
    """Whether the tokenizer adds its begin and end tokens around a text, tested on a sample."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]
    for added, own, where in ((before, tokenizer.bos_token_id, "before"), (after, tokenizer.eos_token_id, "after")):
        if added not in ([], [own]):
            warnings.append(f"the tokenizer adds tokens {added} {where} each text; llama.cpp will not")
    return {
        "tokenizer.ggml.add_bos_token": before == [tokenizer.bos_token_id],
        "tokenizer.ggml.add_eos_token": after == [tokenizer.eos_token_id],
    }


def _id(value: Any) -> int | None:
    return None if value is None else int(value)


def _unsupported(what: str) -> LorakitError:
    return LorakitError(
        f"the base's tokenizer cannot be written as GGUF: {what}\n"
        "  lorakit merge writes a transformers folder, which llama.cpp's own converter may support"
    )
