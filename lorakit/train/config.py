"""Everything a training run can be told. The field texts are the comments of `lorakit init`, the help and the docs at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..config import LoraConfig
from ..plan.units import parse_bytes

Auto = Literal["auto"]


class TrainConfig(LoraConfig):
    """LoRA's settings (see `LoraConfig`) and the run's."""

    model: str = Field("embedded", description="the base: 'embedded', a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    data: str = Field(..., description="training data: a JSONL, JSON, CSV or Parquet file, a folder, or a hub id")
    split: str | None = Field(None, description="the data's split, where it has several")
    columns: dict[str, str] = Field(
        default_factory=dict, description="your column names, if they differ: {prompt: question, completion: answer}"
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's template; plain: ours; auto: chat if there is one"
    )
    train_on: Literal["completion", "all"] = Field("completion", description="train on the answers only, or on everything")
    max_length: int | Auto = Field("auto", description="longest row in tokens; auto: the data's 99th percentile")
    on_long: Literal["auto", "drop", "cut", "split"] = Field("auto", description="longer rows are dropped, cut, or (plain text) split")
    validation: float | str = Field(0.05, description="held out: a share of the data, a file of its own, or 0 for none")

    method: Literal["lora", "full"] = Field(
        "lora", description="lora: train an adapter; full: train all weights in float32 (the yardstick), saved as a model"
    )
    out: str = Field("runs/default", description="the run's folder; a run started on its own folder goes on where it stopped")
    epochs: float = Field(3.0, gt=0, allow_inf_nan=False, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all devices")
    micro_batch: int | Auto = Field("auto", description="sequences computed at once on one device; the rest is accumulated")
    group_by_length: bool = Field(True, description="batches of rows of like length: less padding")
    learning_rate: float | Auto = Field("auto", description="peak learning rate; auto picks one from the model's width and says why")
    find_lr: bool = Field(False, description="with learning_rate auto: try several rates in a short joint run first, and take the best")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the learning rate falls after warm-up")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first beta")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="largest gradient norm; 0: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="the base's precision; the adapter trains in float32")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, a third more time")
    compile: bool = Field(
        False, description="compile the layers with torch.compile before the first step (needs a C++ compiler on a CPU; pays in long runs)"
    )
    seed: int = Field(0, ge=0, lt=1 << 31, description="of the factors, the batches and dropout")
    threads: int | Auto = Field("auto", description="CPU threads; auto: torch's own choice")

    eval_every: int | Auto = Field("auto", description="steps between evaluations on the held-out rows; auto: about ten in a run")
    patience: int = Field(3, ge=0, description="stop after so many evaluations without a better held-out loss; 0: never")
    save_every: int | Auto = Field("auto", description="steps between checkpoints; auto: at each evaluation")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    sample_prompts: list[str] = Field(
        default_factory=list, description="prompts answered at each evaluation by base and adapter; default: two held-out rows"
    )
    sample_tokens: int = Field(64, ge=0, description="tokens per sample; 0: no samples")
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="also log to these, if installed")
    memory: str = Field(
        "auto", description="memory the run may take, such as 24GB; auto: what the device has; unchecked: start in any case"
    )
    trust_remote_code: bool = Field(False, description="run the code that a hub model brings (only for models you trust)")

    @model_validator(mode="before")
    @classmethod
    def _no_base(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") is not None:
            raise ValueError("'base' is set from 'model' in a training run; give 'model'")
        return values

    @model_validator(mode="after")
    def _compiled(self) -> TrainConfig:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile with gradient_checkpointing has not been shown to be right; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _to_be_found(self) -> TrainConfig:
        if self.find_lr:
            if self.learning_rate != "auto":
                raise ValueError(f"find_lr looks for a learning rate, and {self.learning_rate:g} is given; leave one of the two out")
            whole = [name for name, empty in (("bias", "none"), ("save_modules", [])) if getattr(self, name) != empty]
            if self.method == "full" or whole:
                what = "method: full" if self.method == "full" else whole[0]
                raise ValueError(f"find_lr tries adapters side by side on one base, which {what} does not allow; give a learning_rate")
        return self

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if value not in ("auto", "unchecked"):
            parse_bytes(value)
        return value

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if value != "auto" and not (isinstance(value, float | int) and 0 < value < float("inf")):
            raise ValueError(f"expected a positive number or 'auto' (got {value})")
        return value

    @field_validator("micro_batch", "max_length", "eval_every", "save_every", "threads")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"expected a positive whole number or 'auto' (got {value})")
        return value

    @field_validator("validation")
    @classmethod
    def _share_or_file(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"expected a share from 0 up to 1, or a file (got {value})")
        return value

    def lora(self) -> LoraConfig:
        """The part that says what to adapt and how."""
        own = {name: getattr(self, name) for name in LoraConfig.model_fields}
        return LoraConfig(**own | {"base": self.model, "task": self.task or "CAUSAL_LM"})
