"""Fine-tuning memory by part: weights, gradients, optimizer state, activations; predicted and measured.

    gradients   one element for each trained parameter
    optimizer   SGD 0, momentum or RMSProp 1, Adam 2 elements for each trained parameter
    activations what autograd keeps of the layers between forward and backward (the loss's own tensors are apart)

The paper's section 4.2 counts on Adam's state: it is what LoRA saves most of. Predicted: `lorakit plan`, on shapes
alone, before anything is loaded. Measured: a forward, a backward and a step of torch's own optimizer on the embedded
model; the bytes of tensors that are there, each storage once. The peak of an entire process is in `lorakit bench plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result

if TYPE_CHECKING:
    from torch import nn

    from ..analysis.tables import Table
    from ..plan.planner import Planner
    from .work import Work

TITLE = (
    "Bytes that a training step of the embedded model holds, fp32, 8 rows of 64 tokens: predicted by lorakit plan's "
    "count on shapes, and measured on the tensors of a real step."
)
BUDGET = Budget()
ROWS, LENGTH = 8, 64
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA, all linear, r 16": {},
    "LoRA, q and v, r 4": {"targets": ["q_proj", "v_proj"], "rank": 4},
}
# Elements of state for each trained parameter.
OPTIMIZERS = {"SGD": 0, "SGD with momentum": 1, "RMSProp": 1, "Adam": 2}


def run(work: Work) -> Result:
    rows = []
    for name, settings in METHODS.items():
        rows.append(
            {
                "name": name,
                "predicted": work.cell(f"{name}, predicted", partial(predicted, settings), [settings, ROWS, LENGTH]),
                "measured": work.cell(f"{name}, measured", partial(measured, settings), [settings, ROWS, LENGTH]),
            }
        )
    return {"rows": rows}


def predicted(settings: dict[str, Any]) -> dict[str, int]:
    """Return bytes by part, and of the state of each optimizer, from the base's config alone."""
    import torch

    from ..train.config import TrainConfig
    from ..train.memory import planner_for

    planner = planner_for(TrainConfig(data="-", precision="fp32", **settings), torch.float32, torch.device("cpu"))
    estimate = planner.estimate(ROWS, LENGTH, accumulating=False)
    step = estimate.moments["step"]
    parts = {
        "trained": estimate.trained,
        "weights": step["weights"] + step["adapter"],
        "gradients": estimate.trained_bytes,
        "activations": activations(planner),
    }
    return parts | {name: copies * estimate.trained_bytes for name, copies in OPTIMIZERS.items()}


def activations(planner: Planner) -> int:
    """Return the bytes of the tensors that the model's body keeps for its backward: those still there in the loss."""
    from ..plan.step import training_step

    planner.shell.attention(plain=False)  # as a model is loaded
    task = planner.settings.task
    step = training_step(planner.shell, task.example(ROWS, LENGTH, 1.0, False), _loss_of(task), accumulating=False)
    return step.stretches["loss"]["activations"]


def _loss_of(task: Any) -> Any:
    return lambda model, batch: task.losses(model, batch).sum()


def measured(settings: dict[str, Any]) -> dict[str, int]:
    """Return bytes by part of a real step on the embedded model, and of the state of each optimizer after it."""
    import torch

    from ..bases.load import EMBEDDED, load_model
    from ..bench.measure import kept_bytes
    from ..methods import method_of
    from ..tasks import task_of
    from ..train.config import TrainConfig

    config = TrainConfig(data="-", precision="fp32", **settings)
    method, task = method_of(config.method), task_of(config.task)
    model = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    model.requires_grad_(method.result == "model")
    method.attach(model, config, "default", task.peft_type)
    model.train()
    batch = task.example(ROWS, LENGTH, 1.0, False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    kept = kept_bytes(model, lambda: model.base_model(**inputs)[0].sum())
    task.losses(model, batch).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = {
        "trained": sum(p.numel() for p in trained),
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": _bytes([p.grad for p in trained if p.grad is not None]),
        "activations": kept,
    }
    return parts | {name: state_bytes(name, trained) for name in OPTIMIZERS}


def state_bytes(name: str, trained: Sequence[nn.Parameter]) -> int:
    """Return the bytes of state of one of torch's optimizers after a step, besides its counters of steps."""
    import torch

    makers: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.0),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        "RMSProp": lambda p: torch.optim.RMSprop(p, lr=0.0),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.0),
    }
    optimizer = makers[name](trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return _bytes([value for value in states if isinstance(value, torch.Tensor) and value.dim() > 0])


def _bytes(tensors: Sequence[Any]) -> int:
    """Return the bytes of the tensors' storages, each once: tied weights share one."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table
    from ..plan.units import show_bytes

    parts = ["weights", "gradients", *OPTIMIZERS, "activations"]
    cells = [
        [row["name"], side, f"{row[side]['trained']:,}", *(show_bytes(row[side][part]) for part in parts)]
        for row in result["rows"]
        for side in ("predicted", "measured")
    ]
    return [Table("", ["method", "", "trained", *parts], cells)]


def findings(result: Result) -> Sequence[Finding]:
    from ..plan.units import show_bytes

    by_name = {row["name"]: row["measured"] for row in result["rows"]}
    full, lora = by_name["full"], by_name["LoRA, q and v, r 4"]
    held = [sum(side[part] for part in ("weights", "gradients", "Adam")) for side in (full, lora)]
    errors = {
        part: max(abs(row["predicted"][part] / row["measured"][part] - 1) for row in result["rows"])
        for part in ("weights", "gradients", "Adam", "activations")
    }
    return [
        Finding(
            "with Adam, LoRA saves up to two thirds of the memory, as frozen parameters need no optimizer state",
            "agrees" if held[1] < 0.4 * held[0] else "disagrees",
            f"{show_bytes(held[0])} without activations become {show_bytes(held[1])}, {1 - held[1] / held[0]:.0%} "
            f"less; with them {1 - (held[1] + lora['activations']) / (held[0] + full['activations']):.0%} less",
        ),
        Finding(
            "activations are not what LoRA saves",
            "agrees" if lora["activations"] > 0.5 * full["activations"] else "disagrees",
            f"{show_bytes(full['activations'])} in full, {show_bytes(lora['activations'])} with LoRA on q and v",
        ),
        Finding(
            "lorakit plan's count is what a step holds (lorakit's own claim)",
            "agrees" if max(errors.values()) < 0.1 else "disagrees",
            "largest error " + ", ".join(f"{part} {error:.1%}" for part, error in errors.items()),
        ),
    ]


def plot(result: Result, figure: Any) -> None:
    """Stack each method's measured bytes with Adam."""
    axes = figure.subplots()
    parts = {"weights": "#64748b", "gradients": "#94a3b8", "Adam": "#c2410c", "activations": "#fdba74"}
    names, left = [row["name"] for row in result["rows"]], [0.0] * len(result["rows"])
    for part, colour in parts.items():
        sizes = [row["measured"][part] / 1e6 for row in result["rows"]]
        axes.barh(names, sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.legend(frameon=False)
