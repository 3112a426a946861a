"""Bytes on disk: atomic writes, tensors read without trusting the file, files larger than memory. Knows nothing of LoRA."""
