"""The instruments that go into the traced program: marks, subsamples and summaries.

This room imports neither `samples` nor `diagnosis`.
"""
