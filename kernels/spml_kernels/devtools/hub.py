"""Writes the kernels as a repository of the Hugging Face Kernel Hub: `python -m spml_kernels.devtools.hub --out DIR`.

    DIR/README.md                       the card: what there is, shapes, an example
    DIR/build.toml                      for kernel-builder
    DIR/torch-ext/spml_kernels/         the sources that it builds from
    DIR/build/torch-{cpu,cuda}/         what `kernels.get_kernel` loads: the same sources and metadata.json

The Hub wants kernels that can be loaded from any path, several versions in one process: imports within the package are
relative, and ops stand in a namespace of their own, named by a digest of the sources. Nothing has to be compiled ahead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import spml_kernels

NAME, PACKAGE = "spml-kernels", "spml_kernels"
# Raised where a public function changes its meaning; the Hub has a branch `v1` for it.
VERSION = 1
LICENSE = "mit"
BACKENDS = ("cpu", "cuda")
OPS_IMPORT = "from .._ops import add_op_namespace_prefix\n"
PARTS = ("README.md", "build.toml", "torch-ext", "build")

IMPORT = re.compile(rf"^(\s*)from {PACKAGE}((?:\.\w+)*) import ", re.MULTILINE)
REGISTER = "torch.library.custom_op(name, "

OPS = '''"""The namespace of this build's ops, so that other versions can be loaded in the same process."""

from __future__ import annotations

NAMESPACE = "{namespace}"


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op of this build."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''

CARD = """---
license: {license}
library_name: kernels
tags: [kernel]
---

# {name}

{about}

On CUDA tensors the ops launch Triton kernels, compiled at the first call; on the CPU, and for fp64, they compute the
same in plain PyTorch. Both are differentiable where that means something, and work under `torch.compile`. Needs torch
and, on a GPU, triton.

```python
import torch
from kernels import get_kernel

kernels = get_kernel("OWNER/{name}", version={version}, trust_remote_code=True)
features = torch.randn(8, 14, 14, 512)  # [B, h, w, K] of any backbone
weight, bias = torch.randn(20, 512, requires_grad=True), torch.zeros(20)
mean, mean_relu = kernels.cam_pool(features, weight, bias)  # [B, C] each
logits = mean + (5 - 1) * mean_relu  # BoostLU with alpha 5
logits.sum().backward()
```

Logits are [B, C] of any model, fp32, fp16 or bf16; codes are int8 [B, C]: 1 for a positive, 0 for a negative, -1 for an
unknown label.

| function | computes |
|---|---|
{table}

The sources are those of the package `spml_kernels` of spml_fast, with relative imports; `python -m
spml_kernels.devtools.hub` wrote them.
"""


def relative_imports(text: str, depth: int) -> str:
    """The source of a module whose imports of this package are relative.

    Args:
        text: the source.
        depth: folders between the package's own and the module: 0 in `spml_kernels/__init__.py`.
    """
    return IMPORT.sub(lambda found: f"{found[1]}from {'.' * (depth + 1)}{found[2].lstrip('.')} import ", text)


def sources() -> dict[str, str]:
    """Path within the package -> text of every module that the Hub gets.

    Raises:
        ValueError: ops are not registered where they are expected, so that their namespace cannot be set.
    """
    root = Path(spml_kernels.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] == "devtools":
            continue
        text = relative_imports(path.read_text(encoding="utf-8"), len(place.parts) - 1)
        if place.as_posix() == "common/ops.py":
            if text.count(REGISTER) != 1:
                raise ValueError(f"{path} does not register ops with `{REGISTER}...` once")
            text = text.replace(REGISTER, REGISTER.replace("name", 'add_op_namespace_prefix(name.partition("::")[2])'))
            text = text.replace("from torch import Tensor\n", f"from torch import Tensor\n\n{OPS_IMPORT}", 1)
        found[place.as_posix()] = text
    return found


def first_sentence(function: object) -> str:
    """What a public function computes, from its docstring."""
    text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".").replace("|", "\\|")


def card() -> str:
    """The README of the repository."""
    public = [getattr(spml_kernels, name) for name in spml_kernels.__all__ if name[0].islower()]
    return CARD.format(
        license=LICENSE,
        name=NAME,
        version=VERSION,
        about="The arithmetic of training with partial labels as fused ops: BoostLU's two means of a class activation\n"
        "map that is never written, large-loss selection, IGNORE's two passes, point-wise losses.",
        table="\n".join(f"| `{function.__name__}` | {first_sentence(function)} |" for function in public),
    )


def build_toml() -> str:
    """What kernel-builder reads; there is nothing to compile."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    general = f'name = "{NAME}"\nversion = {VERSION}\nlicense = "{LICENSE}"\nedition = 5\nbackends = [{backends}]\n'
    return f"[general]\n{general}\n[torch-noarch]\n"


def check_target(out: Path) -> None:
    """Refuse to write over what is not such a repository. Raises `FileExistsError`."""
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strange = [name for name in found if name not in (*PARTS, ".git", ".gitattributes")]
    if strange or (out.exists() and not out.is_dir()):
        what = ", ".join(strange) or "it is a file"
        raise FileExistsError(f"{out} holds something else ({what}); give another folder")


def write(out: Path) -> str:
    """Write the repository; returns the digest that names its ops.

    Args:
        out: the folder, new, empty, or written by this function before.

    Raises:
        FileExistsError: the folder holds something else.
    """
    check_target(out)
    modules = sources()
    digest = hashlib.sha256(json.dumps([VERSION, modules]).encode()).hexdigest()[:10]
    for part in ("torch-ext", "build"):
        shutil.rmtree(out / part, ignore_errors=True)
    _write_package(out / "torch-ext" / PACKAGE, modules)
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        name = f"_{PACKAGE}_{backend}_{digest}"
        _write_package(folder, modules | {"_ops.py": OPS.format(namespace=name)})
        about = {"name": NAME, "id": name, "version": VERSION, "license": LICENSE, "python-depends": []}
        text = json.dumps(about | {"backend": {"type": backend}}, indent=2)
        (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(), encoding="utf-8")
    (out / "build.toml").write_text(build_toml(), encoding="utf-8")
    return digest


def _write_package(folder: Path, modules: dict[str, str]) -> None:
    for place, text in modules.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write it and say where."""
    parser = argparse.ArgumentParser(description="Write the kernels as a repository of the Hugging Face Kernel Hub.")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the repository")
    args = parser.parse_args(argv)
    try:
        digest = write(args.out)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out}: {NAME} version {VERSION}, ops {PACKAGE}_*_{digest}, for {' and '.join(BACKENDS)}")


if __name__ == "__main__":
    main()
