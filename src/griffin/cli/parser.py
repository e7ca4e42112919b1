"""An argparse parser with one-line errors and the same help pages on every version of Python."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports wrong usage on one line of stderr, with exit code 2."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", HelpFormatter)
        if sys.version_info >= (3, 14):
            settings.setdefault("color", False)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Report wrong usage."""
        self.exit(2, f"griffin: error: {message}; see `{self.prog} --help`\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print; that help or a version cannot be written is an error, which argparse would swallow."""
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
        elif message:
            file.write(message)


class HelpFormatter(argparse.HelpFormatter):
    """Writes `-m, --model MODEL` as Python 3.13 does, on every Python, and keeps the line breaks of descriptions."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"max_help_position": 28})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"
