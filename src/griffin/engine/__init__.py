"""The generation step, of one batch or of sequences that come and go."""
