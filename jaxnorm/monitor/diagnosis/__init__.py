"""The judgement of samples on the host: evidence, rules and findings.

This room imports `probe` and `samples`; neither of them imports it.
"""
