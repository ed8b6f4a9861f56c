"""`python -m pefttools` is the command `pefttools`."""

import sys

from pefttools.cli import main

sys.exit(main())
