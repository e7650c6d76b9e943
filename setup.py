"""Package metadata. `kernels/` holds the package `spml_kernels`, which can be used without the trainer."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
VERSION = re.search(
    r'^__version__ = "(.+)"', Path(__file__).with_name("spml_fast").joinpath("__init__.py").read_text(), re.M
)
assert VERSION is not None

setup(
    name="spml_fast",
    version=VERSION[1],
    description="Fast distributed training of multi-label image classifiers from partly labelled images",
    python_requires=">=3.11",
    packages=find_packages(".", include=["spml_fast", "spml_fast.*"]) + find_packages("kernels"),
    package_dir={"spml_fast": "spml_fast", "spml_kernels": "kernels/spml_kernels"},
    package_data={
        "spml_fast": ["py.typed"],
        "spml_fast.analysis.report": ["*.html"],
        "spml_fast.runs.recipes": ["*.yaml"],
        "spml_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["spml-fast = spml_fast.cli.main:entry"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton>=3.6; sys_platform == 'linux'",
        "timm>=1.0.20",
        "nvidia-dali-cuda130>=2.0; sys_platform == 'linux'",
        "deepspeed>=0.19",
        "numpy>=2",
        "pyarrow>=17",
        "jsonargparse>=4.40",
        "docstring-parser>=0.16",
        "PyYAML>=6",
        "pillow>=10",
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy",
        "tensorboard>=2.15",
    ],
    extras_require={
        # The exporter is tested for real, so the tests need what it needs.
        "test": ["pytest>=8", "hypothesis>=6", *ONNX],
        "lint": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"],
        "onnx": ONNX,
    },
)
