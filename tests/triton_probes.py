"""Small Triton functions for tests: a block of Philox and a stage. A file, for Triton reads source."""

import torch
import triton
import triton.language as tl


@triton.jit
def draw_block_kernel(
    key,  # int64, address of [1] int64
    counter,  # int64, address of [4] uint32
    out,  # int64, address of [4] uint32
):
    """Write the four words of one block."""
    c = counter.to(tl.pointer_type(tl.uint32))
    o = out.to(tl.pointer_type(tl.uint32))
    seed = tl.load(key.to(tl.pointer_type(tl.int64)))
    words = tl.philox(seed, tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
    tl.store(o, words[0])
    tl.store(o + 1, words[1])
    tl.store(o + 2, words[2])
    tl.store(o + 3, words[3])


def words(counter: tuple[int, ...], key: int) -> tuple[int, ...]:
    """Return the four words of a counter and a 64-bit key."""
    seed = torch.tensor([key - (1 << 64 if key >> 63 else 0)])
    held = torch.tensor(counter, dtype=torch.int64).to(torch.uint32)
    out = torch.zeros(4, dtype=torch.uint32)
    draw_block_kernel[(1,)](seed.data_ptr(), held.data_ptr(), out.data_ptr())
    return tuple(int(x) for x in out.tolist())


@triton.jit
def halve(v, base, index, factor):
    """Return v * factor: a stage of a method's own, at its simplest."""
    return v * factor
