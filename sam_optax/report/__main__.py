"""`python -m sam_optax.report`."""

import sys

from .command import main

sys.exit(main())
