"""A self-contained page about a run."""

from vardrop.report.page import report as report
