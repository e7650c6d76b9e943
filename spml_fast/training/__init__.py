"""The training loop: trainer, engine, optimizer, checkpoints, logs.

The folder is not called `train`, because importing it would then put it in the place of the function `spml_fast.train`.
"""
