"""Studies: a frozen configuration, a seeded run, a frozen result.

Data, networks, and the study behind `jaxnorm demo`. Nothing here prints or writes files.
"""
