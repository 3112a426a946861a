"""A real CLIP tokenizer (vocab.json, merges.txt) in which every word of our captions is one token.

Byte-pair encoding is trained on the list of words until each is one piece; any other word is spelled in smaller pieces
down to single bytes, as in CLIP. (`tokenizers` has a trainer, but it breaks ties between pairs at random, and here
nearly all are ties: the same words would get other numbers in every process.)
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from lorakit.reproduce.emoji.captions import all_words

LENGTH = 24  # tokens of a prompt, with the start and the end
START, END = "<|startoftext|>", "<|endoftext|>"


def merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with every occurrence of a pair joined."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one piece: the most frequent pair first, of equals the first by name."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        spelled = [merged(pieces, pair) for pieces in spelled]
    return merges


def make_tokenizer() -> CLIPTokenizer:
    """Vocabulary in CLIP's order: 256 bytes, the same at the end of a word, merges, start, end."""
    words = list(all_words())
    merges = learn_merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise RuntimeError(f"caption words of more than one token: {split}")
    return tokenizer
