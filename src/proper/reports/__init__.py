"""HTML and CSV reports from the files of a run folder; pages open offline, and no model is loaded."""

from proper.reports.html import write_report

__all__ = ["write_report"]
