"""Answers that are held to a JSON schema: read back by json, beside masks counted by hand; and schemas that harm."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from importlib.resources import files

import pytest
import tiny_lm
import tiny_tokenizers
import torch

from lorakit.serve.embedded import grammar, schema_compiler
from lorakit.serve.embedded.grammar import Grammars, forbid
from lorakit.serve.embedded.picking import Picking, pick
from lorakit.serve.engine import Sampling
from lorakit.serve.errors import Cannot

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
NEVER_COMPILED = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(30)]}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files("lorakit") / "assets" / "tiny-lm"))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


@pytest.fixture(scope="module")
def byte_grammars():
    return Grammars(tiny_lm.tokenizer())


def start(grammars, schema, *, max_tokens=400, prompt=(), **settings) -> Picking:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    sampling = Sampling(max_tokens=max_tokens, schema=text, **settings)
    return Picking(sampling, prompt, grammars.matcher(text), "cpu")


def random_answers(rows, vocab, *, prefer=(), steps=400):
    """Pick from random logits until all answers end. Return the ids and ends. prefer: tokens with a high logit."""
    source = torch.Generator().manual_seed(0)
    ids, ends = [[] for _ in rows], [None] * len(rows)
    for _ in range(steps):
        going = [at for at, end in enumerate(ends) if end is None]
        if not going:
            break
        logits = torch.randn(len(going), vocab, generator=source)
        logits[:, list(prefer)] += 30.0
        for at, picked in zip(going, pick(logits, [rows[at] for at in going]), strict=True):
            ids[at] += [] if picked.id is None else [picked.id]
            ends[at] = picked.error or picked.finish
    return ids, ends


def allowed(matcher, vocab, ends=()):
    """The tokens that a matcher allows, as a set."""
    scores = torch.zeros(1, vocab)
    forbid(scores, [(0, matcher, ends)])
    return set((scores[0] == 0).nonzero()[:, 0].tolist())


# ------------------------------------------------------------------------------------------------------ answers


def test_random_tokens_make_an_answer_that_satisfies_the_schema(tokenizer, grammars):
    likely = [tokenizer.convert_tokens_to_ids(text) for text in ('"', "}", "]", "1", ",")]
    rows = [start(grammars, PERSON, seed=seed, temperature=0.0 if seed % 3 == 0 else 1.0) for seed in range(9)]
    texts = set()
    for ids, end in zip(*random_answers(rows, len(tokenizer), prefer=likely), strict=True):
        assert end == "stop"
        text = tokenizer.decode(ids)
        texts.add(text)
        value = json.loads(text)
        assert list(value) == ["name", "age", "kind", "tags"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150
        assert value["kind"] in ("cat", "dog")
        assert len(value["tags"]) <= 3
        assert all(tag in (True, False) for tag in value["tags"])
    assert len(texts) > 1


def test_an_empty_schema_is_any_json(tokenizer, grammars):
    rows = [start(grammars, schema, seed=seed) for seed in range(4) for schema in ("{}", "true")]
    closing = [tokenizer.convert_tokens_to_ids(text) for text in ('"', "}", "]")]
    for ids, end in zip(*random_answers(rows, len(tokenizer), prefer=closing), strict=True):
        assert end == "stop"
        json.loads(tokenizer.decode(ids))


SCHEMAS = {
    "pydantic": {
        "$defs": {
            "Address": {
                "type": "object",
                "title": "Address",
                "properties": {
                    "street": {"type": "string", "maxLength": 5},
                    "zip": {"pattern": "^[0-9]{5}$", "type": "string"},
                },
                "required": ["street", "zip"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {
            "home": {"$ref": "#/$defs/Address"},
            "work": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}], "default": None},
            "size": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
            "step": {"type": "integer", "multipleOf": 5, "minimum": -20, "maximum": 20},
        },
        "required": ["home", "work", "size", "step"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    "union": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}},
                "required": ["kind"],
                "additionalProperties": False,
            }
            for kind in ("circle", "square")
        ]
    },
    "all": {"allOf": [{"type": "string", "minLength": 3}, {"type": "string", "pattern": "^[a-c]*$", "maxLength": 6}]},
    "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "minItems": 2, "items": False},
    "free": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_validator_accepts_what_random_tokens_make_of_a_schema(tokenizer, grammars, name):
    jsonschema = pytest.importorskip("jsonschema")
    closing = [tokenizer.convert_tokens_to_ids(text) for text in ('"', "}", "]", ",")]
    rows = [start(grammars, SCHEMAS[name], seed=seed) for seed in range(5)]
    for ids, end in zip(*random_answers(rows, len(tokenizer), prefer=closing), strict=True):
        assert end == "stop"
        jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMAS[name])


def test_masks_are_those_counted_by_hand(byte_grammars):
    tokenizer = tiny_lm.tokenizer()
    matcher = byte_grammars.matcher(json.dumps({"enum": ["ab", "abc", "b"]}))
    seen = []
    for letter in '"abc"':
        seen.append("".join(sorted(tokenizer.decode(list(allowed(matcher, len(tokenizer)))))))
        assert matcher.add(tokenizer.convert_tokens_to_ids(letter)) is None
    assert seen == ['"', "ab", "b", '"c', '"']
    assert matcher.ended


def test_json_may_be_written_compactly_or_with_a_space_after_comma_and_colon_and_not_otherwise(tokenizer, grammars):
    schema = json.dumps({"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}})

    def takes(text):
        matcher = grammars.matcher(schema)
        for token in tokenizer.encode(text, add_special_tokens=False):
            if token not in allowed(matcher, len(tokenizer)):
                return False
            assert matcher.add(token) is None
        return matcher.ended

    value = {"a": [1, 2], "é": [], "": [-3]}
    assert takes(json.dumps(value))
    assert takes(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
    for text in (json.dumps(value, indent=1), '{"a":  [1]}', '{ "a": [1]}', '\n{"a": [1]}'):
        assert not takes(text)


# --------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("end", [7, 1])  # 1 is the tokenizer's own end token
def test_an_end_token_is_allowed_where_the_answer_satisfies_the_schema_and_nowhere_else(byte_grammars, end):
    tokenizer = tiny_lm.tokenizer()
    row = start(byte_grammars, {"type": "integer"}, temperature=0.0, stop_ids=frozenset({end}))
    logits = torch.zeros(1, len(tokenizer))
    logits[0, end] = 9.0  # it would always end
    logits[0, tokenizer.convert_tokens_to_ids("4")] = 1.0
    assert [one.finish for _ in range(2) for one in pick(logits, [row])] == [None, "stop"]
    assert row.length == 1


def test_an_answer_to_a_request_without_stop_tokens_still_ends(byte_grammars):
    row = start(byte_grammars, {"type": "integer"}, seed=0)
    assert random_answers([row], 258, prefer=[tiny_lm.EOS])[1] == ["stop"]


def test_the_last_token_of_a_complete_answer_is_part_of_it_and_no_step_follows(byte_grammars):
    row = start(byte_grammars, {"const": 7}, temperature=0.0, stop_ids=frozenset({1}))
    (picked,) = pick(torch.zeros(1, 258), [row])
    assert tiny_lm.tokenizer().decode([picked.id]) == "7"
    # Whether "7" is the end is known at once, or when the end token is all that is left.
    assert picked.finish == "stop" or pick(torch.zeros(1, 258), [row])[0].finish == "stop"


def test_an_answer_cut_by_max_tokens_says_so(byte_grammars):
    row = start(byte_grammars, {"type": "string", "minLength": 50}, max_tokens=10, seed=1)
    ids, ends = random_answers([row], 258)
    assert ends == ["length"]
    assert len(ids[0]) == 10


# ---------------------------------------------------------------------------------- beside the other settings


def test_neither_bias_nor_penalties_lead_out_of_the_schema(byte_grammars):
    tokenizer = tiny_lm.tokenizer()
    brace = tokenizer.convert_tokens_to_ids("{")
    row = start(
        byte_grammars, {"enum": [True]}, temperature=0.0, logit_bias=((brace, 100.0),), repetition=5.0, presence=-2.0
    )
    ids, ends = random_answers([row], len(tokenizer))
    assert (tokenizer.decode(ids[0]), ends) == ("true", ["stop"])


def test_rows_without_a_schema_are_picked_as_if_alone(byte_grammars):
    logits = torch.randn(3, 258, generator=torch.Generator().manual_seed(0))
    plain = [Picking(Sampling(max_tokens=9, seed=seed), (), None, "cpu") for seed in (1, 1)]
    held = start(byte_grammars, {"type": "boolean"}, seed=3)
    together = pick(logits, [plain[0], held, plain[0]])
    assert together[0] == pick(logits[:1], [plain[1]])[0]
    assert tiny_lm.tokenizer().decode([together[1].id]) in "tf"


@pytest.mark.parametrize("vocab", [4100, 5000])
def test_logits_may_have_more_tokens_than_the_tokenizer(grammars, tokenizer, vocab):
    row = start(grammars, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, seed=0)
    ids, ends = random_answers([row], vocab)
    assert ends == ["stop"]
    assert isinstance(json.loads(tokenizer.decode(ids[0])), list)


def test_a_tokenizer_without_an_end_token_keeps_all_of_its_tokens():
    tokenizer = tiny_tokenizers.byte_bpe()
    assert tokenizer.eos_token_id is None
    matcher = Grammars(tokenizer, ends=[5]).matcher(json.dumps({"type": "string"}))
    assert matcher.ends == {5}
    assert matcher.add(tokenizer.convert_tokens_to_ids('"')) is None
    assert tokenizer.convert_tokens_to_ids("!") == 0  # which llguidance takes for the end if none is given
    assert 0 in allowed(matcher, len(tokenizer))
    assert matcher.add(0) is None
    assert not matcher.ended


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("5", "expected a JSON object"),
        ("false", "expected a JSON object"),
        ('{"type": "integr"}', "integr"),
        ('{"not": {}}', "not"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
        ('{"enum": []}', "empty"),
        ('{"$ref": "#/$defs/absent"}', "absent"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        (json.dumps({"type": "string", "pattern": "(" * 3000 + "a" + ")" * 3000}), "pattern|regex"),
        ('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "cannot be used"),
        ("\ud800", "not JSON"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_schema_that_does_not_work_is_refused_by_what_is_wrong_with_it(byte_grammars, schema, words):
    with pytest.raises(Cannot, match=words) as refused:
        byte_grammars.matcher(schema)
    assert refused.value.what == "schema"
    assert len(str(refused.value)) < 500


def test_a_schema_that_would_compile_without_end_is_refused_in_bounded_time(byte_grammars, monkeypatch):
    monkeypatch.setattr(schema_compiler, "CPU_SECONDS", 1)
    with pytest.raises(Cannot, match="more than 1 s"):
        byte_grammars.matcher(json.dumps(NEVER_COMPILED))
    monkeypatch.setattr(subprocess, "run", None)  # a second request for it does not try again
    with pytest.raises(Cannot, match="more than 1 s"):
        byte_grammars.matcher(json.dumps(NEVER_COMPILED))


def test_where_processes_have_no_limits_the_clock_counts(byte_grammars, monkeypatch):
    monkeypatch.setattr(grammar, "PATIENCE", 0.5)
    with pytest.raises(Cannot, match=r"more than 0\.5 s"):
        byte_grammars.matcher(json.dumps({**NEVER_COMPILED, "description": "another one"}))


def test_a_tokenizer_that_llguidance_cannot_read_is_refused():
    with pytest.raises(Cannot, match="JSON schemas do not work with this base's"):
        Grammars(tiny_tokenizers.wordpiece()).matcher("{}")


def test_without_llguidance_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Cannot, match=r"pip install 'lorakit\[serve\]'"):
        Grammars(tiny_lm.tokenizer()).matcher("{}")


def test_a_row_whose_grammar_fails_gets_an_error_and_its_grammar_is_compiled_anew(monkeypatch):
    grammars = Grammars(tiny_lm.tokenizer())
    schema = json.dumps({"type": "array", "items": {"type": "integer"}})
    monkeypatch.setattr(grammar, "FIRST_SECONDS", -1.0)
    tired = start(grammars, schema, temperature=0.0)
    monkeypatch.undo()
    good = start(grammars, schema, temperature=0.0)
    picked = pick(torch.zeros(2, 258), [tired, good])
    assert picked[0].error is not None
    assert "too much processor time" in str(picked[0].error)
    assert picked[1].error is None
    assert not grammars._known
    lost = start(grammars, schema)
    error = lost.grammar.add(9)  # not a token that was allowed
    assert error is not None
    assert not lost.grammar.ended


# -------------------------------------------------------------------------------------------------------- cache


def test_a_schema_is_compiled_once_and_each_answer_stands_where_it_stands(monkeypatch):
    grammars, runs, real = Grammars(tiny_lm.tokenizer()), [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: runs.append(args) or real(*args, **options))
    schema = json.dumps({"enum": ["ab", "ba"]})
    found = []
    threads = [threading.Thread(target=lambda: found.append(grammars.matcher(schema))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(runs) == 1
    tokenizer = tiny_lm.tokenizer()
    assert found[0].add(tokenizer.convert_tokens_to_ids('"')) is None
    assert allowed(found[0], 258) == {tokenizer.convert_tokens_to_ids(letter) for letter in "ab"}
    assert allowed(found[1], 258) == {tokenizer.convert_tokens_to_ids('"')}


def test_the_least_recently_used_grammars_are_dropped(monkeypatch):
    monkeypatch.setattr(grammar, "_problem", lambda schema: None)
    grammars = Grammars(tiny_lm.tokenizer(), kept=2)
    texts = [json.dumps({"const": number}) for number in range(3)]
    grammars.matcher(texts[0])
    grammars.matcher(texts[1])
    grammars.matcher(texts[0])
    first = set(grammars._known)
    grammars.matcher(texts[2])
    assert len(grammars._known) == 2
    assert len(first & set(grammars._known)) == 1
    grammars.matcher(texts[0])
    assert len(first & set(grammars._known)) == 1  # it was still there


def test_the_event_loop_goes_on_while_a_schema_is_compiled_and_known_schemas_do_not_wait(monkeypatch):
    grammars = Grammars(tiny_lm.tokenizer())
    grammars.matcher("{}")
    slow, real = threading.Event(), subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: slow.wait(20) and real(*args, **options))

    async def scenario():
        waiting = asyncio.create_task(grammars.compiled('{"const": 5}'))
        await asyncio.sleep(0.05)
        known = await asyncio.wait_for(grammars.compiled("{}"), 5)
        assert not waiting.done()
        slow.set()
        return known, await waiting

    known, compiled = asyncio.run(scenario())
    assert len(allowed(known, 258)) > len(allowed(compiled, 258))
    grammars.close()
