"""Runs in the interpreter of another processor: calls the kernels there with copies of the caller's memory.

Argument: the extension's file. Requests come on standard input and answers go to standard output, pickled. Every copy
ends, as nearly as its alignment allows, where memory that may not be read begins; what is before it must not change.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path
from typing import Any

from compressor.kernels.native import load

PAGE = 4096
MARK = 0xA5
READ_WRITE, PRIVATE_ANONYMOUS = 3, 0x22  # of mmap(2) on Linux

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Copy:
    """Bytes at an address that leaves ``offset`` divided by 64."""

    def __init__(self, content: bytes, offset: int) -> None:
        self.size = len(content)
        usable = -(-(self.size + 64) // PAGE) * PAGE
        self.pages = usable + PAGE
        self.base = libc.mmap(None, self.pages, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        if self.base == ctypes.c_void_p(-1).value or libc.mprotect(self.base + usable, PAGE, 0):
            raise MemoryError
        last = self.base + usable - self.size
        self.address = last - (last - offset) % 64
        self.end = self.base + usable
        ctypes.memset(self.base, MARK, usable)
        ctypes.memmove(self.address, content, self.size)

    def content(self) -> bytes:
        """Return the bytes.

        Raises:
            AssertionError: something beside them was written.
        """
        before = ctypes.string_at(self.base, self.address - self.base)
        behind = ctypes.string_at(self.address + self.size, self.end - self.address - self.size)
        assert not (before + behind).strip(bytes([MARK])), "something was written beside a buffer"
        return ctypes.string_at(self.address, self.size)

    def free(self) -> None:
        libc.munmap(self.base, self.pages)


def answer(module: Any, entry: str, arguments: list[Any], blocks: dict[int, tuple[int, bytes]]) -> Any:
    """Call one entry; return its result, or the ValueError's text, and what then is in the blocks."""
    copies = {place: Copy(content, offset) for place, (offset, content) in blocks.items()}
    for place, copy in copies.items():
        arguments[place] = copy.address
    try:
        result, wrong = getattr(module, entry)(*arguments), None
    except ValueError as error:
        result, wrong = None, str(error)
    found = {place: copy.content() for place, copy in copies.items()}
    for copy in copies.values():
        copy.free()
    return result, wrong, found


def main() -> None:
    native = load(Path(sys.argv[1]))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    pickle.dump((native.levels, native.bf16, native.module.sources), answers)
    answers.flush()
    while True:
        try:
            entry, arguments, blocks = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(answer(native.module, entry, arguments, blocks), answers)
        answers.flush()


if __name__ == "__main__":
    main()
