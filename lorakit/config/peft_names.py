"""PEFT's names of settings with the same values."""

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "bias",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "trainable_token_indices": "trainable_tokens",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "modules_to_save": "save_modules",
    "task_type": "task",
    "base_model_name_or_path": "base",
    "revision": "revision",
}
