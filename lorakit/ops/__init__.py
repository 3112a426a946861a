"""The maths on tensors: a reference of a few plain lines, and the fast form that tests hold equal to it."""
