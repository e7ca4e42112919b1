"""One HTML page of what griffin sweep has measured: tables, plots and answers, to be opened in a browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder that griffin sweep has written")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page to write (default: report.html in that folder)"
    )
    parser.add_argument(
        "--without-text",
        action="store_true",
        help="leave out prompts and answers, for example because their texts may not be redistributed",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: the folder holds no results.
        GriffinError: the page cannot be written, or plotly and jinja2 are not installed.
    """
    from griffin.analysis import files
    from griffin.analysis.folder import read
    from griffin.analysis.report import report

    folder = read(args.folder)
    output = args.output or args.folder / "report.html"
    files.check_writable(output)
    for warning in folder.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    files.write_text(output, report(folder, without_text=args.without_text))
    print(output)
    return 0
