"""Where griffin keeps what it has made: built-in models, packed weights, profiles. Standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """$GRIFFIN_CACHE, else the platform's cache folder (on Linux $XDG_CACHE_HOME or ~/.cache) with /griffin."""
    if named := os.environ.get("GRIFFIN_CACHE"):
        return Path(named).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "griffin"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "griffin"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "griffin"
    return Path.home() / ".cache" / "griffin"
