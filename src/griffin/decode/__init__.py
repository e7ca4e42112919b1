"""The fast generation step: one native call a token instead of a Python forward pass."""
