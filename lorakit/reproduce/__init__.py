"""What `lorakit demo` does: the LoRA paper's task on text (E2E NLG), and pictures; and how the results are scored."""
