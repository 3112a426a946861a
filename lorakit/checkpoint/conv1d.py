"""transformers' Conv1D: a linear whose weight is stored as [in, out]."""

CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


def is_conv1d(module: str, model_type: str) -> bool:
    """Whether this module of a model of transformers is a Conv1D. `model_type`: as in the model's config."""
    return model_type in CONV1D_MODELS and module.rsplit(".", 1)[-1] in CONV1D_LAYERS
