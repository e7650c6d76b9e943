"""spml_kernels: the arithmetic of partial-label methods as fused ops. Needs torch and triton only.

Every public function computes the same thing in plain PyTorch (`reference/`) and, where a kernel exists, in Triton;
`dispatch.use_triton` chooses.
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
