"""The command line, a file a command; ``dispatch.py`` chooses between them, ``options.py`` is what they share.

Each command parses its own options, from flags and from a YAML file (``--config``), and imports what it
needs: ``blokern --help`` answers at once.
"""

from blokern.cli.dispatch import main

__all__ = ["main"]
