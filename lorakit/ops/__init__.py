"""The maths on tensors: each operation as a `reference` of a few plain lines, and in a fast form tested against it."""

IGNORE_INDEX = -100  # the label of a token without a loss, as in torch and transformers
