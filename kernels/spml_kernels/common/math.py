"""Functions of one logit for kernels, in fp32, safe at |z| = 100 and beyond.

Triton's interpreter has no libdevice, hence no log1p, expm1 or pow; these are made of exp and log here.
"""

from __future__ import annotations

from spml_kernels.common.jit import jit, tl


@jit
def log1p_jit(x):
    """log(1 + x) for x in [0, 1], to a few ulp also where 1 + x rounds to 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@jit
def softplus_jit(z):
    """log(1 + exp(z)); its derivative is sigmoid(z). -log p is softplus(-z), -log(1 - p) is softplus(z)."""
    return tl.maximum(z, 0.0) + log1p_jit(tl.exp(-tl.abs(z)))


@jit
def sigmoid_jit(z):
    """p and q = 1 - p, each from the side on which it does not cancel."""
    e = tl.exp(-tl.abs(z))
    high = 1.0 / (1.0 + e)
    low = e * high
    return tl.where(z >= 0, high, low), tl.where(z >= 0, low, high)


@jit
def log_terms_jit(z, guard):
    """-log(p + guard), its derivative, -log(q + guard), its derivative; exact from the logit where guard is 0."""
    p, q = sigmoid_jit(z)
    exact = guard == 0
    safe = tl.where(exact, 1.0, guard)
    positive = tl.where(exact, softplus_jit(-z), -tl.log(p + safe))
    negative = tl.where(exact, softplus_jit(z), -tl.log(q + safe))
    d_positive = tl.where(exact, -q, -p * q / (p + safe))
    d_negative = tl.where(exact, p, p * q / (q + safe))
    return positive, d_positive, negative, d_negative


@jit
def at_least_jit(x, least):
    """max(x, least), NaN where x is; a GPU's plain maximum gives the other operand there (the interpreter does not)."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@jit
def clamped_terms_jit(z, clamp):
    """-log(max(p, clamp)), its derivative, -log(max(q, clamp)), its derivative; exact where clamp is 0."""
    p, q = sigmoid_jit(z)
    exact = clamp == 0
    safe = tl.where(exact, 1.0, clamp)
    positive = tl.where(exact, softplus_jit(-z), -tl.log(at_least_jit(p, safe)))
    negative = tl.where(exact, softplus_jit(z), -tl.log(at_least_jit(q, safe)))
    d_positive = tl.where((p < safe) & (exact == 0), 0.0, -q)
    d_negative = tl.where((q < safe) & (exact == 0), 0.0, p)
    return positive, d_positive, negative, d_negative


@jit
def expm1_jit(x):
    """exp(x) - 1 for x <= 0, to a few ulp also near 0."""
    u = tl.exp(x)
    difference = u - 1.0
    log = tl.log(tl.where(u > 0, u, 1.0))
    inner = tl.where(u == 1.0, x, difference * (x / tl.where(log == 0, 1.0, log)))
    return tl.where(difference <= -0.5, difference, inner)
