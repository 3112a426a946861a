"""Show how to use an adapter: code for lorakit and for the programs that read its format, if it works for this adapter.

peft (text)                             lorakit, PEFT
kohya, diffusers, peft of a pipeline    diffusers, ComfyUI
gguf                                    llama.cpp
mlx                                     mlx_lm
loralib, cloneofsimo                    lorakit, which converts them
"""

from __future__ import annotations

import json
from shlex import quote

from ..bases.load import EMBEDDED
from ..formats.diffusers import FILE
from .record import AdapterRecord
from .words import fence, line

# PEFT's task_type -> transformers' class.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def use(record: AdapterRecord, repository: str, base: str | None) -> list[str]:
    """Return the section's paragraphs and code blocks. base: the base's hub id, if it has one."""
    if not record.facts.modules:
        return []  # nothing but replaced weights or textual-inversion embeddings: the table lists them
    where = f"{repository}/{record.file}" if record.file else repository
    if record.image:
        return _image(record, repository, where, base)
    if record.format == "gguf":
        local = line(record.file)
        return [
            "With [llama.cpp](https://github.com/ggml-org/llama.cpp), and the base as a GGUF file:",
            fence(
                f"hf download {repository} {quote(local)} --local-dir .\nllama-cli -m base.gguf --lora {quote(local)}",
                "bash",
            ),
        ]
    if record.format == "mlx":
        return [
            "With [MLX](https://github.com/ml-explore/mlx-lm):",
            fence(
                f"hf download {repository} --local-dir adapter\n"
                f"mlx_lm.generate --model {base or 'BASE'} --adapter-path adapter",
                "bash",
            ),
            *_base_note(record, base),
        ]
    if record.format == "loralib":
        alpha = next(iter(record.facts.alphas), "ALPHA")
        return [
            "A [loralib](https://github.com/microsoft/LoRA) state dict, which does not contain alpha. "
            "To convert it for other programs, with lorakit:",
            fence(f"lorakit convert {quote(line(where))} adapter --to peft --alpha {alpha}", "bash"),
        ]
    return _text(record, where, base)


def _text(record: AdapterRecord, where: str, base: str | None) -> list[str]:
    kind = CLASSES.get(str(record.facts.task))
    embedded = record.facts.base == EMBEDDED
    name = 'model_path("embedded")' if embedded else _text_of(base or "BASE")
    if kind is not None:
        before = ["from lorakit.bases.load import model_path"] if embedded else []
        labels = [_text_of(label) for label in record.labels]
        before += [f"from transformers import {kind}, AutoTokenizer", ""]
        before += [f"labels = [{', '.join(labels)}]"] if labels else []
        more = ", num_labels=len(labels), id2label=dict(enumerate(labels))" if labels else ""
        before += [
            f"model = {kind}.from_pretrained({name}{more})",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
        ]
        before += ["model.config.pad_token_id = tokenizer.pad_token_id"] if labels else []
    else:
        before = ["", "model = ...  # the base, of the class used in training"]
    parts = []
    if record.plain_lora:
        lines = ["import lorakit as lk", *before, f"lk.attach(model, lk.Adapter.load({_text_of(where)}))"]
        parts += ["With lorakit:", fence("\n".join(lines), "python")]
        if record.facts.task == "CAUSAL_LM" and (embedded or base):
            chat = f"lorakit chat --model {quote(base or EMBEDDED)} --adapter {quote(line(where))}"
            parts += ["or in a terminal:", fence(chat, "bash")]
    if record.format == "peft":
        load = f"model = PeftModel.from_pretrained(model, {_text_of(where)})"
        parts += [
            "With [PEFT](https://github.com/huggingface/peft):",
            fence("\n".join(["from peft import PeftModel", *before, load]), "python"),
        ]
    return parts + (_base_note(record, base) if kind and not embedded else [])


def _text_of(value: str) -> str:
    """Return a Python string literal in double quotes."""
    return json.dumps(line(value), ensure_ascii=False)


def _base_note(record: AdapterRecord, base: str | None) -> list[str]:
    if base:
        return []
    where = "see the table below" if record.base or record.header else "its file does not name it"
    return [f"`BASE` is the model that the adapter was trained on ({where})."]


def _image(record: AdapterRecord, repository: str, where: str, base: str | None) -> list[str]:
    triggers = record.facts.training.get("trigger words") or []
    prompt = triggers[0] if triggers else "PROMPT"
    file = record.file or FILE
    if record.format not in ("kohya", "diffusers") or not record.plain_lora:
        why = "updates that are not plain LoRA" if not record.plain_lora else f"the format {record.format}"
        comfy = " ComfyUI loads the file directly." if record.format == "kohya" else ""
        command = "convert" if record.plain_lora else "resize"
        options = "" if record.plain_lora else " --keep 0.99"
        loss = ""
        if record.plain_lora and record.facts.embeddings:  # convert drops them only with --allow-loss
            options, loss = " --allow-loss", " (this drops the textual-inversion embeddings)"
        return [
            f"It has {why}, which diffusers' `load_lora_weights` cannot load.{comfy} For diffusers, with "
            f"lorakit{loss}:",
            fence(f"lorakit {command} {quote(line(where))} {FILE} --to diffusers{options}", "bash"),
        ]
    parts = [
        "With [diffusers](https://github.com/huggingface/diffusers):",
        fence(
            "import torch\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({_text_of(base or 'BASE')}, torch_dtype=torch.float16)\n"
            f"pipe.load_lora_weights({_text_of(repository)}, weight_name={_text_of(file)})\n"
            f"image = pipe({_text_of(prompt)}).images[0]",
            "python",
        ),
    ]
    if record.format == "kohya":
        parts.append("With ComfyUI, put the file into `models/loras`; with A1111, into `models/Lora`.")
    return parts + _base_note(record, base)
