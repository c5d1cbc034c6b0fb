"""An interpreter for the PTX of the `symm_mem` kernels."""

from __future__ import annotations

import functools
import re

import numpy as np
import torch

BITS = {32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b,
    "max": max,
    "ne": lambda a, b: a != b,
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
}


def bits_float(word):
    return np.uint32(word).view(np.float32)


def float_bits(value):
    return int(np.float32(value).view(np.uint32))


@functools.cache
def fp8_bits(word):
    """The bits of fp32 as e4m3, at most 448 in size; a NaN is 0x7f, as on a GPU."""
    value = torch.tensor(bits_float(word))
    return 0x7F if value.isnan() else int(value.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8))


class Program:
    """PTX as a list of functions of (registers, block, thread) that return where to jump, or None."""

    def __init__(self, asm):
        self.slots, self.initial, self.labels = {}, [], {}
        statements = []
        for text in re.split(r"[;\n]", asm):
            text = text.strip().removeprefix("{").strip()
            if label := re.fullmatch(r"(\w+):", text):
                self.labels[label[1]] = len(statements)
            elif text not in ("", "}") and not text.startswith(".reg"):
                statements.append(text)
        self.code = [self.statement(text) for text in statements]
        self.polls = self.slots.get("n")

    def slot(self, name):
        """The register's number; constants are registers that nobody writes."""
        if name not in self.slots:
            assert re.fullmatch(r"\$?\w+", name), name
            self.slots[name] = len(self.initial)
            self.initial.append(int(name, 0) if name[0].isdigit() else 0)
        return self.slots[name]

    def vector(self, text):
        return [self.slot(name) for name in re.findall(r"[$\w]+", text)]

    def statement(self, text):
        if guarded := re.fullmatch(r"@(\w+)\s+(.*)", text):
            guard, then = self.slot(guarded[1]), self.statement(guarded[2])
            return lambda r, b, t: then(r, b, t) if r[guard] else None
        op, _, rest = text.partition(" ")
        name, *kinds = op.split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        return getattr(self, f"op_{name}", functools.partial(self.op_arithmetic, name))(kinds, operands)

    def op_arithmetic(self, name, kinds, operands):
        to, a, b = map(self.slot, operands)
        if kinds[-1] == "f32":
            assert [name, *kinds] == ["add", "rn", "f32"]
            return lambda r, block, thread: r.__setitem__(to, float_bits(bits_float(r[a]) + bits_float(r[b])))
        work = ARITHMETIC[name]
        mask = 1 if kinds[0] == "pred" else BITS[int(kinds[-1][1:])]

        def run(r, block, thread):
            r[to] = work(r[a], r[b]) & mask

        return run

    def op_setp(self, kinds, operands):
        return self.op_arithmetic(kinds[0], ["pred"], operands)

    def op_mov(self, kinds, operands):
        to, source = operands
        if source == "%globaltimer":
            at = self.slot(to)
            return lambda r, block, thread: r.__setitem__(at, block.machine.now)
        if to.startswith("{"):
            (low, high), at = self.vector(to), self.slot(source)

            def split(r, block, thread):
                r[low], r[high] = r[at] & BITS[32], r[at] >> 32

            return split
        at, words = self.slot(to), self.vector(source)
        if len(words) == 2:
            half = int(kinds[0][1:]) // 2
            return lambda r, block, thread: r.__setitem__(at, r[words[0]] | r[words[1]] << half)
        return lambda r, block, thread: r.__setitem__(at, r[words[0]])

    def op_cvt(self, kinds, operands):
        assert kinds == ["rn", "satfinite", "e4m3x2", "f32"]
        to, upper, lower = map(self.slot, operands)
        return lambda r, block, thread: r.__setitem__(to, fp8_bits(r[lower]) | fp8_bits(r[upper]) << 8)

    def op_bra(self, kinds, operands):
        return lambda r, block, thread: self.labels[operands[0]]

    def address(self, text):
        base, _, offset = text.strip("[]").partition("+")
        at, offset = self.slot(base), int(offset or 0)
        return lambda r: r[at] + offset

    def op_ld(self, kinds, operands):
        to, at = self.vector(operands[0]), self.address(operands[1])
        size = int(kinds[-1][1:]) // 8

        def run(r, block, thread):
            assert at(r) % (size * len(to)) == 0, "a misaligned address"
            data = block.load(at(r), size * len(to), thread)
            for i, slot in enumerate(to):
                r[slot] = int.from_bytes(data[i * size : (i + 1) * size], "little")

        return run

    def op_prefetch(self, kinds, operands):
        at = self.address(operands[0])

        def run(r, block, thread):
            block.load(at(r), 16, thread)  # of memory that is there

        return run

    def op_st(self, kinds, operands):
        at, values = self.address(operands[0]), self.vector(operands[1])
        size = int(kinds[-1][1:]) // 8

        def run(r, block, thread):
            assert at(r) % (size * len(values)) == 0, "a misaligned address"
            for i, slot in enumerate(values):  # the words of a vector may arrive one by one
                block.store(at(r) + i * size, r[slot].to_bytes(size, "little"), thread)

        return run

    def op_atom(self, kinds, operands):
        assert kinds[-2:] == ["cas", "b64"]
        to, at, old, new = self.slot(operands[0]), self.address(operands[1]), *map(self.slot, operands[2:])

        def run(r, block, thread):
            word = block.machine.word(at(r))
            r[to] = word.value
            if word.value == r[old]:
                word.value = r[new]
                block.machine.version += 1

        return run

    def op_red(self, kinds, operands):
        assert kinds[-2:] == ["add", "u64"]
        at, amount = self.address(operands[0]), self.slot(operands[1])

        def run(r, block, thread):
            block.machine.word(at(r)).value += r[amount]

        return run

    def op_fence(self, kinds, operands):
        assert kinds == ["acq_rel", "sys"]
        return lambda r, block, thread: block.fence(thread)

    def run(self, registers, at, block, thread):
        """Run to the end (None), or to a jump back: a poll was fruitless, and goes on there."""
        while at < len(self.code):
            jump = self.code[at](registers, block, thread)
            if jump is not None and jump <= at:
                return jump
            at = at + 1 if jump is None else jump
        return None


assembled = functools.cache(Program)


def butterflies(asm, bits, threads):
    """Run PTX that only adds neighbouring lanes. Element i of the fp32 bits belongs to thread i
    modulo the number of threads.
    """
    steps = re.findall(r"shfl\.sync\.bfly\.b32 t, \$0, (\d+), 31, -1; add\.rn\.f32 \$0, \$0, t;", asm)
    assert asm.count("shfl") == asm.count("add") == len(steps)
    assert bits.ndim == 1
    assert len(bits) % threads == 0
    values, index = bits.view(np.float32), np.arange(len(bits))
    for step in map(int, steps):
        assert step < 32
        values = values + values[index ^ step]
    return values.view(np.int32)
