"""Formats of quantized weights in plain torch: what a checkpoint's tensors mean, and how a weight becomes them.

A file for each format, with two functions:

    dequantized(tensors, settings) -> W [out, in] float32
    quantized(W [out, in], settings) -> tensors

`tensors` are named as in a checkpoint, after "<module>.": "weight", "weight.absmax", "SCB", "qweight".
"""
