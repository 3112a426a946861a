"""What an adapted module computes: one mixin per kind of module, put under the module's own class by `swap`."""
