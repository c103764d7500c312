"""Miscompiled kernels are recognised by their machine code, and other options are taken for them."""

import struct

import pytest

pytest.importorskip("triton")
from attnconvert.kernels.launch import MiscompiledKernelError, sound_options
from attnconvert.kernels.machine_code import uses_of_stack_pointer

# first halves of instructions, from listings for compute capability 9.0
SOUND = {
    "LDC R1, c[0x0][0x28]": 0x00000A00FF017B82,
    "VIADD R1, R1, 0xfffffe78": 0xFFFFFE7801017836,
    "HGMMA.64x32x16.F32.BF16 R72, gdesc[UR16].tnspB, R72": 0x40600000104879F0,
    "STS.128 [R75+0x8000], R24": 0x008000184B007388,
    "LDSM.16.M88.4 R132, [R71+0x8200]": 0x008200004784783B,
    "UMOV UR18, UR8": 0x0000000800127C82,
}
WRONG = {"IADD3 R8, P1, R1, 0x2, RZ": 0x0000000201087810, "IADD3.X R9, R1, -0x7fffffe0, RZ, P1, !PT": 0x8000002001097810}


def elf(*words, section=b".text.kernel"):
    """A 64-bit ELF file with a section of instructions and the table of names."""
    code = b"".join(struct.pack("<2Q", word, 0) for word in words)
    names = b"\0" + section + b"\0.shstrtab\0"
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    at = 64 + len(code) + len(names)
    struct.pack_into("<Q", header, 0x28, at)
    struct.pack_into("<3H", header, 0x3A, 64, 3, 2)
    rows = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 64, len(code)), (2 + len(section), 3, 0, 0, 64 + len(code), len(names))]
    return bytes(header) + code + names + b"".join(struct.pack("<IIQQQQ", *row).ljust(64, b"\0") for row in rows)


def test_sound_instructions_are_not_blamed():
    assert uses_of_stack_pointer(elf(*SOUND.values())) == []


@pytest.mark.parametrize("wrong", WRONG)
def test_arithmetic_on_the_stack_pointer_is_found_at_its_offset(wrong):
    assert uses_of_stack_pointer(elf(*SOUND.values(), WRONG[wrong])) == [f"{16 * len(SOUND):#x} IADD3"]


def test_bytes_outside_of_code_are_not_read():
    assert uses_of_stack_pointer(elf(*WRONG.values(), section=b".nv.constant")) == []


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="64-bit ELF"):
        uses_of_stack_pointer(b"MZ")


OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}


def chosen(is_sound):
    asked = []

    def compile_with(options):
        asked.append(options)
        return is_sound(options) and elf(*SOUND.values()) if is_sound(options) is not False else elf(*WRONG.values())

    return sound_options(OPTIONS, compile_with), asked


def test_sound_code_keeps_its_options_and_compiles_once():
    found, asked = chosen(lambda options: True)
    assert found == OPTIONS
    assert len(asked) == 1


def test_wrong_code_is_compiled_again_with_other_stages_then_warps():
    assert chosen(lambda options: options["num_stages"] == 1)[0] == {**OPTIONS, "num_stages": 1}
    assert chosen(lambda options: options["num_warps"] == 8)[0] == {**OPTIONS, "num_warps": 8}


def test_a_variation_that_does_not_fit_the_gpu_is_passed_over():
    assert chosen(lambda options: options["num_warps"] == 8 if options["num_stages"] == 2 else None)[0] == {**OPTIONS, "num_warps": 8}


def test_without_any_sound_code_nothing_is_launched():
    with pytest.raises(MiscompiledKernelError, match="ATTNCONVERT_IMPL=reference"):
        chosen(lambda options: False)
