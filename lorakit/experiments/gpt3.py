"""Parameters, optimizer state and checkpoint sizes of the paper's models, counted on models without weights.

    LoRA        2 · r · d · (matrices a layer) · layers                   (Hu et al. 2021, section 5.1; square matrices)
    adapters    count · (2 · d · m + m + d), and 2 · d for each layer norm
    checkpoint  2 bytes a trained parameter (16 bits)
    training    weights + gradients + Adam's two averages, for what is trained; weights alone for what is frozen

The models are transformers' classes with the paper's sizes, on torch's meta device, with lorakit's own adapters on
them: what is counted is what would be trained. GPT-3 has GPT-2's architecture (Brown et al. 2020, Table 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result, Verdict

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "Trained parameters of the paper's models, counted on models without weights, against the paper's figures; and "
    "what GPT-3 needs to be trained in full and with LoRA."
)
BUDGET = Budget()
GPT3 = "GPT-3 175B"
_QV = {"targets": ["c_attn"], "packed": {"c_attn": [True, False, True]}}  # query and value of GPT-2's projection
# transformers' class, its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RoBERTa base": ("Roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "RoBERTa large": (
        "Roberta",
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "DeBERTa XXL": (
        "DebertaV2",
        {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144},
    ),
    "GPT-2 medium": ("GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "GPT-2 large": ("GPT2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    GPT3: ("GPT2", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
}


@dataclass(frozen=True)
class Case:
    """What is trained on a model, and how many parameters the paper gives for it, with its table.

    `adapter`: settings of the adapter; None for full fine-tuning.
    """

    model: str
    name: str
    paper: float
    where: str
    adapter: dict[str, Any] | None


def _qv(rank: int, targets: list[str] | None = None) -> dict[str, Any]:
    return {"rank": rank} | ({"targets": targets} if targets else _QV)


def _houlsby(size: int) -> dict[str, Any]:
    return {"variant": "bottleneck", "targets": "houlsby", "rank": size}


CASES = (
    Case("RoBERTa base", "LoRA q,v r 8", 0.3e6, "table 2", _qv(8, ["query", "value"])),
    Case("RoBERTa large", "LoRA q,v r 8", 0.8e6, "table 2", _qv(8, ["query", "value"])),
    Case("DeBERTa XXL", "LoRA q,v r 16", 4.7e6, "table 2", _qv(16, ["query_proj", "value_proj"])),
    Case("GPT-2 medium", "full", 354.92e6, "table 3", None),
    Case("GPT-2 medium", "LoRA q,v r 4", 0.35e6, "table 3", _qv(4)),
    Case("GPT-2 large", "full", 774.03e6, "table 3", None),
    Case("GPT-2 large", "LoRA q,v r 4", 0.77e6, "table 3", _qv(4)),
    Case(GPT3, "full", 175_255.8e6, "table 4", None),
    Case(GPT3, "BitFit", 14.2e6, "table 4", {"targets": "none", "bias": "all"}),
    Case(GPT3, "adapter H, size 1", 7.1e6, "table 4", _houlsby(1)),
    Case(GPT3, "adapter H, size 8", 40.1e6, "table 4", _houlsby(8)),
    Case(GPT3, "LoRA q,v r 1", 4.7e6, "table 4", _qv(1)),
    Case(GPT3, "LoRA q,v r 8", 37.7e6, "table 4", _qv(8)),
    Case(GPT3, "LoRA q,v r 4", 18e6, "table 5", _qv(4)),
    Case(GPT3, "LoRA q,v r 64", 301.9e6, "table 15", _qv(64)),
)
# Bytes a parameter of gradient and optimizer state, for what is trained.
PRECISIONS = {"all in 16 bits": 2 + 2 * 2, "gradients 16 bits, Adam and a copy of the weights 32 bits": 2 + 3 * 4}
WEIGHT_BYTES = 2  # 16 bits
RANK = 4  # of GPT-3's LoRA whose memory and checkpoint are shown: the paper's 35 MB
PAPER_FULL_MEMORY, PAPER_LORA_MEMORY, PAPER_CHECKPOINTS, PAPER_TIMES = 1.2e12, 350e9, (350e9, 35e6), 10_000


def run(work: Work) -> Result:
    rows: list[dict[str, Any]] = [
        {
            "model": case.model,
            "name": case.name,
            "where": case.where,
            "paper": case.paper,
            "counted": work.cell(
                f"{case.model}, {case.name}", partial(count, case), asdict(case) | {"sizes": MODELS[case.model]}
            ),
        }
        for case in CASES
    ]
    base = next(row["counted"] for row in rows if (row["model"], row["name"]) == (GPT3, "full"))
    lora = next(row["counted"] for row in rows if (row["model"], row["name"]) == (GPT3, f"LoRA q,v r {RANK}"))
    memory = [
        {"precision": name, "full": base * (WEIGHT_BYTES + own), "lora": base * WEIGHT_BYTES + lora * (2 + own)}
        for name, own in PRECISIONS.items()
    ]
    checkpoints = {"full": base * WEIGHT_BYTES, "lora": lora * WEIGHT_BYTES}
    return {"rows": rows, "memory": memory, "checkpoints": checkpoints, "base": base, "lora": lora}


def count(case: Case) -> int:
    """Count the parameters that are trained, on a model on the meta device."""
    import torch

    import lorakit as lk

    with torch.device("meta"):
        model = build(case.model)
        if case.adapter is not None:
            lk.attach(model, lk.LoraConfig(**case.adapter))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build(name: str) -> Any:
    """Build one of the paper's models, without a head of its own (GPT-2's is its embedding)."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}Model")(config)


def tables(result: Result) -> Sequence[Table]:
    from ..analysis.tables import Table
    from ..plan.units import show_bytes

    counts = [
        [
            row["model"],
            row["name"],
            f"{row['counted']:,}",
            _millions(row["paper"]),
            f"{row['counted'] / row['paper'] - 1:+.1%}".replace("-0.0%", "+0.0%"),
            row["where"],
        ]
        for row in result["rows"]
    ]
    memory = [
        [f"training, {row['precision']}", show_bytes(row["full"]), show_bytes(row["lora"]), _times(row)]
        for row in result["memory"]
    ]
    sizes = result["checkpoints"]
    memory.append(["checkpoint, 16 bits", show_bytes(sizes["full"]), show_bytes(sizes["lora"]), _times(sizes)])
    memory.append(["parameters", f"{result['base']:,}", f"{result['lora']:,}", _times(_of_parameters(result))])
    return [
        Table("", ["model", "trained", "counted", "paper", "difference", "where"], counts),
        Table(f"{GPT3}: full fine-tuning against LoRA, q,v r {RANK}", ["", "full", "LoRA", "times"], memory),
    ]


def findings(result: Result) -> Sequence[Finding]:
    from ..plan.units import show_bytes

    full, lora = (next(iter(result["memory"]))[side] for side in ("full", "lora"))
    one = next(row["counted"] for row in result["rows"] if (row["model"], row["name"]) == (GPT3, "LoRA q,v r 1"))
    sizes, off = result["checkpoints"], [r for r in result["rows"] if not _near(r["counted"], r["paper"], ROUNDING)]
    checkpoints = zip((sizes["full"], sizes["lora"]), PAPER_CHECKPOINTS, strict=True)
    return [
        Finding(
            "LoRA trains 10,000 times fewer parameters (abstract; roughly, section 4.2)",
            _verdict(_near(result["base"] / result["lora"], PAPER_TIMES, ROUGHLY)),
            f"{_times(_of_parameters(result))} times fewer at r {RANK}, {result['base'] / one:,.0f} at r 1",
        ),
        Finding(
            "a checkpoint of 350 GB becomes one of 35 MB (roughly, section 4.2)",
            _verdict(all(_near(own, paper, ROUGHLY) for own, paper in checkpoints)),
            f"{show_bytes(sizes['full'])} and {show_bytes(sizes['lora'])} ({sizes['lora'] / 2**20:.0f} MiB)",
        ),
        Finding(
            "training GPT-3 with LoRA needs 350 GB (section 4.2)",
            _verdict(_near(lora, PAPER_LORA_MEMORY, ROUGHLY)),
            f"{show_bytes(lora)} without activations and with everything in 16 bits",
        ),
        Finding(
            "in full it needs 1.2 TB (section 4.2)",
            _verdict(_near(full, PAPER_FULL_MEMORY, ROUGHLY)),
            f"{show_bytes(full)} counted alike, {full / lora:.1f} times LoRA's; the paper does not say what it counts",
        ),
        Finding(
            "the trained parameters of each row",
            _verdict(not off),
            "further off than rounding: " + "; ".join(f"{r['model']} {r['name']}" for r in off) if off else "all",
        ),
    ]


ROUNDING = 0.06  # of a figure of one or two digits, such as 0.3 million
ROUGHLY = 0.1  # of a figure that the paper calls rough, or gives with two digits at most


def _near(own: float, paper: float, within: float) -> bool:
    return abs(own / paper - 1) <= within


def _verdict(holds: bool) -> Verdict:
    return "agrees" if holds else "disagrees"


def _of_parameters(result: Result) -> dict[str, int]:
    return {"full": result["base"], "lora": result["lora"]}


def _times(sides: dict[str, Any]) -> str:
    ratio = sides["full"] / sides["lora"]
    return f"{ratio:,.0f}" if ratio > 100 else f"{ratio:.1f}"


def _millions(value: float) -> str:
    return f"{value / 1e6:,g} M"
