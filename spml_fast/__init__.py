"""spml_fast: fast distributed training of multi-label image classifiers from partly labelled images."""

__version__ = "0.1.0"
