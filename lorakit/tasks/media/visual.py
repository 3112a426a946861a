"""A vision-language base's processor: the ids that stand for a picture, and what the model gets of it.

transformers' processor turns a conversation with pictures into inputs in one go, without a loss mask. Here the text is
rendered by `data/render.py`, which knows what is trained; each picture's run of ids, and its pixels, come from the
processor's own parts. Whether that gives the processor's own inputs is tried on blank pictures as it is loaded, so a
processor that puts its inputs together in another way is refused, and never trained wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bases.load_processor import load_vision_processor
from ...config import RunSettings
from ...data.batches import collate, pad_id
from ...data.pictures.buckets import Size
from ...errors import ConfigError, DataError, LorakitError

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.pictures.visual_item import VisualItem

TEXT_INPUTS = ("input_ids", "attention_mask")
KINDS = "mm_token_type_ids"  # which ids are a picture's: Qwen-VL's positions need it
SIDE = 64  # pixels of the blank pictures that a processor is tried on


class Visual:
    """A processor, with its tokenizer (which has the processor's chat template)."""

    def __init__(self, processor: Any, name: str):
        """`name`: the base's. Raises LorakitError for a processor whose inputs are put together in another way,
        ConfigError if there is no chat template.
        """
        from ...data.templates import with_template

        self.processor, self.name = processor, name
        template = processor.chat_template or processor.tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"'{name}' has no chat template, by which conversations with pictures are written\n"
                "  put its chat_template.jinja into the base's folder"
            )
        self.tokenizer = with_template(processor.tokenizer, template, "chat_template")
        self.place: int = processor.image_token_id
        self._with_kinds = False
        self._run_of = cache(self._run)
        self._try()

    def save_pretrained(self, folder: Path) -> None:
        """Save the processor, as full fine-tuning does with its model."""
        self.processor.save_pretrained(folder)

    def runs(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Return each picture's run of ids. `sizes`: the pictures' (width, height)."""
        return [self._run_of(size) for size in sizes]

    def batch(self, items: Sequence[VisualItem]) -> dict[str, Tensor]:
        """Return right-padded ids, mask and labels, [rows, length], and what the model gets of the pictures."""
        made = collate(items, pad_id(self.tokenizer))
        return made | self.pixels(items) | self.kinds(made["input_ids"])

    def pixels(self, items: Sequence[VisualItem]) -> dict[str, Tensor]:
        """Return what the model gets of the items' pictures, all in one sequence; empty without pictures."""
        images = [image for item in items for image in item.images()]
        return self._of_pictures(images) if images else {}

    def kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """Return which of the ids [rows, length] are a picture's, if the model takes that."""
        import torch

        if not self._with_kinds:
            return {}
        return {KINDS: torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))}

    def _of_pictures(self, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images=list(images), return_tensors="pt")
        return {name: value for name, value in made.items() if name not in self.processor.unused_input_names}

    def _run(self, size: Size) -> list[int]:
        from PIL import Image

        try:
            made = self.processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
            text = self.processor.replace_image_token(made, 0)
        # Processors of many models, with settings from a file: any error means that they do not take this picture.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"'{self.name}' does not take a picture of {size[0]} x {size[1]} pixels: {reason}\n  resize it"
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _try(self) -> None:
        """Compare our inputs for blank pictures with the processor's own: one picture in a row, and two."""
        import torch
        from PIL import Image

        processor, token = self.processor, self.processor.image_token
        images = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "white", "red")]
        rows = [images[:1], images[1:]]
        texts = [f"{token}x" * len(row) for row in rows]
        encode = self.tokenizer.encode
        try:
            theirs = dict(processor(text=texts, images=rows, padding=True, return_tensors="pt"))
            run, rest = self._run_of((SIDE, SIDE)), list(encode("x", add_special_tokens=False))
            ours = dict(self._of_pictures(images))
        # Processors of many models: any error means that this one takes its inputs in another way.
        except Exception as error:
            raise self._refused(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
        ids = [
            [token for token, kept in zip(row, mask, strict=True) if kept]
            for row, mask in zip(theirs["input_ids"].tolist(), theirs["attention_mask"].tolist(), strict=True)
        ]
        for row, found in zip(rows, ids, strict=True):
            expected = [*run, *rest] * len(row)
            if found[len(found) - len(expected) :] != expected:  # a start token may stand before them
                raise self._refused("its ids of a picture depend on what stands beside it")
        self._with_kinds = KINDS in theirs
        ours |= self.kinds(theirs["input_ids"])
        others = {name: value for name, value in theirs.items() if name not in TEXT_INPUTS}
        if others.keys() != ours.keys():
            raise self._refused(f"it makes {', '.join(sorted(others))}; expected {', '.join(sorted(ours))}")
        for name, value in others.items():
            if value.shape != ours[name].shape or not torch.equal(value, ours[name]):
                raise self._refused(
                    f"its {name} of two rows is {list(value.shape)}, that of their pictures {list(ours[name].shape)}"
                )

    def _refused(self, why: str) -> LorakitError:
        return LorakitError(
            f"the {type(self.processor).__name__} of '{self.name}' puts its inputs together in a way that "
            f"vision_language does not know: {why}\n"
            "  LLaVA's is known to work; choose another base (--model)"
        )


def load_visual(config: RunSettings) -> Visual:
    """Load the processor of a run's base. Raises LorakitError and ConfigError; see `Visual`."""
    processor = load_vision_processor(config.model, config.revision, config.trust_remote_code)
    return Visual(processor, config.model)
