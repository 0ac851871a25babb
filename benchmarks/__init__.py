"""Peers side by side, and the results that the README quotes."""
