"""Reports of studies and of recordings: tables for the terminal, self-contained pages of HTML.

This package reads results and recordings, and computes nothing. It needs the packages of
`jaxnorm[lab]`.
"""

from jaxnorm.report.notebook import show
from jaxnorm.report.output import OutputError, check_folder, write_files
from jaxnorm.report.page import render_findings, render_page, render_runs
from jaxnorm.report.runs import Run
from jaxnorm.report.terminal import build_tables

__all__ = [
    "OutputError",
    "Run",
    "build_tables",
    "check_folder",
    "render_findings",
    "render_page",
    "render_runs",
    "show",
    "write_files",
]
