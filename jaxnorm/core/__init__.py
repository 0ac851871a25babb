"""Pure mathematics: moments, standardization, running statistics, one file per family.

Nothing here knows of Flax, of devices or of a choice between implementations. The functions take
arguments that `jaxnorm.functional` has already checked.
"""
