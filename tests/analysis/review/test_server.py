"""The server answers this machine alone, at its own address, with what belongs to the page and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spml_fast.analysis.review.decisions import DecisionTable, read_table
from spml_fast.analysis.review.server import ReviewPage, ReviewServer
from spml_fast.cli import review as command
from spml_fast.core import lock
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import DECISION_COLUMNS, OutputFile
from tests.support.review import MadePage, make_review_page

DAY = "2026-01-02T03:04:05Z"
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePage:
    made = make_review_page(tmp_path_factory.mktemp("server") / "folder")
    (made.path / "secret.txt").write_text("secret")
    return made


@pytest.fixture
def server(made: MadePage, tmp_path: Path) -> Iterator[ReviewServer]:
    """A server of the page, whose decisions go elsewhere."""
    page = ReviewPage(made.path)
    output = OutputFile(tmp_path / "decisions.csv", "csv", ",".join(DECISION_COLUMNS), "--out")
    with ReviewServer(page, DecisionTable(output, page.data)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: ReviewServer, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
    """One request, whose path is sent as it is."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
    given = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request(method, path, data, given)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_a_browser_that_goes_away_is_no_news(server: ReviewServer, capfd: pytest.CaptureFixture[str]) -> None:
    for error, told in ((ConnectionResetError(), False), (BrokenPipeError(), False), (KeyError("mine"), True)):
        try:
            raise error
        except type(error):
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("mine" in capfd.readouterr().err) is told


def test_what_belongs_to_the_page(server: ReviewServer, made: MadePage) -> None:
    status, headers, body = ask(server, f"/{server.token}/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    text = body.decode()
    assert '<meta name="autosave" content="on">' in text and "connect-src 'self'" in text[:1000]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    # The file itself is another one: it saves nothing by itself and connects to nothing.
    assert "connect-src 'none'" in (made.path / "index.html").read_text()
    name = sorted(server.page.pictures)[0]
    status, headers, body = ask(server, f"/{server.token}/{name}")
    assert status == 200 and headers["Content-Type"] == "image/jpeg" and body == (made.path / name).read_bytes()
    assert ask(server, f"/{server.token}/", "HEAD")[2] == b""
    assert json.loads(ask(server, f"/{server.token}/decisions")[2]) == {"entries": {}}


def test_nothing_else(server: ReviewServer, made: MadePage) -> None:
    """Neither other files of the folder, nor what leads out of it, nor pictures of the data set."""
    folder = next(iter(server.page.pictures)).split("/")[0]
    for path in (
        "index.html",
        "secret.txt",
        "decisions.csv",
        "..",
        "../folder/secret.txt",
        f"{folder}/",
        f"{folder}/../secret.txt",
        f"{folder}/..%2fsecret.txt",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        f"{folder}/999999.jpg",
        f"{folder}/000000.jpg?x",
        f"{folder}/000000.jpg%00",
        "photos/00010.jpg",
    ):
        status, _, body = ask(server, f"/{server.token}/{path}")
        assert status == 404 and b"secret" not in body and b"root:" not in body, path
    for path in (
        "/",
        "/etc/passwd",
        f"/{server.token}",
        f"/{server.token}x/",
        "/x/",
        "/secret.txt",
        f"/x/{server.token}/",
    ):
        assert ask(server, path)[0] == 403, path
    assert len(server.token) >= 32


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    made = make_review_page(tmp_path / "folder")
    page = ReviewPage(made.path)
    name = sorted(page.pictures)[0]
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    (made.path / name).unlink()
    (made.path / name).symlink_to(outside)
    assert page.picture(name) is None
    os.remove(made.path / name)
    assert page.picture(name) is None


def test_a_page_that_lists_other_files(tmp_path: Path) -> None:
    """A page that somebody has changed cannot ask for more than pictures of its own folder."""
    made = make_review_page(tmp_path / "folder")
    file = made.path / "index.html"
    text = file.read_text()
    name = sorted(ReviewPage(made.path).pictures)[0]
    file.write_text(text.replace(name, "../outside.jpg"))
    page = ReviewPage(made.path)
    assert "../outside.jpg" not in page.pictures and page.picture("../outside.jpg") is None and len(page.pictures) > 5


def test_other_origins_are_refused(server: ReviewServer) -> None:
    """A name that leads to 127.0.0.1, a page of another site, a request without a host."""
    port = server.server_address[1]
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
    ):
        assert ask(server, f"/{server.token}/decisions", **headers)[0] == 403, headers
    assert ask(server, f"/{server.token}/", Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(server, f"/{server.token}/", Host=f"localhost:{port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", port), 20) as plain:
        plain.sendall(f"GET /{server.token}/ HTTP/1.0\r\n\r\n".encode())
        assert plain.recv(1000).split(b" ")[1] == b"403"


def test_decisions_are_written_at_once(server: ReviewServer) -> None:
    path = f"/{server.token}/decisions"
    changes = {"3": ["accept", DAY, "eva"], "1": ["skip", DAY, ""]}
    assert ask(server, path, "POST", {"changes": changes})[0] == 200
    rows = read_table(server.table.path)
    assert [(row[7], row[8], row[9]) for row in rows] == [("skip", "", DAY), ("accept", "eva", DAY)]
    assert ask(server, path, "POST", {"changes": {"3": None}})[0] == 200
    assert len(read_table(server.table.path)) == 1
    assert json.loads(ask(server, path)[2]) == {"entries": {"1": ["skip", DAY, ""]}}
    assert not server.table.path.with_name("decisions.csv.partial").exists()


def test_requests_that_are_refused(server: ReviewServer) -> None:
    path = f"/{server.token}/decisions"
    good = {"changes": {"1": ["accept", DAY, ""]}}
    assert ask(server, path, "POST", b"{")[0] == 400
    assert ask(server, path, "POST", b"[" * 100_000)[0] == 400
    assert ask(server, path, "POST", {"changes": {"999": None}})[0] == 400
    # What a form of another page may send without asking.
    assert ask(server, path, "POST", good, Content_Type="text/plain")[0] == 404
    assert ask(server, f"/{server.token}/other", "POST", good)[0] == 404
    assert ask(server, "/x/decisions", "POST", good)[0] == 403
    assert ask(server, path, "POST", b"", Content_Length="99999999999")[0] == 413
    assert ask(server, path, "POST", b"", Content_Length="-1")[0] == 413
    assert ask(server, path, "PUT", good)[0] == 501
    assert not server.table.path.exists() and server.table.entries == {}
    # The browser is told what is wrong with the file.
    server.table.path.write_text("mine")
    status, _, body = ask(server, path, "POST", good)
    assert status == 409 and "was changed by another program" in json.loads(body)["error"]
    assert server.table.path.read_text() == "mine"


class TestCommand:
    """`spml-fast review`, up to where it would serve."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["TMP/none.html"],
                r"none\.html cannot be read: No such file or directory; give a page of `spml-fast",
            ),
            (["TMP"], r"index\.html cannot be read"),
            (["TMP/other.html"], r"other\.html is no page of `spml-fast suggest --page`; make one"),
            (["TMP/damaged.html"], r"damaged\.html is damaged; make it again"),
            (["TMP/halved.html"], r"halved\.html is damaged; make it again"),
            (["FOLDER", "--port", "70000"], r"--port is 70000; it must be 0 \(any free one\) to 65535"),
            (["FOLDER", "--out", "TMP/labels.csv"], r"--out .*labels\.csv exists and was not written by this command"),
            (["FOLDER", "--out", "TMP/no/d.csv"], r"there is no directory"),
            (
                ["FOLDER", "--out", "TMP/d.csv", "--port", "PORT"],
                r"port .* of 127\.0\.0\.1 cannot be used: .*; give",
            ),
        ],
    )
    def test_what_users_get_wrong(self, made: MadePage, tmp_path: Path, words: list[str], message: str) -> None:
        (tmp_path / "other.html").write_text("<p>mine</p>")
        (tmp_path / "labels.csv").write_text("path,positives\n")
        start = '<meta name="generator" content="spml_fast suggest">'
        (tmp_path / "damaged.html").write_text(start + '<script type="application/json" id="data">{</script>')
        rows = '{"images": [], "rows": {"image": [0]}}'
        (tmp_path / "halved.html").write_text(start + f'<script type="application/json" id="data">{rows}</script>')
        before = sorted(tmp_path.iterdir())
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            given = [w.replace("TMP", str(tmp_path)).replace("FOLDER", str(made.path)) for w in words]
            with pytest.raises(UserError, match=message):
                command.main([port if word == "PORT" else word for word in given])
        lock.release_all()
        assert sorted(tmp_path.iterdir()) == before

    def test_ending(self, tmp_path: Path) -> None:
        text = command.ending("data/mine", Path("decisions.csv"), 3, 60)
        assert "3 of 60 decided in decisions.csv" in text
        assert "spml-fast relabel --manifest data/mine --decisions decisions.csv --out data/mine-2" in text
        assert "next" not in command.ending("data/mine", Path("d.csv"), 0, 60)
