"""The one place that imports triton, and that knows whether it can.

Triton compiles a kernel anew for an integer that is 1 and for one that 16 divides. `do_not_specialize` names those that
change in a training (how many labels are rejected, how many parts there are), or it would wait for a compiler in its
middle. Lengths of rows and of flat tensors keep it: loads and stores are as wide as their addresses and ends are known
to be aligned.

Where triton does not exist (it has wheels for Linux only), kernels stay plain Python functions that nobody calls, and
every op runs its PyTorch reference. Annotations in kernel files are strings (`from __future__ import annotations`), so
that `tl.constexpr` is never looked up there.
"""

from __future__ import annotations

import re
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Stand-in for `triton.jit`, with or without options: the function itself."""
        return (lambda later: later) if function is None else function


HAVE_TRITON = triton is not None
# Decided by TRITON_INTERPRET when triton is imported; later changes of the variable have no effect.
INTERPRETED = HAVE_TRITON and bool(triton.knobs.runtime.interpret)

# Numbers of triton's version, (3, 7, 1).
VERSION = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3]) if HAVE_TRITON else ()

# Triton's default for multiply-add contraction changes with its version; fixed here, so that no upgrade moves a number.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


__all__ = ["HAVE_TRITON", "INTERPRETED", "LAUNCH", "VERSION", "TensorDescriptor", "cdiv", "jit", "tl", "triton"]
