"""Formats of quantized weights in plain torch: a file per format, with `dequantized` and `quantized`.

The tensors of one module are named as in a checkpoint's files, without the module's name: "qweight", "scales", ...
"""
