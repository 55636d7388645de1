"""What MkDocs calls while it builds the documentation site: see mkdocs.yml.

It adds the generated pages, moves links that leave docs/ to their places on the site, draws the
figures of the concept pages and sets equations as MathML, which browsers show without a script.
"""

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from esscher.report.catalogue import TABLES, families, pages, records, relocated
from esscher.report.concept_figures import DRAWINGS
from esscher.report.equations import mathml

METHODS = "METHODS"
"""Stands in the navigation of mkdocs.yml for the methods of every family."""
MADE = re.compile(r"<!-- (figure|table): (\w+) -->")
LIST = re.compile(r"^([^-\s|#`>][^\n]*)\n(- )", re.MULTILINE)
"""A list right below a line of a paragraph, which this Markdown would not take for one."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write every family with its methods into the navigation."""
    listed = [
        {name.capitalize(): [{entry.slug: f"methods/{entry.slug}.md"} for entry in entries]}
        for name, entries in families().items()
    ]
    config.nav = [_with_methods(item, listed) for item in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and records that are not under docs/."""
    root = _root(config)
    for place, text in pages(root).items():
        files.append(File.generated(config, place, content=text))
    for place, path in records(root).items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the written pages out of docs/, and the figures and tables that they name."""
    place = page.file.src_uri
    if page.file.generated_by is None:
        markdown = relocated(markdown, f"docs/{place}", place)
    root, markdown = _root(config), LIST.sub(r"\1\n\n\2", markdown)
    return MADE.sub(lambda m: _figure(m[2]) if m[1] == "figure" else TABLES[m[2]](root), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, which the Markdown extension arithmatex has marked."""
    return FORMULA.sub(
        lambda match: (
            mathml(html.unescape(match[2]).strip(), block=False)
            if match[1] == "span"
            else f'<div class="formula">{mathml(html.unescape(match[2]).strip(), block=True)}</div>'
        ),
        content,
    )


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _with_methods(item: Any, listed: list[dict[str, Any]]) -> Any:
    if isinstance(item, dict):
        return {name: _with_methods(value, listed) for name, value in item.items()}
    if isinstance(item, list):
        flat = (listed if value == METHODS else [_with_methods(value, listed)] for value in item)
        return [entry for entries in flat for entry in entries]
    return item


def _figure(name: str) -> str:
    return f'<figure class="drawing">{DRAWINGS[name].svg(name)}</figure>'
