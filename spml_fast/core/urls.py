"""Places on object storage: `s3://bucket/set` where a path may stand as well."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from spml_fast.core.errors import UserError
from spml_fast.core.text import has_surrogates, printable

# What a URL may begin with.
SCHEMES = ("s3", "gs", "http", "https", "az", "abfs")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# What `Path` makes of a URL.
_COLLAPSED = re.compile(rf"(?:{'|'.join(SCHEMES)}):/[^/]")


class Url(str):
    """A place on object storage, without a slash at its end. Made by `location`.

    `os.path.join` works on it as on a path.
    """

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        """The place of that relative name below this one."""
        return Url(f"{self}/{name}")

    @property
    def scheme(self) -> str:
        """What it begins with: s3, gs, http ..."""
        return self.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The bucket, or the host of http."""
        return self.partition("://")[2].partition("/")[0]

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.rpartition("/")[2]


Location = Path | Url


def is_url(where: object) -> bool:
    """Whether a path or text names a place on object storage."""
    return isinstance(where, str) and _URL.match(where) is not None


def _is_valid_host(scheme: str, host: str) -> bool:
    """Whether a web server's name and port can be ones; buckets have rules of their store."""
    if scheme not in ("http", "https"):
        return True
    try:
        parts = urlsplit(f"{scheme}://{host}")
        # A port that is none, and a name that cannot be looked up, are noticed when they are asked for.
        return (parts.port is None or parts.port > 0) and bool((parts.hostname or "").encode("idna"))
    except ValueError:
        return False


def location(where: str | os.PathLike[str]) -> Location:
    """A path, or a checked URL where the text is one.

    Raises:
        UserError: the URL has another scheme, no bucket, or parts that would end up in files and messages.
    """
    text = os.fspath(where)
    match = _URL.match(text)
    if match is None:
        if _COLLAPSED.match(text):
            raise UserError(f"{printable(text)} was a URL that became a path; give it as text, not as a Path")
        return Path(text)
    shown = printable(text)
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    if scheme not in SCHEMES:
        raise UserError(f"{shown} begins with {scheme}://, which is not read; the schemes are {', '.join(SCHEMES)}")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{shown} names no bucket or host")
    if "@" in bucket and scheme in ("http", "https"):
        raise UserError(
            f"a URL of {scheme} has a user and password in it, which runs would write down; give them to fsspec "
            "instead (docs/data.md, Data on object storage)"
        )
    if not _is_valid_host(scheme, bucket):
        raise UserError(f"{shown} has no valid host and port: {printable(bucket)}")
    if has_surrogates(rest):
        raise UserError(f"{shown} is not UTF-8 text, as names on object storage are")
    if any(mark in rest for mark in "?#\0") or "::" in rest:
        raise UserError(f"{shown} has one of ? # ::; a data set is named by a plain URL")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise UserError(f"{shown} has an empty part, or . or .. as one; write the URL without it")
    return Url(f"{scheme}://{rest}")


def join(root: Location, relative: str) -> Location:
    """A place that a Manifest names, seen from its own: a path, absolute or relative, or a URL.

    Raises:
        UserError: it leads out of the URL `root`.
    """
    if is_url(relative):
        return location(relative)
    if not isinstance(root, Url):
        return root / relative
    if os.path.isabs(relative):
        return Path(relative)
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{root} has its images at {printable(relative)}, outside of it; name them by a URL")
    return Url("/".join([root, *parts]))
