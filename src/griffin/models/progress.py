"""One line on a terminal while something slow runs; silence everywhere else."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging


@contextmanager
def progress(description: str, *, hub_bars: bool = False) -> Iterator[None]:
    """Show `description` with a spinner and the seconds passed on stderr while the block runs.

    Only when stderr is a terminal; the line is wiped at the end. Inside the block the progress bars and the
    warnings of transformers and huggingface_hub are off; their state is restored afterwards, also after an
    exception. The state is global, so other threads are quiet for as long.

    Args:
        description: a few words such as "converting smollm2-135m".
        hub_bars: on a terminal, leave the Hub's own download bars (they count bytes) in place of the spinner.
    """
    terminal = sys.stderr.isatty()
    with _quiet(bars=terminal and hub_bars):
        if not terminal or hub_bars:
            yield
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=sys.stderr), transient=True, redirect_stderr=False) as bar:
            bar.add_task(description, total=None)
            yield


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    hub_log = logging.getLogger("huggingface_hub")
    level, verbosity = hub_log.level, transformers_logging.get_verbosity()
    bars_were_on = transformers_logging.is_progress_bar_enabled()
    hub_bars_were_on = not are_progress_bars_disabled()
    hub_log.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    if not bars:
        _set_bars(transformers=False, hub=False)
    try:
        yield
    finally:
        hub_log.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if not bars:
            _set_bars(transformers=bars_were_on, hub=hub_bars_were_on)


def _set_bars(*, transformers: bool, hub: bool) -> None:
    with warnings.catch_warnings():  # HF_HUB_DISABLE_PROGRESS_BARS=0 or 1 wins over the calls, with a warning
        warnings.simplefilter("ignore")
        if transformers:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        else:
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        if hub:  # after transformers, whose switch moves the Hub's too
            enable_progress_bars()
        else:
            disable_progress_bars()
