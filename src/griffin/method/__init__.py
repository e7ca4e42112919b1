"""The method: statistic, selection, and what a model's profile adds. Pure functions on tensors."""
