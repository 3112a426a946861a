"""The maths on tensors: a reference of a few plain lines, and the fast form that tests hold equal to it."""

IGNORE_INDEX = -100  # the label of a token that no loss counts, as in torch and transformers
