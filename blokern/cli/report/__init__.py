"""``blokern report``: `command.py` reads the words, `runs.py` the folders, `pictures.py` draws, `page.py` writes."""

from blokern.cli.report.command import report

__all__ = ["report"]
