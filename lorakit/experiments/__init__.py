"""Repeat the paper's experiments (Hu et al. 2021, arXiv 2106.09685) on the embedded model: one file per table."""
