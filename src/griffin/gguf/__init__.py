"""GGUF files: what they hold, checked before it is believed, and what it means in Transformers' terms."""
