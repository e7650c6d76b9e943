"""spml_kernels: the arithmetic of partial-label methods as fused ops. Needs torch and triton only.

Every public function computes the same thing in plain PyTorch (`reference/`) and, where a kernel exists, in Triton;
`dispatch.use_triton` chooses.
"""

from spml_kernels.label_rows import label_rows

__all__ = ["label_rows"]
