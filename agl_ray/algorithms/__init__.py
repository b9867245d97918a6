"""One file per algorithm; base.py says what one is."""
