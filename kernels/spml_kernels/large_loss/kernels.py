"""The kernels of large_loss: exact search of the k-th largest logit, and what is written with the selection.

Three kernels share the work among programs, the first of them launched once for each digit of the keys; a fourth does
all of it for a batch that one program can hold. `large_loss` launches them.
"""

from __future__ import annotations

from spml_kernels.common.codes import IGNORED
from spml_kernels.common.jit import HAVE_TRITON, jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit

# Kernels see globals of this type alone.
IGNORED_CODE = tl.constexpr(IGNORED) if HAVE_TRITON else IGNORED


@jit
def order_key_jit(z):
    """int32 that orders as the logits do; both zeros have one key."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _digit_jit(key, bits, DONE: tl.constexpr, WIDTH: tl.constexpr):
    """The WIDTH bits of a key after its first DONE, and whether those first ones are `bits`."""
    prefix = -2147483648 if DONE == 0 else -2147483648 ^ (bits << (32 - DONE))
    # What differs from the first bits is left above the digit; the shift keeps the sign.
    rest = (key ^ prefix) >> (32 - DONE - WIDTH)
    agrees = key == key if DONE == 0 else rest >> WIDTH == 0
    return rest & ((1 << WIDTH) - 1), agrees


@jit
def _find_bin_jit(counts, bits, left, mode, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """The state after a pass from its counts: the bin that holds the k-th largest is found, its bits are appended.

    Args:
        counts: int32 [BINS].
        bits, mode: the state after the pass before; 0 for the first.
        left: how many entries are to be taken from those counted, k for the first pass.
        FIRST: whether it was the first pass.
        WIDTH: bits that it counted by.

    Returns:
        The key's bits so far, how many entries are to be taken from the bin, the mode (0 ordinary, 1 for k = 0, 2 for
        fewer candidates than k), and in the ordinary mode whether the bin holds more than are to be taken.
    """
    total = tl.sum(counts, 0)
    # Entries in this bin and all higher ones: falls with the bin, so the bins that reach `left` are the lowest ones.
    reach = total - tl.cumsum(counts, 0) + counts
    enough = reach >= left
    digit = tl.sum(enough.to(tl.int32), 0) - 1
    taken = tl.max(tl.where(enough, 0, reach), 0)
    whole = tl.max((reach == left).to(tl.int32), 0)
    if FIRST:
        mode = tl.where(left <= 0, 1, tl.where(total < left, 2, 0))
        bits = digit
    else:
        bits = (bits << WIDTH) | digit
    return bits, left - taken, mode, (mode == 0) & (whole == 0)


@jit
def _threshold_jit(bits, left, mode):
    """The threshold and how many entries at it are to be taken, from the state after the last pass.

    Returns:
        fp32: infinity for k = 0, minus infinity where all candidates are taken. int32: 0 and its largest number there.
    """
    key = bits ^ -2147483648
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(mode == 1, float("inf"), tl.where(mode == 2, float("-inf"), value))
    return value, tl.where(mode == 1, 0, tl.where(mode == 2, 2147483647, left))


@jit
def _advance(hist_ptr, state_ptr, k_ptr, k_max, FIRST: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """`_find_bin_jit` of counts and state in memory."""
    counts = tl.load(hist_ptr + tl.arange(0, BINS)).to(tl.int32)
    if FIRST:
        bits = 0
        left = tl.minimum(tl.load(k_ptr), k_max).to(tl.int32)
        mode = 0
    else:
        bits = tl.load(state_ptr)
        left = tl.load(state_ptr + 1)
        mode = tl.load(state_ptr + 2)
    return _find_bin_jit(counts, bits, left, mode, FIRST, WIDTH)


@jit
def _load_digits(
    logits_ptr, codes_ptr, bits, turn, elements, DONE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Digits of this program's block of a turn, and which of them count."""
    pid = tl.program_id(0).to(tl.int64)
    offsets = (pid + turn * tl.num_programs(0).to(tl.int64)) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    candidate = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == -1
    digit, agrees = _digit_jit(order_key_jit(z), bits, DONE, WIDTH)
    return digit, candidate & agrees


@jit
def _packed_counts_jit(
    logits_ptr, codes_ptr, bits, elements, rounds, DONE: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr
):
    """How many of this program's entries have each digit of 4 bits, int32 [16], by plain additions.

    Each lane counts its own entries in one 64-bit number, 4 bits a digit, for up to TURNS (15) turns. Four sums over
    the lanes, of every fourth digit in 16 bits each, then give the counts: BLOCK * 15 fits into 15 bits. Nothing here
    takes longer where many entries are alike.
    """
    lane = tl.arange(0, 16)
    counts = tl.zeros((16,), tl.int32)
    one = tl.full((BLOCK,), 1, tl.int64)
    for first in range(0, rounds, TURNS):
        packed = tl.zeros((BLOCK,), tl.int64)
        for turn in range(first, tl.minimum(first + TURNS, rounds)):
            digit, counted = _load_digits(logits_ptr, codes_ptr, bits, turn, elements, DONE, 4, BLOCK)
            packed += tl.where(counted, one << (4 * digit).to(tl.int64), 0)
        for part in tl.static_range(4):
            total = tl.sum((packed >> (4 * part)) & 0x000F000F000F000F, 0)
            fields = (total >> (16 * (lane // 4)).to(tl.int64)) & 0xFFFF
            counts += tl.where(lane % 4 == part, fields.to(tl.int32), 0)
    return counts


@jit(do_not_specialize=["rounds", "k_max"])
def _large_histogram_kernel(
    logits_ptr,
    codes_ptr,
    k_ptr,
    hist_ptr,
    state_ptr,
    out_ptr,
    next_ptr,
    elements,
    rounds,
    k_max,
    DONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BEFORE: tl.constexpr,
    BINS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count candidates that agree with the key so far by the next bits of their key.

    Args:
        logits_ptr, codes_ptr: [elements].
        k_ptr: int64, read by pass 1.
        hist_ptr: counts of the pass before, summed over ranks; state_ptr: its state (from pass 2 on).
        out_ptr: int32 [BINS], zero.
        next_ptr: int32 [3], the state that belongs to these counts (from pass 1 on).
        DONE: bits of the key that earlier passes have found; WIDTH: bits counted by here; BEFORE: in the pass before.
        TURNS: 0 to count by `tl.histogram`, else turns of `_packed_counts_jit`.
    """
    pid = tl.program_id(0)
    bits = 0
    if DONE > 0:
        bits, left, mode, _ = _advance(hist_ptr, state_ptr, k_ptr, k_max, DONE == BEFORE, BEFORE, BINS)
        if pid == 0:
            tl.store(next_ptr, bits)
            tl.store(next_ptr + 1, left)
            tl.store(next_ptr + 2, mode)
    if TURNS == 0:
        counts = tl.zeros((BINS,), tl.int32)
        for turn in range(0, rounds):
            digit, counted = _load_digits(logits_ptr, codes_ptr, bits, turn, elements, DONE, WIDTH, BLOCK)
            counts += tl.histogram(digit, BINS, mask=counted)
    else:
        counts = _packed_counts_jit(logits_ptr, codes_ptr, bits, elements, rounds, DONE, BLOCK, TURNS)
    # Sums of integers are the same in every order.
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@jit
def _large_threshold_kernel(
    logits_ptr,
    codes_ptr,
    hist_ptr,
    state_ptr,
    counts_ptr,
    threshold_ptr,
    room_ptr,
    elements,
    INCLUSIVE: tl.constexpr,
    LIST: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold from the last counts, and by block how many candidates are above and at it.

    Without a list, counts only decide which of the entries at the threshold are left out. Where none of them is, they
    are 0 and the data is not read; with inclusive ties there are none, and one program is enough.

    Args:
        counts_ptr: int32 [2, programs].
        threshold_ptr: fp32; infinity for k = 0, minus infinity where all candidates are taken.
        room_ptr: int64, how many entries at the threshold are to be taken over all ranks.
        WIDTH: bits that the last pass counted by.
    """
    pid = tl.program_id(0)
    bits, left, mode, partly = _advance(hist_ptr, state_ptr, hist_ptr, 0, False, WIDTH, BINS)
    value, room = _threshold_jit(bits, left, mode)
    if pid == 0:
        tl.store(threshold_ptr, value)
        tl.store(room_ptr, room.to(tl.int64))
    if LIST or not INCLUSIVE:
        offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if not LIST:
            elements = tl.where(partly, elements, 0)
        inside = offsets < elements
        z = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        candidate = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == -1
        tl.store(counts_ptr + pid, tl.sum((candidate & (z > value)).to(tl.int32), 0))
        tl.store(counts_ptr + tl.num_programs(0) + pid, tl.sum((candidate & (z == value)).to(tl.int32), 0))


@jit
def _sum_before(counts_ptr, place, number, CHUNK: tl.constexpr):
    """Sums of the first `place` and of the first `number` int32 counts, `number` being at least `place`."""
    before = tl.zeros((CHUNK,), tl.int32)
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, number, CHUNK):
        lane = start + tl.arange(0, CHUNK)
        counts = tl.load(counts_ptr + lane, mask=lane < number, other=0)
        before += tl.where(lane < place, counts, 0)
        total += counts
    return tl.sum(before, 0), tl.sum(total, 0)


@jit
def _end_list_jit(rows_ptr, classes_ptr, valid_ptr, start, end, total, CHUNK: tl.constexpr):
    """Places start .. end of the list: the first `total` of all are valid, further ones have row 0 and class 0."""
    for first in range(start, end, CHUNK):
        lane = first + tl.arange(0, CHUNK)
        beyond = (lane >= total) & (lane < end)
        tl.store(valid_ptr + lane, (lane < total).to(tl.int8), mask=lane < end)
        tl.store(rows_ptr + lane, tl.zeros((CHUNK,), tl.int64), mask=beyond)
        tl.store(classes_ptr + lane, tl.zeros((CHUNK,), tl.int64), mask=beyond)


@jit
def large_entry_jit(z, code, selected, CORRECT: tl.constexpr):
    """Loss and derivative of an entry."""
    positive = code == 1
    if CORRECT:
        positive = positive | selected
    sign = tl.where(positive, -1.0, 1.0)
    loss = softplus_jit(sign * z)
    slope = sign * sigmoid_jit(sign * z)[0]
    if not CORRECT:
        loss = tl.where(selected, 0.0, loss)
        slope = tl.where(selected, 0.0, slope)
    return loss, slope


@jit
def kept_point_jit(z, code):
    """Cross-entropy with unknown as negative, of entries that are not ignored, for `label_loss`."""
    return large_entry_jit(z, code, code == IGNORED_CODE, False)


@jit
def _select_block_jit(
    logits_ptr,
    codes_ptr,
    selected_ptr,
    grad_ptr,
    rows_ptr,
    classes_ptr,
    first,
    row,
    column,
    elements,
    length,
    value,
    room,
    tied_before,
    before,
    INCLUSIVE: tl.constexpr,
    LOSS: tl.constexpr,
    CORRECT: tl.constexpr,
    GRAD: tl.constexpr,
    LIST: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Selection, gradient and places in the list of the BLOCK entries from `first` on.

    Args:
        row, column: of entry `first`, read with LIST.
        value, room: the threshold, and how many entries at it are to be taken.
        tied_before, before: how many entries at the threshold, and how many selected ones, lie before `first`.

    Returns:
        How many entries at the threshold and how many selected ones are in this block, and the sum of losses.
    """
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.minimum(elements - first, BLOCK).to(tl.int32)
    z = tl.load(logits_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes_ptr + first + lane, mask=inside, other=0).to(tl.int32)
    above = (code == -1) & (z > value)
    tied = (code == -1) & (z == value)
    ties = tl.sum(tied.to(tl.int32), 0)
    if not INCLUSIVE:
        tied = tied & (tied_before + tl.cumsum(tied.to(tl.int32), 0) <= room)
    selected = above | tied
    tl.store(selected_ptr + first + lane, selected.to(tl.int8), mask=inside)
    total = 0.0
    if LOSS:
        loss, slope = large_entry_jit(z, code, selected, CORRECT)
        total = tl.sum(tl.where(inside, loss, 0.0), 0)
        if GRAD:
            tl.store(grad_ptr + first + lane, slope.to(grad_ptr.dtype.element_ty), mask=inside)
    if LIST:
        place = before + tl.cumsum(selected.to(tl.int32), 0) - 1
        listed = selected & (place < length)
        # From the first entry's row and column on, 32 bits are enough.
        column += lane
        tl.store(rows_ptr + place, (row + column // CLASSES).to(tl.int64), mask=listed)
        tl.store(classes_ptr + place, (column % CLASSES).to(tl.int64), mask=listed)
    return ties, tl.sum(selected.to(tl.int32), 0), total


@jit(do_not_specialize=["length"])
def _large_select_kernel(
    logits_ptr,
    codes_ptr,
    counts_ptr,
    threshold_ptr,
    room_ptr,
    selected_ptr,
    grad_ptr,
    partial_ptr,
    rows_ptr,
    classes_ptr,
    valid_ptr,
    elements,
    length,
    INCLUSIVE: tl.constexpr,
    LOSS: tl.constexpr,
    CORRECT: tl.constexpr,
    GRAD: tl.constexpr,
    LIST: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Selection of one block; with LOSS its part of the loss and the gradient; with LIST its entries of the list.

    Args:
        counts_ptr, threshold_ptr, room_ptr: from `_large_threshold_kernel`.
        selected_ptr: int8 (bool) [elements]; grad_ptr: [elements]; partial_ptr: fp32 [programs].
        rows_ptr, classes_ptr: int64 [length]; valid_ptr: int8 (bool) [length]; length at most elements.
        CLASSES: entries per row, read with LIST.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    first = pid.to(tl.int64) * BLOCK
    value = tl.load(threshold_ptr)
    room = tl.load(room_ptr)
    number = pid
    if LIST:
        # A block ends its own part of the list, for which it must know the number of all selected entries.
        number = tl.where(first < length, programs, pid)
    tied_before, before = 0, 0
    if not INCLUSIVE or LIST:
        tied_before, tied_total = _sum_before(counts_ptr + programs, pid, number, BLOCK // 4)
    if LIST:
        before, total = _sum_before(counts_ptr, pid, number, BLOCK // 4)
        if INCLUSIVE:
            before += tied_before
            total += tied_total
        else:
            before += tl.maximum(tl.minimum(room, tied_before), 0).to(tl.int32)
            total += tl.maximum(tl.minimum(room, tied_total), 0).to(tl.int32)
        _end_list_jit(rows_ptr, classes_ptr, valid_ptr, first, tl.minimum(first + BLOCK, length), total, 512)
    _, _, loss = _select_block_jit(
        logits_ptr,
        codes_ptr,
        selected_ptr,
        grad_ptr,
        rows_ptr,
        classes_ptr,
        first,
        first // CLASSES,
        (first % CLASSES).to(tl.int32),
        elements,
        length,
        value,
        room,
        tied_before,
        before,
        INCLUSIVE,
        LOSS,
        CORRECT,
        GRAD,
        LIST,
        CLASSES,
        BLOCK,
    )
    if LOSS:
        tl.store(partial_ptr + pid, loss)


@jit
def _find_kth_jit(key, k):
    """The state after the last pass, for keys in registers: the threshold's 32 bits, one after the other.

    A bit is set where at least k keys stay at or above what it gives: 32 counts, which take nothing but a comparison
    an entry. Histograms of this many entries in registers spill under some versions of Triton.

    Args:
        key: int32, the lowest number for what is no candidate.
        k: int32, how many are wanted.

    Returns:
        As `_find_bin_jit`, without the last.
    """
    one = tl.full((), 1, tl.int32)
    bits = tl.full((), 0, tl.int32)
    for turn in range(0, 32):
        trial = bits | (one << (31 - turn))
        enough = tl.sum((key >= (trial ^ -2147483648)).to(tl.int32), 0) >= k
        bits = tl.where(enough, trial, bits)
    above = tl.sum((key > (bits ^ -2147483648)).to(tl.int32), 0)
    number = tl.sum((key > -2147483648).to(tl.int32), 0)
    return bits, k - above, tl.where(k <= 0, 1, tl.where(number < k, 2, 0))


@jit(do_not_specialize=["length", "k_max"])
def _large_single_kernel(
    logits_ptr,
    codes_ptr,
    k_ptr,
    threshold_ptr,
    selected_ptr,
    grad_ptr,
    loss_ptr,
    rows_ptr,
    classes_ptr,
    valid_ptr,
    elements,
    length,
    k_max,
    INCLUSIVE: tl.constexpr,
    LOSS: tl.constexpr,
    CORRECT: tl.constexpr,
    GRAD: tl.constexpr,
    LIST: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """All passes in one program, which holds the batch: elements at most BLOCK.

    The keys stay in registers while the threshold is found. What is written needs more registers per entry, so it is
    made in parts, from logits and codes that are still in the multiprocessor's own cache.

    Args:
        logits_ptr, codes_ptr: [elements].
        k_ptr: int64.
        threshold_ptr, loss_ptr: fp32.
        selected_ptr, grad_ptr, rows_ptr, classes_ptr, valid_ptr, CLASSES: as for `_large_select_kernel`.
        PART: entries written at a time.
    """
    offsets = tl.arange(0, BLOCK)
    inside = offsets < elements
    key = order_key_jit(tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
    candidate = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32) == -1
    # Whether an entry is a candidate takes no register of its own: others get the lowest key, which only a NaN has.
    key = tl.where(candidate, key, -2147483648)
    bits, left, mode = _find_kth_jit(key, tl.minimum(tl.load(k_ptr), k_max).to(tl.int32))
    value, room = _threshold_jit(bits, left, mode)
    tied, selected, loss = 0, 0, 0.0
    for first in range(0, elements, PART):
        tied_here, selected_here, loss_here = _select_block_jit(
            logits_ptr,
            codes_ptr,
            selected_ptr,
            grad_ptr,
            rows_ptr,
            classes_ptr,
            first,
            first // CLASSES,
            first % CLASSES,
            elements,
            length,
            value,
            room,
            tied,
            selected,
            INCLUSIVE,
            LOSS,
            CORRECT,
            GRAD,
            LIST,
            CLASSES,
            PART,
        )
        tied += tied_here
        selected += selected_here
        loss += loss_here
    if LIST:
        _end_list_jit(rows_ptr, classes_ptr, valid_ptr, 0, length, selected, 512)
    # Last, or the compiler keeps who stores single numbers on the stack meanwhile.
    tl.store(threshold_ptr, value)
    if LOSS:
        tl.store(loss_ptr, loss)
