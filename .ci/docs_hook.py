"""MkDocs hook: the README becomes the first page, and links out of docs/ lead to the repository."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as ``index.md``, with its links changed to those of a file in ``docs/``."""
    text = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    text = text.replace("](", "](../").replace("](../http", "](http").replace("](../docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """Make links to files outside of ``docs/`` lead to the repository."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
