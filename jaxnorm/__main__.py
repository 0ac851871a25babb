"""`python -m jaxnorm`: the command line."""

import sys

from jaxnorm.cli import main

sys.exit(main())
