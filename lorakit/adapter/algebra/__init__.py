"""Adapters calculated with: added, scaled, resized, merged by TIES and DARE. Values in, a new value out."""
