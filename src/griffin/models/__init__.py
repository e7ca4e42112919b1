"""Loading models: the Hub, folders, GGUF files and the built-in ones."""
