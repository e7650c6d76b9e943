"""Where tests find the repository, and the data sets that cannot be part of it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_data(*parts: str) -> Path | None:
    """A file or folder of the test data; None where it is missing.

    The data (COCO photographs, official class files) may not be redistributed, so they lie in the folder that
    SPML_TEST_DATA names, or in `shared/data` beside the repository.
    """
    folder = Path(os.environ.get("SPML_TEST_DATA") or ROOT.parent / "shared" / "data")
    path = folder.joinpath(*parts)
    return path if path.exists() else None


def need_data(*parts: str) -> Path:
    """As `find_data`; skips the test where it is missing, and fails it where SPML_TEST_DATA is set."""
    path = find_data(*parts)
    if path is not None:
        return path
    # Benchmarks use this file where pytest is not installed.
    import pytest

    name = "/".join(parts)
    if os.environ.get("SPML_TEST_DATA"):
        pytest.fail(f"SPML_TEST_DATA is set to {os.environ['SPML_TEST_DATA']}, which has no {name}")
    pytest.skip(f"no {name}; set SPML_TEST_DATA to the folder that holds it")
