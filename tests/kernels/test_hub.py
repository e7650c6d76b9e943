"""The kernels as the Hugging Face Kernel Hub wants them: loadable from anywhere, beside the package itself."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import spml_kernels
import torch
from spml_kernels.devtools import hub

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, written by the command."""
    out = tmp_path_factory.mktemp("hub") / "repository"
    hub.main(["--out", str(out)])
    return out


def load(path: Path, name: str) -> ModuleType:
    """A package under a name that nothing in it knows."""
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    return load(folder / "build" / "torch-cpu", "_an_odd_name_of_kernels")


def test_nothing_in_it_imports_the_installed_package(folder: Path, loaded: ModuleType) -> None:
    modules = sorted((folder / "build").rglob("*.py"))
    assert len(modules) > 50 and not [path for path in modules if "devtools" in path.parts]
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            allowed = {"torch", "triton", *sys.stdlib_module_names}
            assert {name.split(".")[0] for name in names} <= allowed, path
    ours = Path(spml_kernels.__file__).parent
    parts = [m for name, m in sys.modules.items() if name.startswith(loaded.__name__)]
    assert len(parts) > 20 and not [m for m in parts if Path(str(m.__file__)).is_relative_to(ours)]


def test_its_ops_have_a_namespace_of_their_own(folder: Path, loaded: ModuleType) -> None:
    name = json.loads((folder / "build/torch-cpu/metadata.json").read_text(encoding="utf-8"))["id"]
    assert name.isidentifier() and name.startswith("_spml_kernels_cpu_")
    theirs, ours = getattr(torch.ops, name), torch.ops.spml
    assert set(dir(theirs)) - set(dir(torch.ops.aten)) >= {"cam_pool", "large_step", "label_rows", "cam_mask"}
    assert theirs.cam_pool.default is not ours.cam_pool.default
    # The same sources give the same names, others do not.
    assert hub.write(folder) == name.rpartition("_")[2]
    with mock.patch.object(hub, "VERSION", 2):
        assert hub.write(folder) != name.rpartition("_")[2]
    assert hub.write(folder) == name.rpartition("_")[2]


def values(kernels: Any) -> list[torch.Tensor]:
    """What every op gives, with gradients, from inputs that are always the same."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 4, 8, generator=draw, requires_grad=True)
    weight, bias = torch.randn(3, 8, generator=draw, requires_grad=True), torch.zeros(3, requires_grad=True)
    codes = torch.tensor([[1, -1, -1], [-1, 0, 1]], dtype=torch.int8)
    mean, mean_relu = kernels.cam_pool(features, weight, bias)
    (mean + 4 * mean_relu).sum().backward()
    found = [mean, mean_relu, features.grad, weight.grad, bias.grad]
    logits = mean.detach().requires_grad_()
    step = kernels.large_loss_step(logits, codes, torch.tensor(1), k_max=1, scheme="reject")
    terms = kernels.ignore_loss(logits, None, logits.detach() - 1, codes, torch.tensor(0.5), torch.zeros(3))
    point = kernels.PointLoss("an", lambda x, c: torch.nn.functional.softplus(torch.where(c == 1, -x, x)))
    (step.loss + terms.spbc + terms.ign + kernels.label_loss(logits, codes, point)).backward()
    found += [step.loss, step.selected, terms.rejected, logits.grad]
    classes = kernels.positive_classes(codes, width=1)
    images = torch.rand(2, 3, 16, 16, generator=draw)
    found.append(kernels.cam_mask(features.detach(), weight.detach(), bias.detach(), classes, images, threshold=0.5))
    ids, listed = torch.tensor([2, 0, 1], dtype=torch.int16), torch.tensor([1, 1, 0], dtype=torch.int8)
    rows = torch.tensor([1, 0])
    sparse = (torch.tensor([0, 1, 3]), ids, listed, rows)
    found.append(kernels.label_rows(*sparse, num_classes=3, default=-1, max_row=2))
    return [value.detach() for value in found]


def test_it_computes_what_the_package_computes(loaded: ModuleType) -> None:
    assert set(loaded.__all__) == set(spml_kernels.__all__)
    for theirs, ours in zip(values(loaded), values(spml_kernels), strict=True):
        assert torch.equal(theirs, ours)


INTERPRETED = """
import importlib.util, sys, torch
sys.path[:0] = [{root!r}, {kernels!r}]
from tests.kernels.test_hub import load, values
from pathlib import Path
loaded = load(Path({folder!r}) / "build" / "torch-cuda", "_interpreted_kernels")
assert loaded.common.jit.INTERPRETED
print([value.double().sum().item() for value in values(loaded)])
"""


@pytest.mark.slow
@pytest.mark.aot
def test_its_triton_kernels_run_in_the_interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = INTERPRETED.format(root=str(ROOT), kernels=str(ROOT / "kernels"), folder=str(folder))
    # The point function has no kernel, so that the choice is left to each op but for the two that are asked here.
    code = code.replace("values(loaded)]", "triton_values(loaded)]").replace("load, values", "load, triton_values")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPML_KERNELS", "triton")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setenv("SPML_KERNELS", "reference")
    wanted = [value.double().sum().item() for value in triton_values(spml_kernels)]
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == pytest.approx(wanted, rel=1e-4)


def triton_values(kernels: Any) -> list[torch.Tensor]:
    """Ops that have a kernel, at a small size."""
    draw = torch.Generator().manual_seed(1)
    logits, codes = torch.randn(3, 20, generator=draw), torch.randint(-1, 2, (3, 20), generator=draw).to(torch.int8)
    features, weight = torch.randn(2, 3, 3, 16, generator=draw), torch.randn(5, 16, generator=draw)
    step = kernels.large_loss_step(logits, codes, torch.tensor(4), k_max=4, scheme="reject")
    return [*kernels.cam_pool(features, weight, torch.zeros(5)), step.loss, step.selected.float()]


def test_the_card_and_its_example(folder: Path, loaded: ModuleType) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | " in text for name in spml_kernels.__all__ if name[0].islower())
    assert all(len(line.split("|")[2]) > 20 for line in text.splitlines() if line.startswith("| `"))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict[str, Any] = {}
    stand_in = ModuleType("kernels")
    stand_in.get_kernel = lambda name, **options: loaded  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"kernels": stand_in}):
        exec(code, names)
    assert names["logits"].shape == (8, 20) and names["weight"].grad.shape == (20, 512)


def test_what_describes_it(folder: Path) -> None:
    general = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        about = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text(encoding="utf-8"))
        assert about["backend"] == {"type": backend} and about["version"] == general["version"]
        assert about["name"] == general["name"] == hub.NAME and re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", about["name"])
    assert (folder / "torch-ext/spml_kernels/__init__.py").is_file()
    assert not (folder / "torch-ext/spml_kernels/_ops.py").exists(), "kernel-builder makes its own"


def test_no_other_folder_is_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds something else \(thesis\.tex\)"):
        hub.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_relative_imports() -> None:
    text = (
        "from spml_kernels.common.jit import jit\n    from spml_kernels import cam_pool\nfrom spml_kernels_x import y"
    )
    assert hub.relative_imports(text, 1).splitlines() == [
        "from ..common.jit import jit",
        "    from .. import cam_pool",
        "from spml_kernels_x import y",
    ]
    assert hub.relative_imports("from spml_kernels.a.b import c", 0) == "from .a.b import c"


def test_the_hubs_own_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("the package kernels is not installed (pip install kernels)")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from kernels import get_local_kernel  # type: ignore[attr-defined]

    module = get_local_kernel(folder, backend="cpu")
    assert str(folder / "build" / "torch-cpu") in str(module.__file__)
    assert all(torch.equal(a, b) for a, b in zip(values(module), values(spml_kernels), strict=True))
