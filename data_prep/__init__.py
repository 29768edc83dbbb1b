"""Where examples and base models come from."""
