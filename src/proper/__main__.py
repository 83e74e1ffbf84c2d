"""`python -m proper` is the command `proper`."""

from __future__ import annotations

from proper.cli.app import entry

if __name__ == "__main__":
    entry()
