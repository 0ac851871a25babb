"""Pure mathematics: moments, standardization, running statistics, one file per family.

Nothing here knows of Flax or of kernels. The functions take arguments that `jaxnorm.functional` has
already checked. README.md beside this file draws the pipeline.
"""
