"""How an adapter is used: code for lorakit and for the programs that its format is made for. Only what can work for this adapter is shown.

peft (text)          lorakit, PEFT             kohya, diffusers, peft of a pipeline      diffusers, ComfyUI
gguf                 llama.cpp                  mlx                                      mlx_lm
loralib, cloneofsimo lorakit, which converts them
"""

from __future__ import annotations

import json
from shlex import quote

from ..bases.load import EMBEDDED
from ..formats.diffusers import FILE
from .known import Known
from .words import fence, line

# PEFT's task_type -> transformers' class.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip


def use(known: Known, repository: str, base: str | None) -> list[str]:
    """Paragraphs and blocks of code. `base`: its hub id, if it has one."""
    if not known.facts.modules:
        return []  # weights saved whole or learned tokens alone: the table lists them
    where = f"{repository}/{known.file}" if known.file else repository
    if known.image:
        return _image(known, repository, where, base)
    if known.format == "gguf":
        local = line(known.file)
        return [
            "With [llama.cpp](https://github.com/ggml-org/llama.cpp), beside its base as a GGUF:",
            fence(f"hf download {repository} {quote(local)} --local-dir .\nllama-cli -m base.gguf --lora {quote(local)}", "bash"),
        ]
    if known.format == "mlx":
        return [
            "With [MLX](https://github.com/ml-explore/mlx-lm):",
            fence(f"hf download {repository} --local-dir adapter\nmlx_lm.generate --model {base or 'BASE'} --adapter-path adapter", "bash"),
            *_base_note(known, base),
        ]
    if known.format == "loralib":
        alpha = next(iter(known.facts.alphas), "ALPHA")
        return [
            "A state dict of [loralib](https://github.com/microsoft/LoRA), which does not hold alpha. For other programs, with lorakit:",
            fence(f"lorakit convert {quote(line(where))} adapter --to peft --alpha {alpha}", "bash"),
        ]
    return _text(known, where, base)


def _text(known: Known, where: str, base: str | None) -> list[str]:
    kind = CLASSES.get(str(known.facts.task))
    embedded = known.facts.base == EMBEDDED
    name = 'model_path("embedded")' if embedded else _text_of(base or "BASE")
    if kind is not None:
        before = ["from lorakit.bases.load import model_path"] if embedded else []
        labels = [_text_of(label) for label in known.labels]
        before += [f"from transformers import {kind}, AutoTokenizer", ""]
        before += [f"labels = [{', '.join(labels)}]"] if labels else []
        more = ", num_labels=len(labels), id2label=dict(enumerate(labels))" if labels else ""
        before += [f"model = {kind}.from_pretrained({name}{more})", f"tokenizer = AutoTokenizer.from_pretrained({name})"]
        before += ["model.config.pad_token_id = tokenizer.pad_token_id"] if labels else []
    else:
        before = ["", "model = ...  # the base, of the class that it had in training"]
    told = []
    if known.plain_lora:
        told += [
            "With lorakit:",
            fence("\n".join(["import lorakit as lk", *before, f"lk.attach(model, lk.Adapter.load({_text_of(where)}))"]), "python"),
        ]
        if known.facts.task == "CAUSAL_LM" and (embedded or base):
            chat = f"lorakit chat --model {quote(base or EMBEDDED)} --adapter {quote(line(where))}"
            told += ["or in a terminal:", fence(chat, "bash")]
    if known.format == "peft":
        told += [
            "With [PEFT](https://github.com/huggingface/peft):",
            fence(
                "\n".join(["from peft import PeftModel", *before, f"model = PeftModel.from_pretrained(model, {_text_of(where)})"]), "python"
            ),
        ]
    return told + (_base_note(known, base) if kind and not embedded else [])


def _text_of(value: str) -> str:
    """A Python literal, with double quotes."""
    return json.dumps(line(value), ensure_ascii=False)


def _base_note(known: Known, base: str | None) -> list[str]:
    if base:
        return []
    known_by = "see the table below" if known.base or known.header else "which its file does not name"
    return [f"`BASE` is the model that the adapter was trained on ({known_by})."]


def _image(known: Known, repository: str, where: str, base: str | None) -> list[str]:
    triggers = known.facts.training.get("trigger words") or []
    prompt = triggers[0] if triggers else "PROMPT"
    file = known.file or FILE
    if known.format not in ("kohya", "diffusers") or not known.plain_lora:
        why = "updates that are no plain LoRA" if not known.plain_lora else f"the format {known.format}"
        comfy = " ComfyUI loads it as it is." if known.format == "kohya" else ""
        command = "convert" if known.plain_lora else "resize"
        more = "" if known.plain_lora else " --keep 0.99"
        left = ""
        if known.plain_lora and known.facts.embeddings:  # convert refuses to drop them unasked
            more, left = " --allow-loss", " (it leaves the learned tokens out)"
        return [
            f"It has {why}, which diffusers' `load_lora_weights` does not take.{comfy} For diffusers, with lorakit{left}:",
            fence(f"lorakit {command} {quote(line(where))} {FILE} --to diffusers{more}", "bash"),
        ]
    told = [
        "With [diffusers](https://github.com/huggingface/diffusers):",
        fence(
            "import torch\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({_text_of(base or 'BASE')}, torch_dtype=torch.float16)\n"
            f"pipe.load_lora_weights({_text_of(repository)}, weight_name={_text_of(file)})\n"
            f"image = pipe({_text_of(prompt)}).images[0]",
            "python",
        ),
    ]
    if known.format == "kohya":
        told.append("With ComfyUI, put the file into `models/loras`; with A1111, into `models/Lora`.")
    return told + _base_note(known, base)
