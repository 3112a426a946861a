"""Quantized weights in checkpoint files: a file for each format, which says how its tensors are read and written.

format.py    what such a file offers
weight.py    one module's quantized weight in the files, read as the weight that it stands for
found.py     the quantized weights of a checkpoint, by its config

blockwise.py  bitsandbytes' nf4 and fp4      int8.py    bitsandbytes' LLM.int8()
gptq.py       GPTQ                           awq.py     AWQ
"""
