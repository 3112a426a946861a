"""What llama.cpp makes of the GGUF files that lorakit writes, against transformers with the adapter attached.

    python scripts/try_llama_cpp.py BASE ADAPTER [--dtypes f32 f16 bf16 q8_0]

BASE: a transformers folder with its tokenizer, or 'embedded'. Needs llama-cpp-python beside lorakit. For each dtype the
merged model and the base alone are written to a temporary folder; llama.cpp tokenizes some texts, and computes logits
with the merged model and with the base and a GGUF adapter over it. Compared with: transformers' tokenizer; base and
adapter in float32 (lorakit.attach).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch

import lorakit as lk
from lorakit.bases.load import load_model, load_tokenizer
from lorakit.cli.shared.files import base_folder
from lorakit.errors import AdapterError
from lorakit.export.merged import export_merged
from lorakit.formats.gguf_types import KINDS

TEXTS = [
    "Once upon a time there was a little girl.",
    "Two  spaces, three   and a tab\there.",
    "In 1984, 3.14159 and 1234567890!",
    "Café naïve, Straße, 東京, привет, 🙂👍🏽.",
    "line one\nline two\n\n\tindented\r\nend\n",
    " leading and trailing ",
    "don't WON'T it's I'LL we've",
    "",
]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("base")
    asked.add_argument("adapter", type=Path)
    asked.add_argument("--dtypes", nargs="+", default=["f32", "f16", "bf16", "q8_0"], choices=KINDS)
    asked.add_argument("--steps", type=int, default=32, help="greedy tokens")
    options = asked.parse_args()
    base, adapter = base_folder(options.base), lk.Adapter.load(options.adapter)
    tokenizer = load_tokenizer(str(base))
    model = load_model(str(base), torch.float32, torch.device("cpu"))
    ids = tokenizer(TEXTS[0])["input_ids"]
    alone = logits(model, ids)
    wanted = logits(lk.attach(model, adapter), ids)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=options.steps, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()
    print(
        f"llama-cpp-python {llama_cpp.__version__}; {len(ids)} tokens; the adapter changes logits by "
        f"{apart(wanted, alone):.2g} of the largest"
    )
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtypes:
            whole, bare, lora = (Path(folder) / f"{dtype}-{name}.gguf" for name in ("merged", "base", "adapter"))
            export_merged(adapter, base, whole, dtype=dtype)
            merged = opened(whole)
            same = sum(
                merged.tokenize(t.encode(), add_bos=True, special=True) == tokenizer(t)["input_ids"] for t in TEXTS
            )
            for t in TEXTS:
                ours, theirs = tokenizer(t)["input_ids"], merged.tokenize(t.encode(), add_bos=True, special=True)
                if ours != theirs:
                    print(f"  other tokens: {t!r}: {theirs} instead of {ours}")
            agree = count_equal(following(merged, ids, options.steps), greedy)
            print(
                f"{dtype}: {same} of {len(TEXTS)} texts get the same tokens; merged: logits off by "
                f"{apart(eval_of(merged, ids), wanted):.2g}, "
                f"the first {agree} of {len(greedy)} greedy tokens the same"
            )
            export_merged(None, base, bare, dtype=dtype)
            try:
                adapter.save(lora, "gguf", base=base, dtype="q8_0" if dtype == "q8_0" else None)
            except AdapterError as error:
                print(f"  as a GGUF adapter: {str(error).splitlines()[0]}")
                continue
            print(
                "  base and GGUF adapter: logits off by "
                f"{apart(eval_of(opened(bare, lora_path=str(lora)), ids), wanted):.2g}"
            )


def opened(path: Path, **more: str) -> llama_cpp.Llama:
    """With keys and values in float32, which llama.cpp else rounds to f16."""
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=f32, type_v=f32, **more
    )


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def eval_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def following(model: llama_cpp.Llama, ids: list[int], steps: int) -> list[int]:
    """The tokens that score highest, one after the other."""
    model.reset()
    model.eval(ids)
    made: list[int] = []
    while len(made) < steps:
        made.append(int(np.argmax(model.scores[len(ids) + len(made) - 1])))
        if made[-1] == model.token_eos():
            break
        model.eval(made[-1:])
    return made


def count_equal(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


if __name__ == "__main__":
    main()
