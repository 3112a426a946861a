"""An answer's text while its tokens arrive, compared with decoding all of them at once."""

from __future__ import annotations

import random

import pytest
import tiny_lm
import tiny_tokenizers

from lorakit.bases.load import load_tokenizer
from lorakit.serve.answer_text import AnswerText, TokenTexts
from lorakit.serve.partial_end import partial_end

TEXTS = [
    "Ada lives in Abuja.",
    "  two spaces,\n\nlines\tand tabs ",
    "é ü € 日本語 😀 👩‍👩‍👧 naïve",
    "x",
    " ",
    "Who lives in Abuja? Ada." * 20,
]


def sentencepiece():
    """Metaspace with bytes for what it does not know, as Llama 2 and Mistral have."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", *sorted(set("Ada lives in Abuja.Who?") - {" "})]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "li", "▁li", "iv"]
    merges = [("l", "i"), ("▁", "li"), ("i", "v")]
    raw = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": tiny_lm.tokenizer,
    "byte_bpe": tiny_tokenizers.byte_bpe,
    "byte_bpe_prefix_space": tiny_tokenizers.byte_bpe_prefix_space,
    "sentencepiece": sentencepiece,
    "wordpiece": tiny_tokenizers.wordpiece,
    "embedded": lambda: load_tokenizer("embedded"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def texts(tokenizer):
    return TokenTexts(tokenizer)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(texts, ids, stop=(), keep=(), step=1) -> tuple[list[str], AnswerText]:
    answer = AnswerText(texts, stop, keep)
    found = [answer.feed(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*found, answer.finish()], answer


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_joined_are_the_text_decoded_at_once(tokenizer, texts, text, step):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found, _ = pieces(texts, ids, step=step)
    assert "".join(found) == decoded(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in found)


def test_any_ids_give_what_decoding_gives(tokenizer, texts):
    """Also ids that no text has: special tokens in between, and bytes that are no characters."""
    draw = random.Random(0)
    for _ in range(60):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randint(1, 40))]
        if any(tokenizer.convert_ids_to_tokens(token).startswith("<0x") for token in ids):
            continue  # a run of broken bytes is decoded anew when one more byte joins it; what was sent stays sent
        found, _ = pieces(texts, ids)
        assert "".join(found) == decoded(tokenizer, ids)


def test_a_character_is_sent_when_its_last_byte_has_come(texts, tokenizer):
    ids = tokenizer.encode("😀 a", add_special_tokens=False)
    if len(ids) < 4 or decoded(tokenizer, ids).strip() != "😀 a":
        pytest.skip("this tokenizer has no tokens that are parts of a character")
    found, _ = pieces(texts, ids)
    assert next(piece.strip() for piece in found if piece.strip()) == "😀"


def test_bytes_that_never_become_a_character_come_at_the_end():
    texts = TokenTexts(tiny_lm.tokenizer())
    ids = texts.tokenizer.encode("a€")
    found, _ = pieces(texts, ids[:-1])
    assert found == ["a", "", "", "\ufffd"]


def test_special_tokens_are_left_out_unless_kept():
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(["[TOOL_CALLS]", "[ARGS]"], special_tokens=True)
    tokenizer.add_tokens(["<plain>"])
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("so [TOOL_CALLS] name<plain>[ARGS]{}", add_special_tokens=False)
    calls, args = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"])
    assert "".join(pieces(texts, ids)[0]) == decoded(tokenizer, ids) == "so  name<plain>{}"
    assert "".join(pieces(texts, ids, keep={calls, args})[0]) == "so [TOOL_CALLS] name<plain>[ARGS]{}"
    assert "".join(pieces(texts, ids, keep={args})[0]) == "so  name<plain>[ARGS]{}"


# ------------------------------------------------------------------------------------------ stop texts

STOPS = [
    ["lives"],
    ["\n\n"],
    ["ja", "Abuja."],
    [" in", "n A", "e"],
    ["no such text"],
    ["日本"],
    ["Ada Ada", "."],
    ["😀"],
]


def expected(tokenizer, ids, stop) -> tuple[str, bool]:
    """As `lorakit.generate` ends an answer: after the token that completes one, before the earliest of the texts."""
    for count in range(1, len(ids) + 1):
        text = decoded(tokenizer, ids[:count])
        if any(each in text for each in stop):
            return text[: min(at for each in stop if (at := text.find(each)) >= 0)], True
    return decoded(tokenizer, ids), False


@pytest.mark.parametrize("stop", STOPS)
def test_an_answer_ends_before_its_first_stop_text(tokenizer, texts, stop):
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole, stopped = expected(tokenizer, ids, stop)
        for step in (1, 4):
            found, answer = pieces(texts, ids, stop, step=step)
            assert ("".join(found), answer.stopped) == (whole, stopped)
        if stopped:
            assert answer.feed(ids) == ""


def test_nothing_is_sent_that_may_become_a_stop_text():
    texts = TokenTexts(tiny_lm.tokenizer())
    ids = texts.tokenizer.encode("ab ENx ENDab")
    found, answer = pieces(texts, ids, ["END"])
    assert found == ["a", "b", " ", "", "", "ENx", " ", "", "", "", "", "", ""]
    assert answer.stopped
    cut, answer = pieces(texts, ids[:5], ["END"])
    assert ("".join(cut), answer.stopped) == ("ab EN", False)  # held back, and given at the end


def test_empty_stop_texts_stop_nothing(texts, tokenizer):
    found, answer = pieces(texts, tokenizer.encode("Ada", add_special_tokens=False), ["", "zz"])
    assert not answer.stopped
    assert "".join(found)


@pytest.mark.parametrize("seed", range(5))
def test_partial_end_is_the_longest_ending_that_begins_one(seed):
    draw = random.Random(seed)
    for _ in range(300):
        text = "".join(draw.choices("ab", k=draw.randint(0, 12)))
        beginnings = ["".join(draw.choices("ab", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 3))]
        lengths = [n for n in range(1, len(text) + 1) for b in beginnings if n < len(b) and b.startswith(text[-n:])]
        assert partial_end(text, beginnings) == max(lengths, default=0), (text, beginnings)


# ------------------------------------------------------------------------------------------ cost, and single tokens


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        self.ids += len(ids)
        return self.tokenizer.decode(ids, **options)


def test_decoding_is_linear_in_the_answers_length():
    counting = Counting(tiny_lm.tokenizer())
    texts = TokenTexts(counting)
    for text, most in (("Ada lives in Abuja. ", 6), ("日本語", 12), ("\ufffd", 40)):
        ids = counting.encode(text) * 200
        counting.ids = 0
        pieces(texts, ids)
        assert counting.ids < most * len(ids)
    broken = [counting.encode("€")[0]] * 500  # first bytes of a character, again and again
    counting.ids = 0
    pieces(texts, broken)
    assert counting.ids < 40 * len(broken)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, texts, text):
    if "[CLS]" in tokenizer.get_vocab():
        text = "who lives in abuja? ada."  # WordPiece lowers and drops; this it gives back as it is
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(texts.bytes, ids)).decode()
    if "[CLS]" in tokenizer.get_vocab():
        joined, text = joined.replace(" ", ""), text.replace(" ", "")  # it puts a space before "?" first, then none
    assert joined.lstrip(" ") == text.lstrip(" ")


def test_a_token_that_is_part_of_a_character_is_named_by_its_bytes():
    texts = TokenTexts(tiny_lm.tokenizer())
    euro = texts.tokenizer.encode("€")
    assert [texts.text(token) for token in euro] == [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]
    assert [texts.bytes(token) for token in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert texts.text(texts.tokenizer.eos_token_id) == "</s>"
    assert texts.text(10_000) == ""  # a padded vocabulary has rows without tokens
