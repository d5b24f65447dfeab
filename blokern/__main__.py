"""``python -m blokern`` is ``blokern``."""

import sys

from blokern.cli import main

sys.exit(main())
