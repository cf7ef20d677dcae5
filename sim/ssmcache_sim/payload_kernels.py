"""The Triton kernels that write and check the payload; `payload.py` has the formulas."""

from typing import Any

import torch
import triton
import triton.language as tl

from ssmcache_sim import payload

PIECE_WORDS = 1024


def signed(value: int) -> int:
    """64 bits as the two's complement that torch and Triton compute with."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = tl.constexpr(signed(payload.GOLDEN))
_FIRST_SHIFT = tl.constexpr(payload.FIRST_SHIFT)
_FIRST_FACTOR = tl.constexpr(signed(payload.FIRST_FACTOR))
_SECOND_SHIFT = tl.constexpr(payload.SECOND_SHIFT)
_SECOND_FACTOR = tl.constexpr(signed(payload.SECOND_FACTOR))
_LAST_SHIFT = tl.constexpr(payload.LAST_SHIFT)


@triton.jit
def _shifted(values, by: tl.constexpr):
    # the shift of a signed number would carry its sign along
    return (values.to(tl.uint64, bitcast=True) >> by).to(tl.int64, bitcast=True)


@triton.jit
def _mix(values):
    values = (values ^ _shifted(values, _FIRST_SHIFT)) * _FIRST_FACTOR
    values = (values ^ _shifted(values, _SECOND_SHIFT)) * _SECOND_FACTOR
    return values ^ _shifted(values, _LAST_SHIFT)


@triton.jit
def _wrong_bytes(difference):
    count = tl.zeros_like(difference)
    for byte in tl.static_range(8):
        count += (((difference >> (8 * byte)) & 0xFF) != 0).to(tl.int64)
    return tl.sum(count)


@triton.jit(do_not_specialize=["stride", "first_block", "start", "stop", "seed", "words", "tokens_per_block"])
def pages_kernel(
    pool,
    stride,
    slots,
    seeds,
    first_block,
    start,
    stop,
    seed,
    words,
    tokens_per_block,
    wrong,
    checking: tl.constexpr,
    piece: tl.constexpr,
):
    """Tokens start..stop - 1 of a sequence in one buffer: program (i, j) has piece j of block first_block + i.

    `stride`: words from slot to slot. `wrong`: where the wrong bytes are counted if `checking`.
    """
    block = first_block.to(tl.int64) + tl.program_id(0)
    slot = tl.load(slots + block).to(tl.int64)
    if slot >= 0:
        word = tl.program_id(1) * piece + tl.arange(0, piece)
        position = block * tokens_per_block + word // words
        inside = (word < tokens_per_block * words) & (position >= start) & (position < stop)
        token = _mix(tl.load(seeds + block) + position)
        value = _mix(token + seed.to(tl.int64) + (word % words).to(tl.int64) * _GOLDEN)
        place = pool + slot * stride + word
        if checking:
            found = tl.load(place, mask=inside, other=0)
            count = _wrong_bytes(tl.where(inside, found ^ value, 0))
            if count > 0:
                tl.atomic_add(wrong, count)
        else:
            tl.store(place, value, mask=inside)


@triton.jit(do_not_specialize=["stride", "live_slot", "num_steps"])
def digests_kernel(pool, stride, live_slot, factors, addends, digests, num_steps, is_new: tl.constexpr):
    """The digest after each step, from that in the live slot on."""
    digest = tl.load(pool + live_slot.to(tl.int64) * stride)
    if is_new:
        digest = digest * 0
    for step in range(num_steps):
        digest = digest * tl.load(factors + step) + tl.load(addends + step)
        tl.store(digests + step, digest)


@triton.jit(do_not_specialize=["stride", "seed", "words"])
def states_kernel(pool, stride, slots, digests, seed, words, wrong, checking: tl.constexpr, piece: tl.constexpr):
    """States of one buffer: program (i, j) has piece j of the state in slot i, whose digest is digests[i]."""
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    digest = tl.load(digests + tl.program_id(0))
    word = tl.program_id(1) * piece + tl.arange(0, piece)
    value = tl.where(word == 0, digest, _mix(digest + seed.to(tl.int64) + word.to(tl.int64) * _GOLDEN))
    place = pool + slot * stride + word
    inside = word < words
    if checking:
        found = tl.load(place, mask=inside, other=0)
        count = _wrong_bytes(tl.where(inside, found ^ value, 0))
        if count > 0:
            tl.atomic_add(wrong, count)
    else:
        tl.store(place, value, mask=inside)


def launch_pages(
    view: torch.Tensor, slots: Any, seeds: Any, start: int, stop: int, seed: int, wrong: Any, checking: bool
) -> None:
    """Queue on the current stream. `view`: [slots, tokens_per_block, words] int64; `slots`: int32, `seeds`: int64, on
    the device, by block of the sequence.
    """
    tokens_per_block, words = view.shape[1], view.shape[2]
    first_block, end_block = start // tokens_per_block, -(-stop // tokens_per_block)
    grid = (end_block - first_block, -(-tokens_per_block * words // PIECE_WORDS))
    pages_kernel[grid](
        view, view.stride(0), slots, seeds, first_block, start, stop, signed(seed), words, tokens_per_block, wrong,
        checking=checking, piece=PIECE_WORDS,
    )  # fmt: skip


def launch_states(view: torch.Tensor, slots: Any, digests: Any, seed: int, wrong: Any, checking: bool) -> None:
    """Queue on the current stream. `view`: [slots, words] int64; `slots`: int32, `digests`: int64, on the device."""
    words = view.shape[1]
    grid = (slots.numel(), -(-words // PIECE_WORDS))
    states_kernel[grid](
        view, view.stride(0), slots, digests, signed(seed), words, wrong, checking=checking, piece=PIECE_WORDS
    )
