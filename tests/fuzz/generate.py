"""From a seed to a program."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fuzz.chains import ChainLayer
from fuzz.layers import Layer
from fuzz.program import CHAIN, PLAIN, SEQUENCE, Program
from fuzz.sequence import SequenceLayer
from fuzz.text import Writer

_COUNTS = {PLAIN: (1, 1, 2, 2, 2, 3, 3, 4), SEQUENCE: (1, 1, 2, 2, 3), CHAIN: (2, 3, 3, 4, 4, 5)}


def generate(seed: int, only: Sequence[int] | None = None) -> Program:
    """The program of a seed, or of some of its layers: each layer draws from a generator of its own."""
    rng = random.Random(seed)
    kind = rng.choices((PLAIN, SEQUENCE, CHAIN), (0.58, 0.24, 0.18))[0]
    count = rng.choice(_COUNTS[kind])
    layers = tuple(range(count)) if only is None else tuple(only)
    program = Program(seed, layers, dynamic=rng.random() < 0.2, kind=kind)
    writer = Writer(program, rng)
    for index in layers:
        _layer(writer, index).write()
    writer.finish()
    if any(site.miss == "group of one rank" for site in program.sites):
        program.replicated = False
    return program


def _layer(writer: Writer, index: int) -> Layer:
    if writer.program.kind == CHAIN:
        return ChainLayer(writer, index)
    # One in five layers of sequence parallelism reduces whole activations, as a model's ends do.
    if writer.program.kind == SEQUENCE and random.Random(f"kind {writer.program.seed}.{index}").random() < 0.8:
        return SequenceLayer(writer, index)
    return Layer(writer, index)
