"""Weights from PyTorch and back: sources, layouts, matching, the assignment, writing.

Nothing here needs PyTorch. Tensors and modules are known by what they can do.
"""
