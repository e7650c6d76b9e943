"""Where a page of a review lies, and what of it may be asked for; needs no PyTorch, so that serving starts at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spml_fast.core.outputs import writer_name

Json = dict[str, Any]
# The file in a folder, and how the folder of its pictures begins.
PAGE = "index.html"
THUMBNAILS = "thumbnails-"
# What every page has near its beginning.
MARK = f'<meta name="generator" content="{writer_name("suggest")}">'
# Words for labels, in the order of their places in `known`.
KNOWN = ("unknown", "positive", "negative")
THUMBNAIL_FOLDER = re.compile(THUMBNAILS + "[0-9a-f]{16}")
THUMBNAIL = re.compile(THUMBNAIL_FOLDER.pattern + r"/[0-9]{6,9}\.jpg")


def is_file(out: Path) -> bool:
    """Whether a page is one file, by its name; else it is a folder."""
    return out.suffix.lower() in (".html", ".htm") and not out.is_dir()
