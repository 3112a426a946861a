"""From a data file to batches of token ids.

`read` and `parse` read rows, `shapes` works out from the columns what a row means, `render` turns it into token ids and
a loss mask, `dataset` applies the length limit, `batches` orders and pads, and `show` prints the data as the model will
see it. Nothing here knows about models or training.
"""
