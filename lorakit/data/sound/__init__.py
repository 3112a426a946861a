"""From rows that name sound files to items: `wav` reads samples, `resample` changes their rate, `rows` adds the texts.

Nothing here knows about models or training.
"""
