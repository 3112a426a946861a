"""The settings of a training run that do not depend on the method or the task."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .optimizers import OPTIMIZERS
from .quantization import Quantization
from .strict import Strict, at_least_one

Auto = Literal["auto"]


class Source(Strict):
    """The task, the base and the data of a run."""

    free: ClassVar = {"data"}  # the rows are compared by hash
    rows: ClassVar = {"task", "data", "split"}

    task: str = Field("causal_lm", description="the task")
    base: str | None = Field(None, description="the base model's hub id or folder")
    revision: str | None = Field(None, description="the base model's revision on the hub")
    model: str = Field("embedded", description="the base: 'embedded', a folder, or a hub id such as Qwen/Qwen3-0.6B")
    data: str = Field(..., description="training data: a JSONL, JSON, CSV or Parquet file, a folder, or a hub id")
    split: str | None = Field(None, description="the data's split, if it has several")


class RunSettings(Quantization, Source):
    """The settings of a training run that do not depend on the method or the task."""

    free: ClassVar = {"out", "track", "keep", "threads", "save_every", "memory", "diverged", "offload_activations"}
    rows: ClassVar = {"validation", "add_tokens"}

    validation: float | str = Field(0.05, description="held-out rows: a share of the data, another file, or 0 for none")
    method: str = Field("lora", description="how to fine-tune")
    out: str = Field("runs/default", description="the run's folder; started on its own folder, a run resumes")
    add_tokens: list[str] = Field(
        default_factory=list, description="new tokens, or a file of them: learnt by the tokenizer, their rows trained"
    )
    epochs: float = Field(3.0, gt=0, allow_inf_nan=False, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all devices")
    micro_batch: int | Auto = Field(
        "auto", description="sequences computed at once on one device; the rest is accumulated"
    )
    group_by_length: bool = Field(True, description="put rows of similar length into the same batch: less padding")
    learning_rate: float | Auto = Field(
        "auto", description="peak learning rate; auto picks one from the model's width and says why"
    )
    find_lr: bool = Field(
        False, description="with learning_rate auto: try several rates in a short joint run first, and take the best"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after warm-up"
    )
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "sgd", "lion", "muon"] = Field(
        "adamw", description="; ".join(f"{name}: {spec.summary}" for name, spec in OPTIMIZERS.items())
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="the optimizer's weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="first beta of AdamW and Lion")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta")
    momentum: float | Auto = Field(
        "auto", description="momentum of sgd (auto: 0.9) and muon (auto: 0.95), second beta of lion (auto: 0.99)"
    )
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="maximum gradient norm; 0: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="the base's precision; the adapter trains in float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, a third more time"
    )
    offload_activations: bool = Field(
        False,
        description="with gradient_checkpointing: keep the layers' inputs outside the device's memory, in the "
        "computer's, or, on a CPU, in temporary files of the run's folder",
    )
    compile: bool = Field(
        False, description="compile the layers with torch.compile first (for long runs; a CPU needs a C++ compiler)"
    )
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of the factors, the data order and dropout")
    threads: int | Auto = Field("auto", description="CPU threads; auto: torch's own choice")
    eval_every: int | Auto = Field(
        "auto", description="steps between evaluations on the held-out rows; auto: about ten per run"
    )
    patience: int = Field(
        3, ge=0, description="stop after this many evaluations without a better held-out loss; 0: never"
    )
    diverged: Literal["stop", "continue"] = Field(
        "stop",
        description="what to do when the held-out loss is more than 1.0 above the base's, or the gradient exactly zero",
    )
    save_every: int | Auto = Field("auto", description="steps between checkpoints; auto: at each evaluation")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="also log to these")
    memory: str = Field(
        "auto",
        description="memory the run may use, such as 24GB; auto: what the device has; unchecked: start in any case",
    )
    trust_remote_code: bool = Field(False, description="run code from a hub model's repository, which you trust")

    @model_validator(mode="before")
    @classmethod
    def _no_base(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") is not None:
            raise ValueError("'base' is set from 'model' in a training run; give 'model'")
        return values

    @model_validator(mode="after")
    def _compiled(self) -> RunSettings:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile is not tested with gradient_checkpointing; remove one of the two")
        if self.compile and self.quantize:
            raise ValueError("compile is not tested with quantize; remove one of the two")
        return self

    @model_validator(mode="after")
    def _checkpointed(self) -> RunSettings:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations moves what gradient_checkpointing keeps, and that is off; give both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _of_optimizer(self) -> RunSettings:
        spec = OPTIMIZERS[self.optimizer]
        for name in ("beta1", "beta2", "momentum"):
            if name not in spec.settings and getattr(self, name) != RunSettings.model_fields[name].default:
                having = [other for other in OPTIMIZERS if name in OPTIMIZERS[other].settings]
                raise ValueError(
                    f"{name} has no effect with optimizer: {self.optimizer}; remove it (it is for {', '.join(having)})"
                )
        return self

    @field_validator("momentum")
    @classmethod
    def _share(cls, value: float | str) -> float | str:
        if value != "auto" and not (isinstance(value, float | int) and 0 <= value < 1):
            raise ValueError(f"expected a number of at least 0 and below 1, or 'auto' (got {value})")
        return value

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if value != "auto" and not (isinstance(value, float | int) and 0 < value < float("inf")):
            raise ValueError(f"expected a positive number or 'auto' (got {value})")
        return value

    _at_least_one = field_validator("micro_batch", "eval_every", "save_every", "threads")(at_least_one)

    @field_validator("validation")
    @classmethod
    def _share_or_file(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"expected a share of at least 0 and below 1, or a file (got {value})")
        return value
