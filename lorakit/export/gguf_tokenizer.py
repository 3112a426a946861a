"""A base's tokenizer as the `tokenizer.ggml.*` pairs of a GGUF model.

byte-level BPE (GPT-2's, Llama 3's, Qwen's)     model "gpt2": tokens, types, merges, and how text is cut before merging ("pre")
BPE with byte fallback (Llama 2's, Mistral's)   model "llama": tokens, types and scores; llama.cpp merges as SentencePiece does

llama.cpp holds no regular expression from the file: it knows some by name. Which name is told here by the tokenizer's own
pre-tokenizer, and one that has no name is an error: cut otherwise, text would get other tokens than in training, silently.
Scores are the merges' order: SentencePiece takes the adjacent pair whose token scores highest, BPE the pair that stands first.
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
# (how text is cut, whether a word that is a token is taken whole before merging) -> llama.cpp's name for it
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
    """`pairs`: by their whole keys, as GGUF has them. `warnings`: where llama.cpp may give text other tokens."""

    pairs: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def vocabulary(tokenizer: Any, size: int, eos: int | None = None) -> Vocabulary:
    """Of a transformers tokenizer. `size`: rows of the embedding; tokens are filled up to it. `eos`: the model's, if the tokenizer has none."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LorakitError(
            f"the base's tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json: GGUF is written from that definition"
        )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}; llama.cpp's tokenizers for these architectures are BPE")
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
    for name, number in ids.items():
        if number is not None:
            pairs[f"tokenizer.ggml.{name}_token_id"] = int(number)
    if ids["eos"] is None:
        taken = 2 if spm else 11  # llama.cpp's defaults
        warnings.append(
            f"neither the tokenizer nor the model names an end token; llama.cpp will take token {taken} ({tokens[taken : taken + 1]}) for it"
        )
    pairs |= _added(tokenizer, warnings)
    if tokenizer.chat_template:
        template, broken = chat_template(tokenizer.chat_template)
        if broken:
            warnings.append(f"the base's chat template is broken ({broken}) and left out: llama.cpp takes one of its own")
        else:
            pairs["tokenizer.chat_template"] = template
    return Vocabulary(pairs, warnings)


def chat_template(found: Any) -> tuple[str, str]:
    """(the template, or of several the default one; what is wrong with it, or nothing). It is compiled, and not run."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = found.get("default", next(iter(found.values()), None)) if isinstance(found, dict) else found
    if not isinstance(template, str):
        return "", f"it is a {type(template).__name__}, and no text"
    own = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)  # a tag of transformers'
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).compile(own, raw=True)
    except (TemplateError, RecursionError) as error:
        line, said = getattr(error, "lineno", None), next(iter(str(error).splitlines()), type(error).__name__)
        return template, f"line {line}: {said.rstrip('.')}" if line else said
    return template, ""


def pre_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text. LorakitError for one that it has no name for."""
    steps, parts = [], definition.get("pre_tokenizer") or {}
    for part in parts.get("pretokenizers", [parts] if parts else []):
        steps.append(_step(part))
    cut = tuple(s for s in steps if s != "")
    whole = bool(definition["model"].get("ignore_merges"))
    name = _NAMES.get((cut, whole))
    if name is None:
        raise _unsupported(
            f"llama.cpp has no name that lorakit knows for how it cuts text: {json.dumps(parts, ensure_ascii=False)[:400]}"
            + (", with ignore_merges" if whole else "")
            + f"\n  known: {', '.join(_NAMES.values())}"
        )
    return name


def _step(part: dict[str, Any]) -> str:
    """One step as it stands in `_NAMES`: a regular expression, "digit", nothing for bytes alone; else its own text, which fits none."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return _GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digit"
    expression = (part.get("pattern") or {}).get("Regex")
    # What the expression finds, cut out; or the gaps between what it finds, removed. All of these find every character.
    if kind == "Split" and expression and (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True)):
        return expression
    return json.dumps(part)


def _byte_level(definition: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _unsupported(f"it normalizes text ({json.dumps(normalizer)[:200]}), which llama.cpp does not")
    if normalizer is not None:
        warnings.append("the tokenizer normalizes text (NFC) and llama.cpp does not: text with combining accents may get other tokens")
    merges = [m if isinstance(m, str) else " ".join(part.replace(" ", "Ġ") for part in m) for m in definition["model"]["merges"]]
    merges = merges or ["[none] [none]"]  # llama.cpp wants one; two such texts never meet, as every text begins as bytes
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre_name(definition), "tokenizer.ggml.merges": merges}


def _sentencepiece(definition: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    prefix = _prefix(definition)
    if prefix and (definition.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        warnings.append("text that begins with a space has one space more before it in llama.cpp, as SentencePiece has it")
    off = _inexact(definition["model"])
    if off:
        warnings.append(
            f"the tokenizer does not merge quite as SentencePiece does, and llama.cpp may cut some words otherwise (tokens: {listing(off, 3)})"
        )
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}


def _prefix(definition: dict[str, Any]) -> bool:
    """Whether a space is put before the text. LorakitError where spaces are treated in a way that llama.cpp does not have."""
    normalizer, cut = definition.get("normalizer"), definition.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if cut and cut.get("type") == "Metaspace" and cut.get("replacement") == _SPACE and not cut.get("split", True) and not steps:
        return cut.get("prepend_scheme") != "never"
    prepends = [s for s in steps if s["type"] == "Prepend" and s["prepend"] == _SPACE]
    replaces = [s for s in steps if s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"] == _SPACE]
    cuts = (cut or {}).get("pretokenizers", [cut] if cut else [])
    harmless = all(c.get("type") == "Split" and c.get("pattern") == {"String": " "} for c in cuts)  # no space is left to cut at
    if len(replaces) == 1 and len(prepends) + len(replaces) == len(steps) and harmless:
        return bool(prepends)
    raise _unsupported(
        f"how it treats spaces, normalizer {json.dumps(normalizer)[:200]} and pre-tokenizer {json.dumps(cut)[:200]}, is not llama.cpp's"
    )


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """Of each merged token, the first place at which the merges make it, counted downwards; others 0."""
    scores: dict[str, float] = {}
    for a, b in _pairs(model):
        scores.setdefault(a + b, -float(len(scores)) - 1.0)
    return scores


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in model["merges"]]  # type: ignore[misc]


def _inexact(model: dict[str, Any]) -> list[str]:
    """Tokens that SentencePiece would make of two others where these merges do not, or at another time."""
    vocab, pairs = model["vocab"], _pairs(model)
    known, off, done, last = set(pairs), [], set(), None
    for a, b in pairs:
        if a + b != last:
            if a + b in done:
                off.append(a + b)
            done.add(a + b)
            last = a + b
    for token in vocab:
        if any(token[:i] in vocab and token[i:] in vocab and (token[:i], token[i:]) not in known for i in range(1, len(token))):
            off.append(token)
    return [t for t in dict.fromkeys(off) if not re.fullmatch(r"<.*>", t)]


def _tokens(definition: dict[str, Any], size: int, unknown: int | None, spm: bool) -> tuple[list[str], list[int]]:
    """(texts, types) by id."""
    by_id = {number: (text, NORMAL) for text, number in definition["model"]["vocab"].items()}
    if spm:
        by_id |= {n: (t, BYTE) for n, (t, _) in by_id.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", t)}
    for token in definition.get("added_tokens") or ():
        by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if spm and unknown in by_id:
        by_id[unknown] = (by_id[unknown][0], UNKNOWN)
    most = max(by_id, default=-1)
    if most >= size:
        raise LorakitError(
            f"the tokenizer has tokens up to {most}, the embedding has {size} rows\n  are tokenizer and model of one base? resize the embedding and save it first"
        )
    if len(by_id) < size // 10:
        raise LorakitError(
            f"the tokenizer has {len(by_id):,} tokens, and the embedding {size:,} rows: nearly all would be padding\n"
            "  is it the model's own tokenizer, and whole?"
        )
    filled = [by_id.get(n, (f"[PAD{n}]", UNUSED)) for n in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _added(tokenizer: Any, warnings: list[str]) -> dict[str, bool]:
    """Whether the tokenizer puts its begin and end token around a text, found by trying."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    for found, own, where in ((before, tokenizer.bos_token_id, "before"), (after, tokenizer.eos_token_id, "after")):
        if found not in ([], [own]):
            warnings.append(f"the tokenizer puts tokens {found} {where} each text, which llama.cpp will not")
    return {
        "tokenizer.ggml.add_bos_token": before == [tokenizer.bos_token_id],
        "tokenizer.ggml.add_eos_token": after == [tokenizer.eos_token_id],
    }


def _id(value: Any) -> int | None:
    return None if value is None else int(value)


def _unsupported(what: str) -> LorakitError:
    return LorakitError(
        f"the base's tokenizer cannot be written as GGUF: {what}\n  lorakit merge writes a transformers folder, which llama.cpp's own converter may know"
    )
