"""docs/extending verbatim: a loss, a head and a data set as one file each outside of the package, and an op.

The files are written as the pages show them, and the pages' own commands train with them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spml_fast.data.manifest import Manifest
from tests.support.docs import SMALL, code_blocks, files_of, run_python, run_steps, shell_commands
from tests.support.paths import ROOT
from tests.support.runs import read_metrics

EXTENDING = ROOT / "docs" / "extending"


def write_files(folder: Path, page: str) -> list[str]:
    """Write what a page shows as files; returns their names."""
    files = files_of(EXTENDING / page)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(files)


def commands_of(page: str) -> list[list[str]]:
    """The words of a page's own commands, without the program."""
    blocks = [b for b in code_blocks(EXTENDING / page) if b.language == "bash"]
    return [words[1:] for b in blocks for words in shell_commands(b.text) if words[0] == "spml-fast"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Path:
    """A folder with the data set of dataset.md in pets/, made of digit scenes."""
    folder = tmp_path_factory.mktemp("extending")
    split = Manifest(small_digits).split("train")
    (folder / "pets" / "images").mkdir(parents=True)
    lines = []
    for i in range(60):
        (folder / "pets" / "images" / f"{i}.jpg").write_bytes(Path(split.path(i)).read_bytes())
        lines.append(" ".join([f"{i}.jpg", *(f"d{c}" for c in (split.known.rows([i])[0] == 1).nonzero()[0])]))
    (folder / "pets" / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_files_of_strangers_train(pets):
    """Prepare with the data set's file, train an epoch with the loss's and with the head's, by the pages' commands."""
    pages = {"dataset.md": ["my_data.py"], "method.md": ["my_loss.py", "my_loss_fused.py"], "head.md": ["my_head.py"]}
    for page, names in pages.items():
        assert write_files(pets, page) == names
    steps: list[tuple[str, list[str]]] = []
    for page in ("dataset.md", "method.md", "head.md"):
        for words in commands_of(page):
            if words[0] == "train" and "--help" not in words:
                run = ["--run.dir", f"runs/{page}"]
                words = [*words, *SMALL, "--data.dir", "data/pets", *run]
            steps.append(("command", words))
    steps = [step for step in steps if "--help" not in step[1]]
    steps.append(("command", ["evaluate", "--plugins", "my_loss", "--run", "runs/method.md", "--split", "val"]))
    explain = ["explain", "--plugins", "my_head", "--run", "runs/head.md", "--split", "val", "--count", "2"]
    steps.append(("command", [*explain, "--out", "x.png"]))
    assert [words[0] for _, words in steps] == ["prepare", *["train"] * 3, "evaluate", "explain"]
    shown = run_steps(pets, steps)
    assert Manifest(pets / "data" / "pets").split("train").observed.row_counts(1).max() == 1
    assert "my_loss on pets" in shown and "an on pets" in shown
    for page in ("dataset.md", "method.md", "head.md"):
        (epoch,) = read_metrics(pets / "runs" / page, "epoch")
        assert 0 < epoch["loss"] < 10
    config = (pets / "runs" / "method.md" / "config.yaml").read_text(encoding="utf-8")
    assert re.search(r"gamma: 1(\.0)?\n", config) and "my_loss" in config
    assert (pets / "x.png").stat().st_size > 0


def test_the_help_of_a_strangers_loss(pets):
    write_files(pets, "method.md")
    (words,) = (w for w in commands_of("method.md") if "--help" in w)
    shown = run_python(pets, "-m", "spml_fast", *words)
    assert "--method.gamma" in shown and "0 is assume negative" in " ".join(shown.split())


OP_CHECK = """
import torch
from row_score.op import row_score, row_score_op
from row_score.reference import row_score_reference
generator = torch.Generator().manual_seed(0)
for rows, classes in ((1, 1), (3, 80), (2, 601), (0, 5)):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
        codes = torch.randint(-1, 2, (rows, classes), generator=generator, dtype=torch.int8)
        fused, plain = row_score(logits, codes), row_score_reference(logits, codes)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        assert fused.dtype == torch.float32
        weight = torch.randn(rows, generator=generator)
        grads = [torch.autograd.grad(out @ weight, logits)[0] for out in (fused, plain)]
        torch.testing.assert_close(*grads)
        torch.library.opcheck(row_score_op, (logits, codes))
wide = torch.randn(2, 7, dtype=torch.float64)
assert row_score(wide, torch.ones(2, 7, dtype=torch.int8)).dtype == torch.float64
"""


@pytest.mark.parametrize(("page", "code"), [("method.md", ""), ("kernel.md", OP_CHECK)])
def test_kernels_agree_with_their_references(page, code, tmp_path):
    """Under Triton's interpreter, in a process of its own since Triton asks for it at import."""
    pytest.importorskip("triton")
    write_files(tmp_path, page)
    (tmp_path / "row_score").mkdir(exist_ok=True)
    (tmp_path / "row_score" / "__init__.py").touch()
    words = ["-c", code] if code else ["my_loss_fused.py"]
    run_python(tmp_path, *words, TRITON_INTERPRET="1", SPML_KERNELS="triton")
