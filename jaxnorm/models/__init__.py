"""Flax models of other people, Linen or NNX: their modes, their layers, and the calls of these.

Training, surgery and the monitor ask here, so that each of them is written once for both.
"""
