"""Places on object storage: what is one, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spml_fast.core.errors import UserError
from spml_fast.core.urls import Url, is_url, join, location


def test_paths_stay_paths_and_urls_are_tidied():
    assert location("data/a") == Path("data/a") and location(Path("/x")) == Path("/x")
    url = location("S3://bucket/a/b/")
    assert isinstance(url, Url) and url == "s3://bucket/a/b" and location(url) == url
    assert (url.scheme, url.bucket, url.name) == ("s3", "bucket", "b") and url / "c" == "s3://bucket/a/b/c"
    assert os.path.join(url, "train-00000.tar") == "s3://bucket/a/b/train-00000.tar"
    assert location("gs://b") == "gs://b" and is_url("s3://b/a") and not is_url("C:/x") and not is_url(Path("s3://b"))


@pytest.mark.parametrize(
    "where, says",
    [
        ("ftp://host/a", "begins with ftp://, which is not read; the schemes are s3, gs"),
        ("file:///etc", "begins with file://"),
        ("s3:///a", "names no bucket"),
        ("https://me:secret@host/a", "has a user and password in it, which runs would write down"),
        ("https://host/a?token=1", "has one of"),
        ("simplecache::s3://b/a", "is not"),
        ("s3://b/a::s3://c", "has one of"),
        ("s3://b/../c", "has an empty part, or . or .. as one"),
        ("s3://b//c", "has an empty part"),
        ("http://localhost:99999/a", "has no valid host and port: localhost:99999"),
        ("https://host:x/a", "has no valid host and port"),
        ("http://./a", "has no valid host and port"),
        ("http://[::1/a", "has no valid host and port"),
        ("s3://b/\ud800", "is not UTF-8 text"),
    ],
)
def test_other_urls_are_refused(where, says):
    if where.startswith("simplecache"):
        # No URL of ours, and no folder either.
        assert location(where) == Path(where)
        return
    with pytest.raises(UserError, match=says) as caught:
        location(where)
    assert "secret" not in str(caught.value)


def test_a_url_that_became_a_path_is_told():
    with pytest.raises(UserError, match=r"s3:/bucket/set was a URL that became a path; give it as text"):
        location(Path("s3://bucket/set"))


def test_what_a_manifest_names_is_seen_from_its_place():
    url = location("s3://b/set")
    assert join(url, "shards") == "s3://b/set/shards" and join(url, ".") == url
    assert join(url, "/data/images") == Path("/data/images")
    assert join(Path("data/a"), "shards") == Path("data/a/shards") and join(Path("data/a"), "/x") == Path("/x")
    assert join(Path("data/a"), "s3://b/shards") == url.partition("/set")[0] + "/shards"
    with pytest.raises(UserError, match="outside of it"):
        join(url, "../other")
