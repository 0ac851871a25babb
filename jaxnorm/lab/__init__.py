"""Studies: a frozen configuration goes in, and the result of a seeded run comes out.

This package holds the data, the networks, and the study of `jaxnorm demo`. It prints nothing and
writes no files.
"""
