"""Errors that are not the caller's usage.

Wrong usage (a density of 7, an unknown selection, an MoE model) raises `ValueError`. What goes wrong although the call
was right (no network, a damaged file, a full disk) raises `GriffinError`. Both messages say what was found, what was
expected and what to do. The command line turns the first into exit code 2 and the second into exit code 1.
"""


class GriffinError(RuntimeError):
    """Something outside the call failed: the network, a file, the disk."""
