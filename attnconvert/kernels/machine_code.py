"""Machine code that ptxas got wrong, found before it runs.

ptxas 12.8, which Triton 3.6 brings, compiles some kernels that spill registers so that the shared-memory address of a tensor-core operand starts from the stack
pointer instead of the operand's own register (seen on an H100: `IADD3 R8, P1, R1, 0x2, RZ` before an HGMMA, then reads outside of shared memory, and
an illegal memory access or wrong numbers; the same source with other block sizes or stages is fine). Nothing in a Triton kernel has its address taken
on the stack, so arithmetic on the stack pointer is always this error.
"""

from __future__ import annotations

import struct

_STACK_POINTER = 1
# The low byte of an opcode names the operation, the bits above it the kinds of operands (2: registers). From listings of compute capability 8.0 and 9.0.
_ARITHMETIC = {0x10: "IADD3", 0x11: "LEA", 0x12: "LOP3", 0x19: "SHF", 0x24: "IMAD", 0x25: "IMAD.WIDE", 0x27: "IMAD.HI", 0x36: "VIADD"}
_TO_UNIFORM = 0x2CA  # R2UR, whose destination is another kind of register


def uses_of_stack_pointer(cubin: bytes) -> list[str]:
    """Instructions of a kernel that calculate with the stack pointer, as `offset operation`; empty for a sound kernel.

    Args:
        cubin: a 64-bit ELF file for one architecture of compute capability 7.0 to 9.0, whose instructions are 16 bytes.

    Raises:
        ValueError: not such a file.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, num_sections, names_index = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(num_sections)]
    names_at = sections[names_index][4]
    found = []
    for name, _kind, _flags, _address, at, size in sections:
        if cubin[names_at + name : names_at + name + 6] != b".text.":
            continue
        for offset in range(0, size, 16):
            (word,) = struct.unpack_from("<Q", cubin, at + offset)
            opcode, destination, first, second = word & 0xFFF, word >> 16 & 0xFF, word >> 24 & 0xFF, word >> 32 & 0xFF
            if opcode == _TO_UNIFORM:
                bad = first == _STACK_POINTER
            else:
                registers = opcode >> 8 == 2
                bad = opcode & 0xFF in _ARITHMETIC and destination != _STACK_POINTER and (first == _STACK_POINTER or (registers and second == _STACK_POINTER))
            if bad:
                found.append(f"{offset:#x} {_ARITHMETIC.get(opcode & 0xFF, 'R2UR')}")
    return found
