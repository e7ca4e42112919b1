"""How weights are stored, and the modules that multiply by them."""
