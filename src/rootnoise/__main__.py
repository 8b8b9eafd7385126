"""`python -m rootnoise`: the command line."""

import sys

from rootnoise.cli import main

sys.exit(main())
