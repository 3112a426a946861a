"""Analyse adapters: inspect one, compare two, compare one with its base, draw heat maps. Draw data sets of pictures."""
