"""The native library: found, loaded, and called over torch tensors."""
