"""Arithmetic on adapters: add, scale, resize, merge by TIES or DARE, edit. Each function returns a new adapter."""
