"""Hooks of MkDocs: notebooks are pages, with the outputs that they are stored with."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, _ = MarkdownExporter().from_filename(file.abs_src_path)
        page = str(Path(file.src_uri).with_suffix(".md"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Documents link to the notebook itself, which is what there is outside the site."""
    return markdown.replace(".ipynb)", ".md)")
