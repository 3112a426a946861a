"""Adapted modules: one mixin per kind of module, which `swap` puts in front of the module's own class."""
