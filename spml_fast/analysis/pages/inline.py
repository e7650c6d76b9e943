"""Pages that are one file and load nothing: style and program inside, allowed by their checksums.

What comes from data is escaped by the template, or lies in a block of JSON that the program reads and shows as text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

SHARED = "spml_fast.analysis.pages"


def part(package: str, name: str) -> str:
    """The text of a page's part that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def checksum(text: str) -> Markup:
    """What a content security policy calls an inline script or style."""
    return Markup("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'")


def render_page(
    package: str, template: str, styles: Iterable[str], scripts: Iterable[str], values: dict[str, Any]
) -> str:
    """A page with its style and program inside.

    Args:
        package: where template, styles and scripts lie.
        template: its name; it is given `style`, `style_hash`, `script` and `script_hash`.
        styles: names, after the shared palette.
        scripts: names, after the shared text and maps.
        values: what else the template is given, escaped where it is shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style = part(SHARED, "palette.css") + "".join(part(package, name) for name in styles)
    script = part(SHARED, "shared.js") + "".join(part(package, name) for name in scripts)
    return environment.get_template(template).render(
        style=Markup(style),
        style_hash=checksum(style),
        script=Markup(script),
        script_hash=checksum(script),
        **values,
    )
