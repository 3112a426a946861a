"""Updates on live modules: one file per kind, with the name that `LoraConfig.variant` uses."""
