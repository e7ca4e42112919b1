"""Measuring: flocking pictures, perplexity, benchmarks."""
