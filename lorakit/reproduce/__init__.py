"""Reproduce the LoRA paper's tasks on the user's machine: the demo (E2E NLG), and how its texts are scored."""
