"""Runs the Triton tests (test_triton_*.py) under Triton's interpreter, where there is no GPU to compile for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spml_kernels.common.jit import HAVE_TRITON

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_triton_*.py"))


# One file per test, so that the workers share them.
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem.removeprefix("test_triton_"))
@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the files run compiled on this machine's GPU")
def test_kernels_under_the_interpreter(file: Path) -> None:
    # numpy warns of log(0) in lanes that tl.where drops later.
    words = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    # Hypothesis' plugin imports all of it for its summary.
    words += ["-p", "no:hypothesispytest", str(file)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=HERE.parent.parent, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout[-1000:])


def test_there_are_files_to_run() -> None:
    assert len(FILES) >= 7
