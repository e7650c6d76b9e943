"""Changes of bytes that find faults in parsers: flips, cuts, copies, numbers at their limits, words of the format."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

# What parsers of text and numbers stumble over.
WORDS = (
    *(
        b"0",
        b"-1",
        b"1e400",
        b"-1e400",
        b"nan",
        b"inf",
        b"-inf",
        b"9" * 400,
        b"9" * 5000,
        b"1" + b"0" * 30,
        b"2147483648",
    ),
    *(b"18446744073709551616", b"0x7fffffffffffffff", b"1.5", b"-0.0", b"true", b"null", b"[]", b"{}", b'""', b"~"),
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b"\xe2\x80\xae",
    ),
    *(b'"', b"'", b",", b";", b":", b"{", b"}", b"[", b"]", b"<", b">", b"&", b"*", b"%", b"/", b"..", b"../", b"\\"),
    *(
        b"=1+1",
        b"[/b]",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system",
        b"!!binary x",
        b"? ",
        b"- ",
        b"2001-99-99",
    ),
    *(b"<!ENTITY a '&b;'>", b"&a;"),
)
# Nesting beyond any stack; seldom, since it takes parsers long.
DEEP = (b"[" * 3000, b"{" * 2000, b"- " * 2000, b"<a>" * 2000, b'{"a":' * 1500)
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """The input with one to a few changes.

    Args:
        data: to change.
        others: inputs of the same kind, of which parts are taken.
        rng: decides everything.
        words: of the format, beside those that all formats have.
    """
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        out = bytearray(_change(bytes(out), others, rng, words))
        if len(out) > 1 << 13:
            del out[1 << 13 :]
    return bytes(out)


def _change(data: bytes, others: Sequence[bytes], rng: random.Random, words: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    length = min(len(data) - at, rng.choice((1, 1, 2, 4, 8, 16, 64, 512)))
    kind = rng.randrange(9)
    if kind == 0 and data:
        out = bytearray(data)
        out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        return bytes(out)
    if kind == 1 and data:
        out = bytearray(data)
        out[min(at, len(out) - 1)] = rng.choice(EDGES)
        return bytes(out)
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * rng.choice((2, 2, 3, 50)) + data[at + length :]
    if kind == 4:
        other = rng.choice(others)
        start = rng.randint(0, len(other))
        return data[:at] + other[start : start + rng.choice((4, 32, 4096))] + data[at + rng.choice((0, length)) :]
    if kind == 5 and (numbers := list(NUMBER.finditer(data))):
        number = rng.choice(numbers)
        return data[: number.start()] + rng.choice(WORDS[:17]) + data[number.end() :]
    if kind == 6 and len(data) >= 8:
        # A binary number at one of its limits.
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
        at = rng.randint(0, len(data) - size)
        return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]
    if kind == 7:
        return data[:at]
    word = rng.choice(words) if words and rng.random() < 0.5 else rng.choice(WORDS)
    if rng.random() < 0.02:
        word = rng.choice(DEEP)
    return data[:at] + word + data[at + rng.choice((0, len(word), length)) :]
