"""`python -m longshore` is the `longshore` command."""

import sys

from longshore.cli import main

sys.exit(main())
