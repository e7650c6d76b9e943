"""BoostLU without this trainer: the two means of a class activation map, in Triton on a GPU, in PyTorch elsewhere."""

import torch
from spml_kernels import cam_pool

features = torch.randn(8, 14, 14, 512)  # [B, h, w, K] of any backbone
weight, bias = torch.randn(20, 512, requires_grad=True), torch.zeros(20, requires_grad=True)
mean, mean_relu = cam_pool(features, weight, bias)  # [B, C] each, differentiable
logits = mean + (5 - 1) * mean_relu  # BoostLU with alpha 5
logits.sum().backward()
print("logits", tuple(logits.shape), "gradient", tuple(weight.grad.shape))
