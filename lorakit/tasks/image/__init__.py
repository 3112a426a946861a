"""What text-to-image tasks are made of: prompts and pictures encoded, noise, targets and losses."""
