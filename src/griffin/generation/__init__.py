"""Loading models and generating text with them."""
