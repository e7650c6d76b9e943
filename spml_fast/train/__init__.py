"""The training loop, its engine, optimizer and checkpoints."""
