"""Label codes that ops give a meaning beyond 1 positive, 0 negative, -1 unknown."""

from __future__ import annotations

# An entry that a loss leaves out: it adds nothing and gets no gradient. Never in the data.
IGNORED = -2
