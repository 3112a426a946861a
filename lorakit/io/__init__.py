"""File I/O: atomic writes, tensors from untrusted files, files larger than memory. Knows nothing about LoRA."""
