"""The Triton kernel that copies slots. It reads and writes GPU memory and pinned host memory alike."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

PIECE_BYTES = 16 << 10
NUM_WARPS = 4
LINK_PROGRAMS = 64
"""Programs of a copy over the host link: with a piece under way in each they fill it, and most of the GPU is free."""

MAX_PROGRAMS = 2**31 - 1


@triton.jit(do_not_specialize=["num_moves", "num_units"])
def copy_slots_kernel(
    source,
    destination,
    source_slots,
    destination_slots,
    num_moves,
    num_units,
    unit: tl.constexpr,
    block: tl.constexpr,
    even: tl.constexpr,
):
    """Slot `source_slots[i]` of `source` to slot `destination_slots[i]` of `destination` for i < num_moves.

    A slot is `num_units` units of `unit` elements each; a program copies pieces of `block` units, one after the other.
    `even`: whether `num_units` is a multiple of `block`. A unit of two 64-bit elements is one access of 16 bytes; the
    offset of a piece is 64 bits wide, those within it are 32.
    """
    num_pieces = tl.cdiv(num_units, block)
    slot_elements = num_units.to(tl.int64) * unit
    units = tl.arange(0, block)
    offsets = units[:, None] * unit + tl.arange(0, unit)[None, :]
    for work in range(tl.program_id(0), num_moves * num_pieces, tl.num_programs(0)):
        move = work // num_pieces
        piece = work % num_pieces
        start = piece.to(tl.int64) * (block * unit)
        reading = source + (tl.load(source_slots + move).to(tl.int64) * slot_elements + start)
        writing = destination + (tl.load(destination_slots + move).to(tl.int64) * slot_elements + start)
        if even:
            tl.store(writing + offsets, tl.load(reading + offsets))
        else:
            inside = (units < num_units - piece * block)[:, None]
            tl.store(writing + offsets, tl.load(reading + offsets, mask=inside), mask=inside)


class Shape(NamedTuple):
    """How a batch is copied: units of a slot, units that a program copies at once, warps of a program."""

    num_units: int
    block: int
    num_warps: int

    @property
    def is_even(self) -> bool:
        """Whether every piece of a slot is whole."""
        return self.num_units % self.block == 0

    def num_programs(self, num_moves: int, most: int = MAX_PROGRAMS) -> int:
        """Of a launch."""
        return min(most, num_moves * -(-self.num_units // self.block))


def shape_of(
    slot_elements: int, unit: int, element_bytes: int, piece_bytes: int = PIECE_BYTES, num_warps: int = NUM_WARPS
) -> Shape:
    """For slots of so many elements, a multiple of `unit`.

    Args:
        unit: elements that are read and written together, 16 bytes at most.
        piece_bytes, num_warps: how a program copies.
    """
    num_units = slot_elements // unit
    largest = max(1, piece_bytes // (unit * element_bytes))
    block = min(largest, 1 << (num_units - 1).bit_length())
    # a warp has 32 lanes, and a lane should have several accesses under way
    return Shape(num_units, block, max(1, min(num_warps, block // 64)))


PARAMETER_BYTES = (8, 8, 8, 8, 4, 4)
"""Of the kernel: four addresses, two numbers."""


def launch(
    source: Any,
    destination: Any,
    source_slots: Any,
    destination_slots: Any,
    num_moves: int,
    unit: int,
    shape: Shape,
    num_programs: int,
) -> Any:
    """Queue a batch on the current stream of the current device, as one launch; returns the compiled kernel.

    Args:
        source, destination: tensors of one dtype that begin with slot 0, on the GPU or pinned.
        source_slots, destination_slots: int32 on the GPU, [at least num_moves].
        num_programs: fewer take longer and leave more of the GPU free.
    """
    return copy_slots_kernel[(num_programs,)](
        source,
        destination,
        source_slots,
        destination_slots,
        num_moves,
        shape.num_units,
        unit=unit,
        block=shape.block,
        even=shape.is_even,
        num_warps=shape.num_warps,
    )
