"""From the files of a run folder to one page that opens offline. Never loads a model."""

from proper.reports.html import write_report

__all__ = ["write_report"]
