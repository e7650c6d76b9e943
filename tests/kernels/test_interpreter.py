"""Runs the Triton tests (test_triton_*.py) under Triton's interpreter, where there is no GPU to compile for."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from spml_kernels.common.jit import HAVE_TRITON

HERE = Path(__file__).parent
FILES = list(HERE.glob("test_triton_*.py"))


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the files run compiled on this machine's GPU")
def test_kernels_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(file: Path) -> subprocess.CompletedProcess[str]:
        # numpy warns of log(0) in lanes that tl.where drops later.
        words = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
        return subprocess.run(words, capture_output=True, text=True, env=env, cwd=HERE.parent.parent, timeout=900)

    assert FILES
    # The largest first, a core each: the interpreter runs on one.
    files = sorted(FILES, key=lambda f: -f.stat().st_size)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
        for done in pool.map(run, files):
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            print(done.stdout[-1000:])
