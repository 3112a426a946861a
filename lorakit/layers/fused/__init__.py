"""Modules of the base that run as one autograd node: RMSNorm, gated MLP, and attention's backward.

They are recognized by what they compute, not by their class.
"""
