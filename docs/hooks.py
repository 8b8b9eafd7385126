"""Fails the build where a public name is missing from the reference or has no docstring."""

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

import rootnoise


def on_page_content(html: str, page: Page, **_: object) -> None:
    """Look for the anchor of each public class and function; an undocumented one has none."""
    if page.file.src_uri != "reference.md":
        return
    for name in rootnoise.__all__:
        value = getattr(rootnoise, name)
        if callable(value) and f'id="{value.__module__}.{name}"' not in html:
            raise PluginError(f"{value.__module__}.{name} is undocumented, or not in reference.md")
