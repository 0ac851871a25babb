"""Programs to run and to copy from: `python -m jaxnorm.examples.train`."""
