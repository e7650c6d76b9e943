"""The comparison with the record of compiled kernels, on records made up for it."""

from __future__ import annotations

import pytest
from spml_kernels.common.jit import HAVE_TRITON

if not HAVE_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

from tests.kernels.aot import record
from tests.kernels.aot.record import Fact, Record, check, newest, read_record, write_record

FACT: Fact = {"registers": 40, "stack": 0, "spills": 0, "loads": {"128": 3}}
SPILLING: Fact = {"registers": 128, "stack": 8, "spills": 1, "loads": {"128": 3}}
RECORD: Record = {"3.6.0": {"a": SPILLING}, "3.10.0": {"a": FACT}, "3.9.0": {"a": FACT}}


@pytest.mark.parametrize("worse", [{"registers": 41}, {"stack": 8}, {"spills": 1}])
def test_a_regression_on_a_recorded_version_fails(worse):
    with pytest.raises(AssertionError, match=rf"a, triton 3\.9\.0: {next(iter(worse))}"):
        check("a", FACT | worse, RECORD, "3.9.0")


def test_a_recorded_spill_is_a_fact_and_an_improvement_is_named():
    assert check("a", SPILLING, RECORD, "3.6.0") == ""
    assert check("a", FACT, RECORD, "3.6.0").startswith("registers 40, on record 128; stack 0, on record 8")
    assert check("a", FACT | {"loads": {"32": 9}}, RECORD, "3.9.0") == "loads {'32': 9}, on record {'128': 3}"


def test_an_unknown_version_is_compared_with_the_newest_and_passes():
    assert newest(RECORD) == "3.10.0"
    assert check("a", FACT, RECORD, "4.0.0") == ""
    assert check("a", SPILLING, RECORD, "3.8.0+git1").startswith("other than with triton 3.10.0: registers 128")
    assert check("b", SPILLING, RECORD, "4.0.0") == "not on record for triton 3.10.0"


def test_a_case_that_is_missing_on_a_recorded_version_fails():
    with pytest.raises(AssertionError, match=r"run python -m tests\.kernels\.aot\.record"):
        check("b", FACT, RECORD, "3.9.0")


def test_a_record_is_written_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    assert read_record() == {}
    write_record(RECORD)
    text = record.RECORD.read_text()
    assert read_record() == RECORD and text.index("3.9.0") < text.index("3.10.0")
    write_record(read_record())
    assert record.RECORD.read_text() == text
