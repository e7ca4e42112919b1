"""Other frameworks. Each room is the only one that imports its framework."""
