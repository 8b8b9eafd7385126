"""The reference: public names stand on pages of their own, and an undocumented one fails the build.

Pages that begin with `inside` show whole modules, less the public names that other pages show.
"""

from __future__ import annotations

import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

import rootnoise
from rootnoise.front_door.loop import LoopOptimizer

PUBLIC = {name: getattr(rootnoise, name) for name in rootnoise.__all__}
# What `make_private` returns is of no public name, and stands beside it.
SHOWN = PUBLIC | {"LoopOptimizer": LoopOptimizer}
_shown: dict[str, str] = {}  # the HTML of each page of the reference


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Leave out of the inner pages what is public."""
    if not page.file.src_uri.startswith("reference/inside"):
        return markdown

    def less(line: re.Match[str]) -> str:
        public = [
            name for name, value in SHOWN.items() if getattr(value, "__module__", "") == line[1]
        ]
        hidden = f'["!^_", "!^({"|".join(public)})$"]' if public else '["!^_"]'
        return f"{line[0]}\n    options:\n      filters: {hidden}\n      heading_level: 3\n"

    return re.sub(r"^::: (rootnoise\.\S+)$", less, markdown, flags=re.MULTILINE)


def on_page_content(html: str, page: Page, **_: object) -> None:
    """Keep what the reference shows."""
    if page.file.src_uri.startswith("reference/"):
        _shown[page.file.src_uri] = html


def on_post_template(output_content: str, template_name: str, **_: object) -> str:
    """Let the page of missing pages find its style beside it, as from disk, not at a root."""
    if template_name != "404.html":
        return output_content
    page = re.sub(r'((?:href|src)=|"search": )"/(?!/)', r'\1"', output_content)
    return page.replace('"base": "/"', '"base": "."')


def on_post_build(**_: object) -> None:
    """Look for the anchor of each public class and function; an undocumented one has none."""
    pages = [html for uri, html in _shown.items() if not uri.startswith("reference/inside")]
    for name, value in PUBLIC.items():
        shown = any(f'id="rootnoise.{name}"' in html for html in pages)
        # Participation is the union of the kinds beside it.
        if callable(value) and name != "Participation" and not shown:
            raise PluginError(f"rootnoise.{name} is undocumented, or on no page of reference/")
