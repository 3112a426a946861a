"""A tiny LLaVA on disk with its processor, and conversations about pictures: which colour is the square?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_lm
import tiny_vision
import torch

IMAGE = "<image>"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PATCH = 4


def tokenizer(*special: str) -> Any:
    made = tiny_lm.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(special or (IMAGE,))})
    return made


def processor(chat_template: str | None = TEMPLATE) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": tiny_vision.SIDE, "width": tiny_vision.SIDE}
    half = [0.5] * 3
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def llava(seed: int = 0) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=tiny_vision.SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        initializer_range=0.1,
        pad_token_id=tiny_lm.PAD,
        bos_token_id=None,
        eos_token_id=tiny_lm.EOS,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=258, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.model.multi_modal_projector.parameters():  # so that a picture is not lost beside the text
        parameter.data.mul_(10)
    return model


def save(folder: Path, model: Any = None, chat_template: str | None = TEMPLATE) -> Path:
    (model or llava()).save_pretrained(folder)
    processor(chat_template).save_pretrained(folder)
    return folder


def rows(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    """Conversations of unequal lengths about pictures that are written into `folder`; a third has two pictures."""
    made = []
    for number in range(count):
        colours = [list(tiny_vision.COLOURS)[(number + k) % 3] for k in range(1 + (number % 3 == 0))]
        names = []
        for k, colour in enumerate(colours):
            name = f"{number:02}-{k}.png"
            tiny_vision.picture(colour, 100 * number + k).save(folder / name)
            names.append(name)
        pictures = [{"type": "image", "image": name} for name in names]
        text = {"type": "text", "text": f"{'very ' * (number % 4)}what?"}
        made.append(
            {
                "messages": [
                    {"role": "user", "content": [*pictures, text]},
                    {"role": "assistant", "content": " ".join(colours)},
                ]
            }
        )
    return made


def write_rows(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(folder, count)))
    return path


QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TEMPLATE = TEMPLATE.replace(IMAGE, "<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_vl_processor() -> Any:
    """Qwen2-VL's own processor without its part for videos, which only torchvision makes."""
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class ImagesOnly(Qwen2VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = QWEN_TOKENS[:2]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([*QWEN_TOKENS[:2]])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    sizes = {"shortest_edge": 64, "longest_edge": 1024}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=2, size=sizes)
    return ImagesOnly(images, tokenizer(*QWEN_TOKENS), QWEN_TEMPLATE)


def save_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """A folder as Qwen2-VL's on the hub, with a model of two layers."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    made = qwen2_vl_processor()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {
        "vocab_size": len(made.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 192,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": tiny_lm.PAD,
        "bos_token_id": None,
        "eos_token_id": tiny_lm.EOS,
    }
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    torch.manual_seed(seed)
    ids = dict(zip(names, made.tokenizer.convert_tokens_to_ids([*QWEN_TOKENS]), strict=True))
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    model.save_pretrained(folder)
    made.image_processor.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder
