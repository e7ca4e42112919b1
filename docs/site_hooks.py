"""Hooks of MkDocs: pages from files beside docs/, and links out of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie beside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda link: f"]({_target(link[1], config)})", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Let links out of docs/ lead to the repository, where the site has no page for them."""
    return re.sub(r"\]\(\.\./([^)]+)\)", lambda link: f"]({_target(link[1], config)})", markdown)


def _target(path: str, config: Any) -> str:
    """Where a link, relative to the repository's root, leads on the site."""
    name, hash_, fragment = path.partition("#")
    if name in PAGES:
        return PAGES[name] + hash_ + fragment
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{config['extra']['repository']}/{path}"
