"""An update on a live module: a file for each kind, named as `LoraConfig.variant` names it."""
