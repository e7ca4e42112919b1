"""Render plots and tables into one self-contained HTML page. No other module imports jinja2 and plotly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from griffin.errors import GriffinError

_PARTS = Path(__file__).parent


def render(**content: Any) -> str:
    """Render the page. The template escapes all text.

    Raises:
        GriffinError: jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise GriffinError(
            "a report needs plotly and jinja2; install them: pip install 'griffin-llm[report]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(_PARTS, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((_PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page: str = environment.get_template("page.html.jinja").render(
        **content, style=style, script=script, plotly=get_plotlyjs()
    )
    return page
