"""The README as the first page of the site, and links out of docs/ to where the files can be read."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``index.md``: the README, whose links are those of a file in ``docs/``."""
    text = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    text = text.replace("](", "](../").replace("](../http", "](http").replace("](../docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """What lies outside of ``docs/`` is shown by the repository."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
