"""Reports of finished studies: a table for the terminal, one self-contained page of HTML.

This package reads results and computes nothing. It needs the packages of `jaxnorm[lab]`.
"""

from jaxnorm.report.files import OutputError, check_folder, write_files
from jaxnorm.report.page import render_page
from jaxnorm.report.terminal import build_tables

__all__ = ["OutputError", "build_tables", "check_folder", "render_page", "write_files"]
