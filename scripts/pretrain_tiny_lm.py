"""Make the embedded base model: a byte-level BPE tokenizer and a 5.9-million-parameter Llama, from public-domain text.

    python scripts/pretrain_tiny_lm.py --text TEXT --work RUN --out lorakit/assets/tiny-lm

TEXT holds `books_pd.tar.xz` (171 public-domain English books, Markdown, from mlschmitt/classic-books-markdown) and
`tinystories_2MiB_original_case.txt` (2,316 stories, CDLA-Sharing-1.0). Nothing else is read; no task data is.

Three kinds of rows are mixed:
  books and stories   next-token prediction on the plain text, documents separated by `<|endoftext|>`;
  keywords-to-text    one sentence of the same text, given a few of its phrases first, `word[grey hat], place[the
                      hill]`,
                      some of them replaced in both places by phrases from elsewhere so that they must be copied, not
                      recalled. A model this small otherwise never learns to copy. Loss only on the sentence.

Hidden matrices are trained by Muon, embeddings and norms by AdamW; warm-up, a constant rate, then a linear decay over
the last quarter (in that quarter rows are 512 tokens long instead of 256). Until the decay begins the run does not
depend on --steps, so a longer run may continue a shorter one. Stopped at any time, it continues from RUN/last.pt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20211017  # the day version 2 of the LoRA paper appeared
END, PAD = "<|endoftext|>", "<|pad|>"
TOKENS_PER_STEP = 8192
COPY_SHARE, STORY_SHARE = 0.20, 0.10  # of the rows; the rest are books
HELD_OUT_BOOKS = {"L_Frank_Baum_Ozma_of_Oz.md", "Robert_Louis_Stevenson_Treasure_Island.md"}
HELD_OUT_STORIES = 100
KEYS = [
    "word",
    "name",
    "place",
    "thing",
    "near",
    "who",
    "what",
    "where",
    "when",
    "type",
    "food",
    "area",
    "time",
    "colour",
    "price",
    "person",
    "animal",
    "kind",
    "rating",
    "part",
]


# ---------------------------------------------------------------------------------------------- text


def clean(markdown: str) -> str:
    """A book's prose: header and markup dropped, straight quotes, one line per paragraph."""
    body = markdown.split("-------", 1)[-1]
    body = re.sub(r"[*_`]+|!\[[^\]]*\]\([^)]*\)", "", body)
    body = body.translate(str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " "}))
    paragraphs = (" ".join(p.split()) for p in body.split("\n\n"))
    return "\n".join(p for p in paragraphs if p and not p.startswith("#"))


def read_text(folder: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Returns training books, training stories, held-out books, held-out stories."""
    books, held = [], []
    with tarfile.open(folder / "books_pd.tar.xz") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith(".md"):
                text = clean(tar.extractfile(member).read().decode("utf8"))
                (held if Path(member.name).name in HELD_OUT_BOOKS else books).append(text)
    raw = (folder / "tinystories_2MiB_original_case.txt").read_text(encoding="utf8", errors="ignore")
    stories = [s.strip() for s in raw.split(END) if len(s.strip()) > 100]
    return books, stories[HELD_OUT_STORIES:], held, stories[:HELD_OUT_STORIES]


def keyword_rows(documents: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, sentence) pairs: the sentence's phrases in brackets, then the sentence."""
    sentences = [
        s for d in documents for s in re.split(r"(?<=[.!?])\s+", d) if 6 <= len(s.split()) <= 30 and "[" not in s
    ]
    rng.shuffle(sentences)
    rows = []
    for sentence, other in zip(sentences, sentences[1:] + sentences[:1], strict=True):
        words, strangers = sentence.split(), other.split()
        spans, at = [], rng.randrange(0, 3)
        while at < len(words) and len(spans) < 6:
            size = rng.choice((1, 1, 2, 2, 3))
            phrase = " ".join(words[at : at + size]).strip(".,;:!?\"'()")
            if len(phrase) > 3:
                if rng.random() < 0.5:  # a stranger, in both places
                    start = rng.randrange(len(strangers))
                    stranger = " ".join(strangers[start : start + rng.choice((1, 2, 2))]).strip(".,;:!?\"'()")
                    if rng.random() < 0.6:
                        stranger = stranger.title()
                    if len(stranger) > 2 and sentence.count(phrase) == 1:
                        sentence = sentence.replace(phrase, stranger)
                        phrase = stranger
                spans.append(phrase)
            at += size + rng.randrange(0, 5)
        spans = [s for s in dict.fromkeys(spans) if s in sentence]
        if len(spans) < 2:
            continue
        if rng.random() < 0.5:
            rng.shuffle(spans)
        keys = rng.sample(KEYS, len(spans))
        rows.append((", ".join(f"{k}[{s}]" for k, s in zip(keys, spans, strict=True)) + "\n", sentence))
    return rows


# ---------------------------------------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Digits stay single: numbers are then copied, not looked up.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode_plain(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = [t for e in tokenizer._tokenizer.encode_batch(texts) for t in [*e.ids, tokenizer.eos_token_id]]
    return np.asarray(ids, np.uint16), np.ones(len(ids), bool)


def encode_keywords(tokenizer, rows: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    prompts = tokenizer._tokenizer.encode_batch([p for p, _ in rows])
    sentences = tokenizer._tokenizer.encode_batch([s for _, s in rows])
    ids, trained = [], []
    for p, s in zip(prompts, sentences, strict=True):
        ids += [*p.ids, *s.ids, tokenizer.eos_token_id]
        trained += [False] * len(p.ids) + [True] * (len(s.ids) + 1)
    return np.asarray(ids, np.uint16), np.asarray(trained, bool)


def prepare(text: Path, work: Path) -> None:
    """Writes the tokenizer and the token streams to `work`."""
    books, stories, held_books, held_stories = read_text(text)
    rng = random.Random(SEED)
    tokenizer = train_tokenizer([*books, *stories, *stories, *stories])
    tokenizer.save_pretrained(work / "tokenizer")
    rows = keyword_rows([*books, *stories], rng)
    streams = {
        "books": encode_plain(tokenizer, books),
        "stories": encode_plain(tokenizer, stories),
        "copy": encode_keywords(tokenizer, rows),
        "held_books": encode_plain(tokenizer, held_books),
        "held_stories": encode_plain(tokenizer, held_stories),
        "held_copy": encode_keywords(tokenizer, keyword_rows([*held_books, *held_stories], rng)),
    }
    for name, (ids, trained) in streams.items():
        np.savez(work / f"{name}.npz", ids=ids, trained=trained)
        print(f"{name:13} {len(ids):>11,} tokens, {trained.sum():>11,} trained")


def rows_of(stream, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels [rows, length]; a label is -100 where nothing is to be learned."""
    at = starts[:, None] + np.arange(length + 1)
    ids = torch.from_numpy(stream["ids"][at].astype(np.int64))
    labels = torch.where(torch.from_numpy(stream["trained"][at]), ids, -100)
    return ids[:, :-1], labels[:, 1:]


def training_batch(streams, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of one step: a pure function of the step, so that a resumed run sees what an unbroken one sees."""
    rng = np.random.default_rng((SEED, step))
    rows = TOKENS_PER_STEP // length
    copy, story = round(rows * COPY_SHARE), round(rows * STORY_SHARE)
    parts = []
    for name, count in (("copy", copy), ("stories", story), ("books", rows - copy - story)):
        starts = rng.integers(0, len(streams[name]["ids"]) - length - 1, count)
        parts.append(rows_of(streams[name], starts, length))
    ids, labels = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(labels)


# ---------------------------------------------------------------------------------------------- training


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def optimizers(model) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=4e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: warm-up, constant, linear to zero over the last quarter."""
    return min((step + 1) / 200, 1.0, (steps - step) / (0.25 * steps))


def loss_of(model, ids, labels):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        keep = labels.flatten() != -100
        logits = model.lm_head(hidden)
    # Masked by weight, not by selection: selected rows would change shape each step and recompile.
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().clamp(min=0), reduction="none")
    return (losses * keep).sum() / keep.sum()


@torch.no_grad()
def held_out_loss(model, stream, rows: int = 64, length: int = 256) -> float:
    starts = np.linspace(0, len(stream["ids"]) - length - 2, rows).astype(int)
    ids, labels = rows_of(stream, starts, length)
    return float(
        np.mean(
            [loss_of(model, some, wanted).item() for some, wanted in zip(ids.split(16), labels.split(16), strict=True)]
        )
    )


def save_atomically(value, path: Path) -> None:
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(work: Path, steps: int, out: Path) -> None:
    streams = {p.stem: dict(np.load(p)) for p in work.glob("*.npz")}
    model = new_model()
    opts = optimizers(model)
    start, seconds = 0, 0.0
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
    peaks = [opt.param_groups[0]["lr"] if not start else opt.param_groups[0]["initial"] for opt in opts]
    step_loss = torch.compile(loss_of)
    log = (work / "log.jsonl").open("a")
    began, running = time.time(), None
    for step in range(start, steps):
        length = 512 if step >= 0.75 * steps else 256
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0].update(lr=peak * rate(step, steps), initial=peak)
        loss = step_loss(model, *training_batch(streams, step, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = seconds + time.time() - began
            row = {
                "step": step + 1,
                "tokens": (step + 1) * TOKENS_PER_STEP,
                "loss": round(running, 4),
                "seconds": round(spent),
            }
            if (step + 1) % 500 == 0 or step + 1 == steps:
                row |= {
                    name: round(held_out_loss(model, streams[name]), 4)
                    for name in ("held_books", "held_stories", "held_copy")
                }
            print(json.dumps(row), file=log, flush=True)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in opts],
                    "step": step + 1,
                    "seconds": spent,
                }
                save_atomically(state, work / "last.pt")
    export(model, work, out)


def export(model, work: Path, out: Path) -> None:
    """Writes the model folder (bf16) and the facts its card states."""
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(out)
    last = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()][-1]
    last |= {f"perplexity_{k}": round(math.exp(last[k]), 2) for k in ("held_books", "held_stories")}
    (out / "training.json").write_text(json.dumps(last, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the two text files")
    parser.add_argument("--work", type=Path, required=True, help="folder for token streams, checkpoints and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3000, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "held_copy.npz").exists():
        prepare(args.text, args.work)
    train(args.work, args.steps, args.out)


if __name__ == "__main__":
    main()
