"""The parameters of a kernel as a cubin declares them, which is what the driver reads at a launch.

A cubin is an ELF file. Its section ``.nv.info.KERNEL`` has attributes: a format byte, a number, and 16 bits of value or
of the length of what follows. Attribute 0x17 is a parameter: 4 bytes, its number and its offset as 16 bits each, and a
word whose upper 14 bits are its size. (``cuobjdump --dump-elf`` prints the same as ``EIATTR_KPARAM_INFO``.)
"""

from __future__ import annotations

import struct

SIZED, PARAMETER = 4, 0x17
SECTION = struct.Struct("<IIQQQQIIQQ")


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """Offset and size in bytes of each parameter of a kernel, in order."""
    data = _section(cubin, f".nv.info.{kernel}")
    found, place = {}, 0
    while place < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, place)
        place += 4
        if kind == SIZED:
            if attribute == PARAMETER:
                _, number, offset, word = struct.unpack_from("<IHHI", data, place)
                found[number] = (offset, word >> 18)
            place += size
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


def _section(elf: bytes, wanted: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [SECTION.unpack_from(elf, table + i * size) for i in range(count)]
    names = sections[of_names][4]
    for name, _, _, _, place, length, *_ in sections:
        start = names + name
        if elf[start : elf.index(b"\0", start)].decode() == wanted:
            return elf[place : place + length]
    raise AssertionError(f"no section {wanted}")
