"""Generate pictures with a diffusers pipeline, its adapters attached; label them, and draw them as one grid."""
