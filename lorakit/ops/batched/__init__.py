"""Batches that mix adapters: schedule which rows share a matrix product, and compute the products."""
