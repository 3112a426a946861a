"""Modules of the base computed as one autograd node: RMSNorm, gated MLP; and attention's backward. Found by what they
compute.
"""
