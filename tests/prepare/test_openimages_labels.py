"""Label and class files of OpenImages as they come, against a plain parser, and what can be wrong with them."""

from __future__ import annotations

import csv
import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets.openimages import csv_blocks
from spml_fast.prepare.datasets.openimages.class_files import class_names, read_classes, read_descriptions
from spml_fast.prepare.datasets.openimages.grouping import group_rows
from spml_fast.prepare.datasets.openimages.label_files import read_labels
from tests.support.openimages import (
    LABEL_HEADER,
    group_files,
    write_labels,
)
from tests.support.paths import need_data

# Descriptions, how many classes they name, how many names two classes share; list of trainable classes and its length.
OFFICIAL = {
    "v3": ("v3/class-descriptions.csv", 19_995, "v3/classes-trainable.txt", 5_000),
    "v4": ("v4/class-descriptions.csv", 19_995, "v4/classes-trainable.txt", 7_186),
    "v6": ("oidv6-class-descriptions.csv", 19_994, None, 0),
    "v7": ("v7/oidv7-class-descriptions.csv", 20_931, None, 0),
}


@pytest.mark.parametrize("version", OFFICIAL)
def test_official_class_files(version):
    descriptions, number, trainable, trained = OFFICIAL[version]
    names_by_id = read_descriptions(need_data("openimages", *descriptions.split("/")))
    assert len(names_by_id) == number and names_by_id["/m/01c_0l"] == "Ducks, geese and swans"
    ids = read_classes(need_data("openimages", *trainable.split("/"))) if trainable else list(names_by_id)
    assert len(ids) == (trained or number)
    names = class_names(ids, names_by_id)
    # Names that two classes share carry the id.
    assert len(set(names)) == len(names) and not set(names) & set(ids)
    if version == "v7":
        assert names_by_id["/oi/m_0dzf4"] == "Arm" and sum(i.startswith("/g/") for i in ids) == 47
        assert sum(i.startswith("/oi/m_") for i in ids) == 10


def test_labels_of_official_classes(tmp_path):
    """Rows in the published format for classes of every form; the file of names is V7's own."""
    names_by_id = read_descriptions(need_data("openimages", "v7", "oidv7-class-descriptions.csv"))
    ids = list(names_by_id)
    forms = [next(i for i in ids if i.startswith(f"/{form}/")) for form in ("m", "g", "oi")]
    rows = [f"000026e7ee790996,verification,{forms[0]},0", f"000026e7ee790996,crowdsource-verification,{forms[2]},1"]
    rows += [f"000062a39995e348,verification,{forms[1]},1"]
    for end in ("\n", "\r\n"):
        table = tmp_path / "labels.csv"
        table.write_bytes(end.join(["ImageID,Source,LabelName,Confidence", *rows, ""]).encode())
        grouped = group_files([table], "last", classes=ids)
        assert grouped.ids.tolist() == [0x000026E7EE790996, 0x000062A39995E348]
        codes = grouped.human.rows([0, 1])[:, [ids.index(i) for i in forms]]
        assert codes.tolist() == [[0, -1, 1], [-1, 1, -1]]


A, B, C = "/m/0a", "/m/0b", "/m/0c"


def test_forms_of_a_file(tmp_path):
    rows = [(1, A, 1), (1, B, 0), (2, C, 1), (0xFEDCBA9876543210, A, 0)]
    text = write_labels(tmp_path / "plain.csv", rows).read_text()
    quoted = "\n".join(",".join(f'"{word}"' for word in line.split(",")) for line in text.splitlines())
    columns = [line.split(",") for line in text.splitlines()]
    forms = {
        "mark.csv": ("\ufeff" + text).encode(),
        "crlf.csv": text.replace("\n", "\r\n").encode(),
        "quoted.csv": quoted.encode(),
        "open end.csv": text.rstrip("\n").encode(),
        "empty lines.csv": text.replace("\n", "\n\n").encode(),
        "packed.csv.gz": gzip.compress(text.encode()),
        "order.csv": "".join(",".join((d, c, a, b)) + "\n" for a, b, c, d in columns).encode(),
        "decimals.csv": text.replace(",1\n", ",1.0\n").replace(",0\n", ",0.0\n").encode(),
        "capitals.csv": text.replace("fedcba", "FEDCBA").encode(),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        grouped = group_files([tmp_path / name])
        assert grouped.ids.tolist() == [1, 0xFEDCBA9876543210], name
        assert grouped.human.rows([0, 1]).tolist() == [[1, 0], [0, -1]], name


GOOD = f"00000000000000ff,verification,{A},1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be"),
        (GOOD, "line 1: the header must be ImageID,Source,LabelName,Confidence, not '00000000000000ff"),
        (LABEL_HEADER[:-1] + ",XMin\n" + GOOD, "line 1: the header must be"),
        ("\xff\xfe", "line 1: not the header of a CSV in UTF-8"),
        (LABEL_HEADER + GOOD + "00000000000000ff,verification,/m/0\n", "line 3: 3 fields instead of 4"),
        (LABEL_HEADER + GOOD * 3 + "00000000000000f", "line 5: 1 fields instead of 4"),
        (LABEL_HEADER + GOOD + "00000000000000ff,verification,/m/0b,", "line 3: the Confidence ''"),
        (
            LABEL_HEADER + "\n\n" + GOOD + f"00000000000000ff,verification,{A},0.7\n",
            "line 5: the Confidence '0.7' is not 0 or 1",
        ),
        (LABEL_HEADER + GOOD + f"00000000000000ff,verification,{C},yes\n", "line 3: the Confidence 'yes'"),
        (LABEL_HEADER + GOOD + f"0ff,verification,{A},1\n", "line 3: the ImageID '0ff' is not 16 hexadecimal digits"),
        (LABEL_HEADER + GOOD + f"0x000000000000ff,verification,{A},1\n", "line 3: the ImageID '0x000000000000ff'"),
        (LABEL_HEADER + GOOD + f"00000000000000é,verification,{A},1\n", "line 3: the ImageID '00000000000000é'"),
        (
            LABEL_HEADER + GOOD + f"00000000000000ff,machine,{A},1\n",
            "line 3: the Source is machine; .*--machine-labels",
        ),
        (LABEL_HEADER + GOOD + f"00000000000000ff,guess,{A},1\n", "line 3: the Source 'guess' is not crowdsource-ver"),
        (
            LABEL_HEADER + GOOD + "00000000000000ff,verification,cat,1\n",
            "line 3: the LabelName 'cat' is not a class id",
        ),
        (LABEL_HEADER + GOOD + f'00000000000000ff,verification,"{A},1\n', "line 3: unexpected end of data"),
        (LABEL_HEADER + '"a\nb",verification,/m/0a,1\n', r"line 2: the ImageID 'a\\nb'"),
    ],
)
def test_bad_label_files(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1") if text.startswith("\xff") else text.encode())
    with pytest.raises(UserError, match=rf"labels\.csv, {message}"):
        read_labels([path], [A, B])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        read_labels([tmp_path / "absent.csv"], [A])
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress((LABEL_HEADER + GOOD * 50_000).encode())[:-200])
    with pytest.raises(UserError, match=r"broken\.csv\.gz"):
        read_labels([tmp_path / "broken.csv.gz"], [A])
    old = write_labels(tmp_path / "old.csv", [(1, A, 1)], "human")
    with pytest.raises(UserError, match=r"line 2: the Source is human, as in V1 and V2, .* only V3 to V7 are read"):
        read_labels([old], [A])
    human = write_labels(tmp_path / "human.csv", [(1, A, 1)])
    with pytest.raises(UserError, match=r"line 2: the Source is verification; .*--labels"):
        read_labels([human], [A], threshold=0.5)
    machine = write_labels(tmp_path / "machine.csv", [(1, A, 1), (1, B, 1.5)], "machine")
    with pytest.raises(UserError, match=r"line 3: the Confidence '1.5' is not between 0 and 1"):
        read_labels([machine], [A], threshold=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("/m/0a\n\n/m/0a\n", "line 3: class /m/0a is already in line 1"),
        ("/m/0a\ncat\n", "line 2: 'cat' is not a class id"),
        ("/m/0a,Cat\n", "line 1: '/m/0a,Cat' is not a class id"),
    ],
)
def test_bad_class_lists(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"classes\.txt.* ?{message}"):
        read_classes(tmp_path / "classes.txt")


def test_class_lists_and_names(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfLabelName\r\n/m/0a\r\n\r\n/g/11b-c_\r\n")
    assert read_classes(tmp_path / "classes.txt") == ["/m/0a", "/g/11b-c_"]
    path = tmp_path / "names.csv"
    for text, message in (
        ("/m/0a,A\n/m/0b\n", "line 2: expected a class id and its name"),
        ("/m/0a,A\n/m/0a,B\n", "line 2: class /m/0a has the name 'A' above"),
        ('/m/0a,"A\n', "line 1: unexpected end"),
        ("cat,A\n", "line 1: expected a class id"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"names\.csv, {message}"):
            read_descriptions(path)


rows_of_a_file = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
        st.sampled_from([A, B, C]),
        st.sampled_from(["0", "1", "0.0", "1.0", "1e0"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(rows_of_a_file, st.integers(1, 400), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["negative", "last"]))
def test_parser_reads_what_was_written(tmp_path_factory, rows, block, end, policy):
    path = tmp_path_factory.mktemp("rows") / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(LABEL_HEADER.strip().split(","))
        for image, name, value, crowd in rows:
            writer.writerow([f"{image:016x}", "crowdsource-verification" if crowd else "verification", name, value])
    with pytest.MonkeyPatch.context() as patch:
        # So small that lines are cut anywhere.
        patch.setattr(csv_blocks, "BLOCK", block)
        read = read_labels([path], [A, B])
    expected: dict[tuple[int, str], list[int]] = {}
    for image, name, value, _ in rows:
        if name != C:
            expected.setdefault((image, name), []).append(int(float(value)))
    assert (read.rows, read.other_classes) == (len(rows), sum(name == C for _, name, *_ in rows))
    grouped = group_rows(read, None, 2, policy)
    entries = zip(grouped.human.entry_rows(), grouped.human.classes, grouped.human.codes, strict=True)
    choose = min if policy == "negative" else (lambda codes: codes[-1])
    assert {(int(grouped.ids[r]), (A, B)[c]): code for r, c, code in entries} == {
        pair: choose(codes) for pair, codes in expected.items()
    }
    assert grouped.conflicts == sum(len(set(codes)) == 2 for codes in expected.values())
    assert grouped.repeated == sum(len(codes) - 1 for codes in expected.values())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 60), st.sampled_from(list(',x"\n9')), st.integers(50, 300))
def test_a_spoiled_line_is_named_or_harmless(tmp_path_factory, line, position, character, block):
    """A character changed anywhere: either the line is named, or no other line's labels change."""
    rows = [(i, A, i % 2) for i in range(31)]
    path = write_labels(tmp_path_factory.mktemp("spoiled") / "labels.csv", rows)
    lines = path.read_text().splitlines(keepends=True)
    text = lines[line + 1]
    position %= len(text) - 1
    lines[line + 1] = text[:position] + character + text[position + 1 :]
    path.write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_blocks, "BLOCK", block)
        try:
            grouped = group_rows(read_labels([path], [A]), None, 1, "positive")
        except UserError as error:
            named = int(str(error).partition(", line ")[2].partition(":")[0])
            # A line cut in two is wrong in the second part where the first can stand; a quote runs on.
            assert named in (line + 2, line + 3) or (character == '"' and named >= line + 2)
            return
    codes = dict(zip(grouped.ids.tolist(), grouped.human.codes.tolist(), strict=True))
    assert sum(codes.get(i) == i % 2 for i in range(31)) >= 30
