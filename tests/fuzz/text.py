"""What writes a layer of a random program: source text, line by line, and the norms in their many spellings."""

from __future__ import annotations

import random

import torch

from fuzz.program import CHAIN, DTYPES, HIDDEN, NORM_MISSES, SEQUENCE, TAILS, Input, Program


class Writer:
    """The source so far, and the values that run through the layers.

    Attributes:
        n: the activations, h: the residual, rows: this rank's rows of a residual that is sharded.
        held: values that are read once more at the end.
    """

    def __init__(self, program: Program, rng: random.Random) -> None:
        self.program = program
        self.dtype = rng.choice(("bf16", "bf16", "fp16", "fp32", "fp32"))
        self.shape = self._shape(rng)
        self.group = rng.choice(("WORLD", "OTHER"))
        self.lines: list[str] = []
        self.outputs: list[str] = []
        self.held: list[str] = []
        self.rows = ""
        self.n = self.input("x", self.shape, kind="partial")
        # Sometimes the very tensor that is reduced is the residual too.
        kind = rng.choice(("same as x", "view of x")) if rng.random() < 0.06 else "normal"
        self.h = self.n if rng.random() < 0.12 else self.input("r", self.shape, kind=kind)
        program.replicated = self.h == "r" and kind == "normal"

    def _shape(self, rng: random.Random) -> tuple[int, ...]:
        """Of the activations; a dynamic program's tokens are a size that no other dimension has."""
        kind, dynamic = self.program.kind, self.program.dynamic
        few = {SEQUENCE: (2, 4, 6, 8, HIDDEN), CHAIN: (1, 2, 3, 5, 7, HIDDEN, 17)}.get(kind, (1, 3, 5, 7, HIDDEN))
        any_of = {SEQUENCE: (6, 10), CHAIN: (3, 5, 6, 7)}.get(kind, (3, 5, 7))
        self.program.tokens = tokens = rng.choice(any_of if dynamic else few)
        if kind == SEQUENCE:
            return rng.choice(((tokens, HIDDEN), (tokens, HIDDEN), (tokens, 2, HIDDEN)))
        if kind != CHAIN and not dynamic and rng.random() < 0.04:
            return rng.choice(((HIDDEN,), (0, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1, HIDDEN)))
        return rng.choice(((tokens, HIDDEN), (tokens, HIDDEN), (2, tokens, HIDDEN)))

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, kind: str = "normal") -> str:
        self.program.inputs[name] = Input(shape, dtype if dtype is not None else DTYPES[self.dtype], kind)
        return name

    def finish(self) -> None:
        outputs = list(dict.fromkeys([*self.outputs, self.n, self.h, *([self.rows] if self.rows else [])]))
        outputs += [f"{held} * 0.5" for held in self.held]
        arguments = "".join(f", {name}" for name in self.program.inputs)
        body = "".join(f"    {line}\n" for line in self.lines)
        self.program.source = f"def forward(self{arguments}):\n{body}    return ({', '.join(outputs)},)\n"


class LayerText:
    """Source text of one layer, which draws from a generator of its own."""

    def __init__(self, writer: Writer, index: int) -> None:
        self.writer, self.index = writer, index
        self.rng = random.Random(f"{writer.program.seed}.{index}")
        self.dtype = writer.dtype
        self.rank = len(writer.shape)
        self.miss = ""
        self.spare: list[str] = []  # values that may be read elsewhere without harm
        self.wide = ""  # the sum that is normalised before it is rounded
        self.count = 0

    def let(self, expression: str, tag: str) -> str:
        self.count += 1
        name = f"{tag}{self.index}_{self.count}"
        self.writer.lines.append(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        self.writer.lines.append(statement)

    def output(self, expression: str) -> None:
        self.writer.outputs.append(self.let(expression, "out"))

    def input(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, kind: str = "normal") -> str:
        return self.writer.input(f"{tag}{self.index}", shape, dtype, kind)

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def _matrix(self) -> str:
        return self.input("m", (HIDDEN, HIDDEN))


class NormText(LayerText):
    """The norm: one call, or its arithmetic in one of the spellings that models have."""

    def _epsilon(self) -> str:
        value = self.rng.choice((1e-5, 1e-6, 1e-12, 0.125, 1, 3e-4, 1e-8, 0.3))
        if self.rng.random() < 0.3:
            name = f"eps{self.index}"
            self.writer.program.numbers[name] = float(value)
            return f"self.{name}"
        return repr(value)

    def norm(self, t: str, a: str) -> str:
        if self.miss == "sum changed before the norm":
            self.do(self.pick(f"{t}.mul_(2.0)", f"{t} += 0.5"))
        if self.miss == "layer norm":
            vector = self.input("w", (HIDDEN,), kind="weight")
            return self.let(f"F.layer_norm({t}.float(), ({HIDDEN},), {vector}.float(), None, 1e-5).to({t}.dtype)", "o")
        odd = self.miss in NORM_MISSES or self.miss == "rows: weight of the rows"
        whole = self.rng.random()
        if not odd and whole < 0.3 and self.miss not in ("heads", "transpose", "wide residual"):
            return self._whole_norm(t)
        return self._decomposed_norm(t, a)

    def _whole_norm(self, t: str) -> str:
        """A norm that is one call in the source."""
        eps, w = self._epsilon(), self.input("w", (HIDDEN,), kind="weight")
        forms = [
            f"F.rms_norm({t}, ({HIDDEN},), {w}, {eps})",
            f"F.rms_norm({t}, ({HIDDEN},), None, {eps})",
            f"F.rms_norm({t}, ({HIDDEN},), {w})",
            f"F.rms_norm({t}.float(), ({HIDDEN},), {w}.float(), {eps}).to({t}.dtype)",
            f"fusewire.rms_norm({t}, {w}, {eps}, {self.rng.choice((0.0, 1.0))}, "
            f"{self.rng.choice(('scale_then_round', 'round_then_scale'))!r})",
            f"fusewire.rms_norm({t}, None, {eps})",
            f"torch.ops.vllm_ir.rms_norm({t}, {w}, {eps})",
        ]
        if "self." in eps:  # an epsilon that dynamic=True made an input cannot be a number of the operator's schema
            forms = forms[:2]
        return self.let(self.rng.choice(forms), "o")

    def _decomposed_norm(self, t: str, a: str) -> str:
        miss, d = self.miss, f"{t}.dtype"
        hidden = f"{HIDDEN} // 2" if miss == "heads" else str(HIDDEN)
        wide = "torch.float32"
        if miss == "double arithmetic":
            wide = "torch.float64"
        x = self.wide or t
        if miss != "narrow arithmetic" and not self.wide:
            x = self.let(self.pick(f"{t}.to({wide})", f"{t}.type({wide})"), "wide")
        square = self.let(self._squared(x), "sq")
        mean = self.let(self._mean(square, hidden), "mean")
        root = self._root(mean, t)
        scaled_one = f"torch.roll({x}, 1, -1)" if miss == "another tensor scaled" else x
        if miss == "divided by the root":
            n = self.let(f"{scaled_one} / {root}", "n")
        else:
            n = self.let(self.pick(f"{scaled_one} * {root}", f"{root} * {scaled_one}"), "n")
        if not self.wide:
            self.spare += [x, square, mean, root, n]
        weight, tail = self._weight(t, a, hidden), self.rng.choice(TAILS)
        if tail == "weightless" and "weight" in miss:
            tail = "M"
        if miss == "result kept wide":
            return self.let(self.pick(f"{n} * {weight}", f"{n} * {weight}.float()"), "o")
        return self._tail(tail, n, weight, d)

    def _squared(self, x: str) -> str:
        if self.miss == "product, not square":
            return f"{x} * torch.sigmoid({x})"
        return self.pick(f"{x}.pow(2)", f"{x} * {x}", f"{x} ** 2", f"torch.square({x})")

    def _mean(self, square: str, hidden: str) -> str:
        if self.miss == "mean over tokens":
            return f"{square}.mean(0, keepdim=True)" if self.rank == 2 else f"{square}.mean(-2, keepdim=True)"
        if self.miss == "mean over everything":
            return f"{square}.mean()"
        if self.miss == "mean of rows put back":
            return self.pick(f"{square}.mean(-1).unsqueeze(-1)", f"{square}.mean(-1)[..., None]")
        if self.miss in ("sum of squares", "L2"):
            return f"{square}.sum(-1, keepdim=True)" + (" * 0.5" if self.miss == "sum of squares" else "")
        return self.pick(
            f"{square}.mean(-1, keepdim=True)",
            f"torch.mean({square}, dim={square}.dim() - 1, keepdim=True)",
            f"{square}.mean((-1,), True)",
        )

    def _root(self, mean: str, t: str) -> str:
        eps = self._epsilon()
        if self.miss == "epsilon is a tensor":
            eps = self.input("epsilon", (), torch.float32, "epsilon")
        elif self.miss == "epsilon per token":
            eps = self.input("epsilon", (*self.writer.shape[:-1], 1), torch.float32, "epsilon")
        elif self.miss == "epsilon of the sum":
            eps = f"{t}.float().abs().mean()"
        if self.miss == "negative epsilon":
            return self.let(self.pick(f"torch.rsqrt({mean} + -1e-9)", f"torch.rsqrt({mean} - 1e-9)"), "root")
        shifted = self.let(self.pick(f"{mean} + {eps}", f"{eps} + {mean}"), "shifted")
        if self.miss == "divided by the root":
            return self.let(self.pick(f"torch.sqrt({shifted})", f"{shifted} ** 0.5"), "root")
        forms = f"torch.rsqrt({shifted})", f"{shifted} ** -0.5", f"torch.pow({shifted}, -0.5)"
        return self.let(self.pick(*forms), "root")

    def _weight(self, t: str, a: str, hidden: str) -> str:
        size = HIDDEN // 2 if self.miss == "heads" else HIDDEN
        if self.miss == "transpose":
            return self.let(f"torch.ones({t}.shape[-1], dtype={t}.dtype)", "w")
        dtype = torch.float32 if self.miss == "wide weight" else DTYPES[self.dtype]
        shape = (1,) * (self.rank - 1) + (size,) if self.miss == "weight row" else (size,)
        w = self.input("w", shape, dtype, "weight")
        if self.miss == "weight of the sum":
            return self.let(f"{w} * {t}.reshape(-1, {hidden})[0].to({dtype})", "w")
        if self.miss == "rows: weight of the rows":
            return self.let(f"{w} * {a}.reshape(-1, {hidden})[0]", "w")
        if self.miss == "weight of the all-reduce":
            return self.let(f"{w} * {a}.reshape(-1, {hidden}).mean(0).to({dtype})", "w")
        return w

    def _tail(self, tail: str, n: str, w: str, d: str) -> str:
        bias = self.rng.choice(("1.0", "0.5", "-1", "2"))
        forms = {
            "L": f"{w} * {n}.to({d})",
            "L'": f"{n}.to({d}) * {w}",
            "M": f"({w} * {n}).to({d})",
            "M'": f"({n} * {w}).to({d})",
            "F": f"({n} * {w}.float()).to({d})",
            "G": self.pick(f"({n} * ({bias} + {w}.float())).to({d})", f"(({w}.float() + {bias}) * {n}).to({d})"),
            # The number is added in the weight's own dtype.
            "g": self.pick(f"({n} * ({w} + {bias})).to({d})", f"{n}.to({d}) * ({bias} + {w})"),
            "weightless": f"{n}.to({d})",
        }
        return self.let(forms[tail], "o")
