"""A method's loss in your own training loop: from logits and label codes, without this trainer."""

import torch

from spml_fast.methods import loss

logits = torch.randn(4, 6, requires_grad=True)
codes = torch.full((4, 6), -1)  # -1 unknown, 0 negative, 1 positive
codes[range(4), range(4)] = 1  # one observed positive an image
for name in ("an", "em", "asl"):
    print(f"{name}: {loss(name, logits, codes).item():.3f}")
loss("ll_r", logits, codes, epoch=3).backward()  # a schedule wants the epoch
