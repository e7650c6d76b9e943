"""Package metadata. `kernels/` holds the package `spml_kernels`, which can be used without the trainer.

Supported releases stand in stacks.toml alone: its oldest ones are the floors here.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
STACKS = tomllib.loads((HERE / "stacks.toml").read_text(encoding="utf-8"))
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "spml_fast" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None

# Their wheels exist for Linux alone.
LINUX_ONLY = ("triton", "nvidia-dali-cuda130")


def requirement(name: str, oldest: str) -> str:
    """A line of install_requires."""
    return f"{name}>={oldest}" + ("; sys_platform == 'linux'" if name in LINUX_ONLY else "")


EXTRAS = {name: requirement(name, entry["oldest"]) for name, entry in STACKS["extras"].items()}
OPTIONAL: dict[str, list[str]] = {}
for name, entry in STACKS["optional"].items():
    OPTIONAL.setdefault(entry["extra"], []).append(requirement(name, entry["oldest"]))
ONNX = [line for name, line in EXTRAS.items() if name.startswith("onnx")]

setup(
    name="spml_fast",
    version=VERSION[1],
    description="Fast distributed training of multi-label image classifiers from partly labelled images",
    python_requires=f">={STACKS['python']['oldest']}",
    packages=find_packages(".", include=["spml_fast", "spml_fast.*"]) + find_packages("kernels"),
    package_dir={"spml_fast": "spml_fast", "spml_kernels": "kernels/spml_kernels"},
    package_data={
        "spml_fast": ["py.typed"],
        "spml_fast.analysis.pages": ["*.css", "*.js"],
        "spml_fast.analysis.report": ["*.html", "*.css", "*.js"],
        "spml_fast.analysis.review": ["*.html", "*.css", "*.js"],
        "spml_fast.cli": ["shells/*"],
        "spml_fast.runs.recipes": ["*.yaml"],
        "spml_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["spml-fast = spml_fast.cli.main:entry"]},
    install_requires=[requirement(name, entry["oldest"]) for name, entry in STACKS["packages"].items()],
    extras_require={
        # The exporter and the notebooks are tested for real, so the tests need what they need.
        "test": [line for name, line in EXTRAS.items() if not name.startswith("onnx")] + ONNX,
        "lint": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"],
        "onnx": ONNX,
        "heic": ["pillow-heif>=1.0"],
        # Grad-CAM and others on `Predictor.cam_model`.
        "cam": ["grad-cam>=1.5.7", "torchcam>=0.5.0"],
        # Drives the browser of this machine in tests and benchmarks of the review page.
        "browser": ["playwright>=1.50"],
        # hub, remote, and one for each tracker that needs a package.
        **OPTIONAL,
    },
)
