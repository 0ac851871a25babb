"""Measurements beside peers, and the committed results of which the documentation is made."""
