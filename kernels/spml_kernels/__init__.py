"""spml_kernels: the arithmetic of partial-label methods as fused ops. Needs torch and triton only.

Every public function computes the same thing in plain PyTorch (`reference.py`) and, where a kernel exists, in Triton;
`common.dispatch.use_triton` chooses. Nothing here needs a trainer: logits [B, C] of any model, int8 codes [B, C] with
1 for a positive, 0 for a negative and -1 for an unknown label (`IGNORED` takes an entry out of a loss).

>>> import torch
>>> from spml_kernels import *
>>> logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], requires_grad=True)
>>> codes = torch.tensor([[1, -1, -1], [-1, -1, 1]], dtype=torch.int8)

label_loss: the sum of a point-wise loss. Here unknown labels count as negative.

>>> def assume_negative(logits, codes):
...     return -torch.nn.functional.logsigmoid(torch.where(codes == 1, logits, -logits))
>>> loss = label_loss(logits, codes, PointLoss("an", assume_negative)) / logits.numel()
>>> loss.backward()
>>> round(loss.item(), 4), logits.grad.shape
(1.2138, torch.Size([2, 3]))

large_loss_step: the k unknown labels of largest loss are rejected; `select_large`, `large_loss` and `list_selected` are
its parts.

>>> k = torch.tensor(1)
>>> step = large_loss_step(logits, codes, k, k_max=1, scheme="reject")
>>> step.selected.int().tolist(), step.rows.item(), step.classes.item()
([[0, 0, 0], [0, 1, 0]], 1, 1)
>>> selected, threshold = select_large(logits, codes, k, k_max=1)
>>> bool(large_loss(logits, codes, selected, "reject") == step.loss), threshold.item()
(True, 3.0)
>>> list_selected(selected, 2)[2].tolist()
[True, False]

ignore_statistics and ignore_loss: IGNORE's two passes, from the logits of the masked view.

>>> masked = logits.detach() - 1.0
>>> [round(value, 2) for value in ignore_statistics(logits, masked, codes).tolist()]
[2.0, 2.0, 2.0, 2.0, 2.0, -1.5]
>>> terms = ignore_loss(logits, None, masked, codes, torch.tensor(0.5), torch.zeros(3))
>>> terms.rejected.int().tolist(), round((terms.spbc + terms.ign).item(), 3)
([[0, 0, 1], [0, 1, 0]], 5.514)

cam_pool: both means of a class activation map that is never written; BoostLU's logit for any alpha. cam_map: single
maps. cam_mask and map_mask: images kept where the maps of their observed classes are high.

>>> features, weight, bias = torch.rand(2, 4, 4, 8), torch.randn(3, 8), torch.zeros(3)
>>> mean, mean_relu = cam_pool(features, weight, bias)
>>> boosted = mean + (5 - 1) * mean_relu
>>> classes = positive_classes(codes, width=1)
>>> classes.tolist()
[[0], [2]]
>>> maps = cam_map(features, weight, bias, classes)
>>> images = torch.rand(2, 3, 32, 32)
>>> kept = cam_mask(features, weight, bias, classes, images, threshold=0.5)
>>> torch.equal(kept, map_mask(maps, classes, images, threshold=0.5)), boosted.shape, maps.shape
(True, torch.Size([2, 3]), torch.Size([2, 1, 4, 4]))

label_rows: dense codes of some rows of a sparse label array.

>>> indptr = torch.tensor([0, 1, 3])
>>> class_ids, listed = torch.tensor([2, 0, 1], dtype=torch.int16), torch.tensor([1, 1, 0], dtype=torch.int8)
>>> label_rows(indptr, class_ids, listed, torch.tensor([1, 0]), num_classes=3, default=-1, max_row=2).tolist()
[[1, 0, -1], [-1, -1, 1]]
"""

from spml_kernels.cam_mask.op import cam_mask, map_mask, positive_classes
from spml_kernels.cam_pool.forward import cam_map, cam_pool
from spml_kernels.common.codes import IGNORED
from spml_kernels.ignore_loss.op import IgnoreTerms, ignore_loss, ignore_statistics
from spml_kernels.label_loss.op import PointLoss, label_loss
from spml_kernels.label_rows.op import label_rows
from spml_kernels.large_loss.op import LargeLossStep, large_loss, large_loss_step, list_selected, select_large

__all__ = [
    "IGNORED",
    "IgnoreTerms",
    "LargeLossStep",
    "PointLoss",
    "cam_map",
    "cam_mask",
    "cam_pool",
    "ignore_loss",
    "ignore_statistics",
    "label_loss",
    "label_rows",
    "large_loss",
    "large_loss_step",
    "list_selected",
    "map_mask",
    "positive_classes",
    "select_large",
]
