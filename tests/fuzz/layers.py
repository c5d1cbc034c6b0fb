"""Layers with an all-reduce: partial sums, all-reduce, what stands between, residual add, norm, and further readers."""

from __future__ import annotations

import torch

from fuzz.program import DTYPES, EITHER, FUSED, HIDDEN, MISSES, NARROW, NORM_MISSES, Miss, Site
from fuzz.text import NormText, Writer


class Layer(NormText):
    """Writes one layer around an all-reduce."""

    misses: dict[str, Miss] = MISSES
    without_miss = 0.42

    def __init__(self, writer: Writer, index: int) -> None:
        super().__init__(writer, index)
        self.tokens = 1
        for size in writer.shape[:-1]:
            self.tokens *= size
        self.residual = self.rng.random() < 0.65
        self.miss = self._choose_miss()
        self.carried = self.viewed = self.sandwich = False
        self.outer: tuple[str, str] | None = None  # what follows instead of the norm and the sum
        self.expect = self.misses[self.miss].expect if self.miss else FUSED

    def _choose_miss(self) -> str:
        if self.rng.random() < self.without_miss:
            return ""
        fitting = [name for name, m in self.misses.items() if self.dtype in m.dtypes and self._shape_allows(name)]
        miss = self.rng.choice(fitting)
        if self.misses[miss].residual is not None:
            self.residual = bool(self.misses[miss].residual)
        return miss

    def _shape_allows(self, miss: str) -> bool:
        if self.writer.program.dynamic and miss in ("slice", "heads", "transpose", "broadcast all-reduce"):
            return False
        if self.rank == 1 or 0 in self.writer.shape:
            return miss in ("other reduction", "group of one rank", "relu", "all-reduce also read", "alpha", "no norm")
        # With one token a mean over the tokens is over nothing, and a column is one element.
        few = self.writer.shape[-2] == 1
        return not (few and miss in ("broadcast residual", "slice", "mean over tokens", "epsilon per token"))

    def write(self) -> None:
        partial = self._partial()
        if self.miss == "result unused":
            self.do(f"functional.all_reduce({partial}, 'sum', WORLD)")
        else:
            self._write_rest(partial, self._reduce(partial))
        site = Site(self.index, self.expect, self.miss, self.carried)
        self.writer.program.sites += [site] * self._all_reduces()

    def _write_rest(self, partial: str, reduced: str) -> None:
        if self.miss == "no norm":
            self.output(self.pick(f"{reduced} * {reduced}", f"{reduced} @ {self._matrix()}", f"{reduced}.clone()"))
            return
        value = self._between(reduced)
        self.viewed = value != reduced
        if self.miss == "collective between":
            self.output(self._plain_reduce(self.let(f"torch.sin({self.writer.n})", "p")))
        total = self._add(value)
        normed = self.norm(total, reduced)
        self._extras(partial, value, total, normed)
        if self.miss and self.misses[self.miss].ends_chain:
            self.writer.outputs += [total, normed]
            return
        if self.outer is not None:
            self.writer.n, self.writer.h = self.outer
            return
        self.writer.n = self.let(f"{normed}.to({DTYPES[self.dtype]})", "n")
        if self.residual:
            follows = self.miss not in ("wide residual", "strided residual", "bias of another dtype")
        else:
            follows = not self.miss and self.rng.random() < 0.5
        if follows:
            self.writer.h = total

    def _all_reduces(self) -> int:
        """How many entries of the report this layer has."""
        return 2 if self.miss in ("two all-reduces", "weights of each other", "collective between", "coalesced") else 1

    def _expression(self) -> str:
        """What this rank's partial sums are."""
        n = self.writer.n
        forms = [f"{n} * 0.75", f"torch.tanh({n})", f"F.silu({n} * 2)", n]
        if self.rank > 1:
            forms += [f"{n} @ {self._matrix()}" if self.rng.random() < 0.5 else f"{n} * 1.5"]
        return self.rng.choice(forms)

    def _partial(self) -> str:
        expression = self._expression()
        if self.rank == 3 and self.rng.random() < 0.3:  # experts and row-parallel layers reduce flat
            flat = self.pick(f".reshape(-1, {HIDDEN})", ".flatten(0, 1)", ".unsqueeze(0)")
            return self.let(f"({expression}){flat}", "p")
        return self.let(expression, "p")

    def _reduce(self, p: str) -> str:
        if self.miss == "other reduction":
            op = self.pick("max", "min", "avg", "product")
            if self.rng.random() < 0.3:
                copy = self.let(f"{p}.clone()", "a")
                self.do(f"dist.all_reduce({copy}, op=dist.ReduceOp.{op.upper()})")
                return copy
            return self.let(f"functional.all_reduce({p}, {op!r}, WORLD)", "a")
        if self.miss == "group of one rank":
            return self.let(f"functional.all_reduce({p}, 'sum', ALONE)", "a")
        if self.miss in ("read before the wait", "waited for twice"):
            raw = self.let(f"ops.all_reduce({p}, 'sum', WORLD_NAME)", "raw")
            first = self.let(f"ops.wait_tensor({raw})", "a")
            second = f"ops.wait_tensor({raw})" if self.miss == "waited for twice" else f"{raw} * 2"
            self.output(second)
            return first
        if self.miss == "coalesced":
            both = self.let(f"ops.all_reduce_coalesced([{p}, {p} + 1], 'sum', WORLD_NAME)", "both")
            self.output(f"ops.wait_tensor({both}[1])")
            return self.let(f"ops.wait_tensor({both}[0])", "a")
        if self.miss == "reduced in another dtype":
            other = "torch.float32" if self.dtype != "fp32" else "torch.bfloat16"
            reduced = self.let(f"functional.all_reduce({p}.to({other}), 'sum', WORLD)", "a")
            return self.let(f"{reduced}.to({DTYPES[self.dtype]})", "a")
        return self._plain_reduce(p)

    def _plain_reduce(self, p: str) -> str:
        spelling = self.pick(
            "functional", "functional", "name", "other", "list", "operator", "in place", "async", "opaque"
        )
        if spelling == "in place":
            copy = self.let(f"{p}.clone()", "a")
            self.do(f"dist.all_reduce({copy}{self.pick('', ', group=OTHER', ', op=dist.ReduceOp.SUM')})")
            return copy
        return self.let(
            {
                "functional": f"functional.all_reduce({p}, 'sum', WORLD)",
                "name": f"functional.all_reduce({p}, 'SUM', {self.pick('WORLD_NAME', 'OTHER_NAME')})",
                "other": f"functional.all_reduce({p}, 'sum', OTHER)",
                "list": f"functional.all_reduce({p}, 'sum', [0, 1])",
                "operator": f"ops.wait_tensor(ops.all_reduce({p}, 'sum', OTHER_NAME))",
                "opaque": f"torch.ops.vllm.all_reduce({p}, WORLD_NAME)",
                "async": f"functional.wait_tensor(functional.all_reduce({p}, 'sum', WORLD))",
            }[spelling],
            "a",
        )

    # Between the all-reduce and the sum

    def _between(self, a: str) -> str:
        shaped = self._reshaped(a)
        if not self.miss:
            shaped = self._carried_steps(shaped)
        steps = {
            "relu": "F.relu({a})",
            "number added": "{a} + 1.0",
            "tensor scale": "{a} * {scalar}",
            "vector scale": "{a} * {vector}",
            "division": "{a} / 3.0",
            "negation": "-{a}",
            "bias of another dtype": "{a} + {foreign}",
            "bias row": "{a} + {row}",
            "bias of the all-reduce": "{a} + {a}.reshape(-1, {hidden})[0]",
            "scale after bias": "({a} + {vector}) * 0.5",
            "slice": "{a}[:-1]",
            "heads": "{a}.reshape(-1, 2, {hidden} // 2)",
        }
        if self.miss == "transpose":
            return self.let(f"{shaped}.transpose(0, {self.rng.choice((self.rank - 1, self.rank - 2))})", "v")
        if self.miss not in steps:
            return shaped
        values = {"a": shaped, "hidden": str(HIDDEN)}
        if "{scalar}" in steps[self.miss]:
            values["scalar"] = self.input("scale", (), kind="weight")
        if "{vector}" in steps[self.miss]:
            values["vector"] = self.input("bias", (HIDDEN,))
        if "{row}" in steps[self.miss]:
            values["row"] = self.input("bias", (1,) * (self.rank - 1) + (HIDDEN,))
        if "{foreign}" in steps[self.miss]:
            foreign = torch.float32 if self.dtype != "fp32" else torch.bfloat16
            values["foreign"] = self.input("bias", (HIDDEN,), foreign)
        return self.let(steps[self.miss].format(**values), "v")

    def _reshaped(self, a: str) -> str:
        """The all-reduce's value in the shape of the residual stream, by way of a few views."""
        shape = ", ".join(map(str, self.writer.shape)) if not self.writer.program.dynamic else None
        target = f"{a}.view({shape})" if shape else f"{a}.view({self.writer.h}.shape)"
        value = a
        if self.rng.random() < 0.15 and self.rank > 1:
            value = self.let(self.pick(f"{a}.unsqueeze(0)", f"{a}.reshape(1, -1, {HIDDEN})", f"{a}.unsqueeze(-2)"), "v")
            target = target.replace(a, value, 1)
            return self.let(target, "v")
        # `_partial` may have flattened it; a view that changes nothing is harmless.
        return self.let(target, "v") if self.rank == 3 or self.miss == "step also read" else value

    def _carried_steps(self, value: str) -> str:
        if self.rng.random() < 0.12:
            most = "-0.75" if self.dtype == "fp16" else "-3"  # in float16 a scale above 1 must stay
            value = self.let(self.pick(f"{value} * 0.37", f"0.25 * {value}", f"{value} * {most}"), "v")
            self.carried = True
        if self.rng.random() < 0.12 and self.rank > 1:
            bias = self.input("bias", (HIDDEN,))
            value = self.let(self.pick(f"{value} + {bias}", f"{bias} + {value}"), "v")
            self.carried = self.carried or self.residual  # a bias alone is the residual
        return value

    # The sum

    def _add(self, v: str) -> str:
        h = self.writer.h
        if not self.residual:
            return v
        if self.miss == "alpha":
            return self.let(self.pick(f"torch.add({h}, {v}, alpha=2)", f"torch.add({v}, {h}, alpha=0.5)"), "t")
        if self.miss == "broadcast residual":
            h = self.input("column", (*self.writer.shape[:-1], 1))
        elif self.miss == "broadcast all-reduce":
            h = self.input("wide", (2, *self.writer.shape))
        elif self.miss == "wide residual":
            h = self.let(f"{h}.to(torch.float32)", "h")
        elif self.miss == "doubled":
            h = v
        elif self.miss == "residual of the all-reduce":
            h = self.let(self.pick(f"torch.tanh({v})", f"{v} * {v}", f"{self.writer.h} * {v}"), "h")
        elif self.miss == "subtraction":
            return self.let(self.pick(f"{h} - {v}", f"{v} - {h}"), "t")
        elif self.miss == "two residuals":
            v = self.let(f"{v} + {self.input('r', self.writer.shape)}", "t")
        elif self.miss == "two all-reduces":
            other = self._plain_reduce(self.let(f"torch.sin({self.writer.n})", "p"))
            h = other
        elif self.miss == "strided residual":
            strided = self.input("strided", self.writer.shape[::-1])
            h = self.let(f"{strided}.permute({', '.join(map(str, reversed(range(self.rank))))})", "h")
        if self.miss == "all-reduce also read":
            self.output(f"torch.log1p({v}.abs())")
        if self.miss == "step also read":
            self.output(self.pick(f"{v} * 2", f"{v}.float()", f"{v}.sum(-1)"))
        if not self.miss and self.dtype in NARROW and self.rng.random() < 0.3:
            self.wide = self.let(
                self.pick(f"{h}.float() + {v}.float()", f"{v}.float() + {h}.float()", f"{h} + {v}.float()"), "s"
            )
            return self.let(f"{self.wide}.to({DTYPES[self.dtype]})", "t")
        return self.let(self.pick(f"{h} + {v}", f"{v} + {h}", f"torch.add({h}, {v})"), "t")

    # Further readers, aliases and writes

    def _extras(self, partial: str, value: str, total: str, normed: str) -> None:
        if self.miss == "weights of each other":
            self._each_other(total, normed)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 3))):
            self._extra(self.rng.randrange(15), partial, value, total, normed)

    def _each_other(self, total: str, normed: str) -> None:
        """A second all-reduce whose norm is weighted by this one's sum."""
        other = self.let(f"functional.all_reduce(torch.cos({self.writer.n}), 'sum', WORLD)", "a")
        weight = self.let(f"{total}.reshape(-1, {HIDDEN})[0]", "w")
        wide = self.let(f"{other}.float()", "wide")
        first = self.let(f"{wide} * torch.rsqrt({wide}.pow(2).mean(-1, keepdim=True) + 1e-5)", "n")
        self.output(f"{weight} * {first}.to({other}.dtype)")
        self.output(f"{normed} * {other}.reshape(-1, {HIDDEN})[0]")

    def _sandwich(self, total: str, normed: str) -> None:
        """The norm's result is added to a residual and normalised once more; where nobody else reads it, all that fuses."""
        h = self.writer.h
        again = self.let(self.pick(f"{h} + {normed}", f"{normed} + {h}"), "s")
        weight = self.pick("None", self.input("w_outer", (HIDDEN,), kind="weight"))
        second = self.let(f"F.rms_norm({again}, ({HIDDEN},), {weight}, 1e-6)", "n")
        if self.residual:
            self.writer.outputs += [second, self.let(f"{total} + {again}", "out")]
        else:
            self.outer = (second, again)

    def _extra(self, which: int, partial: str, value: str, total: str, normed: str) -> None:
        if which in (1, 5, 9) and self.viewed and not self.residual and self.expect == FUSED:
            # A view of a view becomes a view of the all-reduce itself, which the fused operator does not return.
            self.expect = EITHER
        shaped = not (self.miss and self.misses[self.miss].ends_chain)
        out = self.writer.outputs
        if which == 0:
            out += [total]
        elif which == 1:
            self.output(self.pick(f"{total}.view(-1)", f"{total}.unsqueeze(0)", f"{total} * 2") if shaped else total)
        elif which == 2:
            self.output(self.pick(f"{normed}.unsqueeze(-1)", f"{normed} + 1", f"{normed}.detach()"))
        elif which == 3 and self.spare:
            self.output(self.pick(self.rng.choice(self.spare), f"{self.rng.choice(self.spare)} * 1.5"))
        elif which == 4 and shaped and self.miss != "wide residual":
            buffer = self.input(f"buffer{self.count}_", self.writer.shape)
            self.do(self.pick(f"{buffer}.copy_({total})", f"{buffer}.add_({normed})", f"{buffer}.copy_({normed})"))
            if self.rng.random() < 0.4:
                self.writer.h = self.let(f"{buffer} * 1", "h") if self.residual else self.writer.h
        elif which == 5 and shaped and self.tokens > 0 and not self.writer.program.dynamic:
            cache = self.input(f"cache{self.count}_", (self.tokens + 4, HIDDEN))
            index = self.input(f"index{self.count}_", (self.tokens,), torch.int64, "index")
            source = self.pick(total, normed)
            self.do(f"{cache}.index_copy_(0, {index}, {source}.reshape(-1, {HIDDEN}).to({DTYPES[self.dtype]}))")
            self.output(f"{cache}.sum(0)")
        elif which == 6 and shaped and self.miss not in NORM_MISSES:
            wide = self.let(f"{total}.float()", "wide")
            second = f"({wide} * torch.rsqrt({wide}.pow(2).mean(-1, keepdim=True) + 1e-4)).to({total}.dtype)"
            self.output(self.pick(second, f"F.rms_norm({total}, ({HIDDEN},), None, 1e-5)"))
        elif which == 7:
            out += [partial]
        elif which == 8 and "x" in self.writer.program.inputs:
            self.do(self.pick("x.add_(1)", "x.mul_(0.5)"))
        elif which == 9 and not self.residual and shaped and not self.miss:
            # Without a residual the fused operator returns the sum, so anyone may read it.
            self.output(self.pick(f"{value} * 2", f"{value}.abs()", f"{value}.view(-1)"))
        elif which == 10:
            self.output(f"{total}.clone().zero_()")
        elif which >= 12 and shaped and not self.miss and not self.sandwich:
            self.sandwich = True
            self._sandwich(total, normed)
        elif which == 11 and self.residual and shaped and "r" in self.writer.program.inputs:
            self.do("r.mul_(1.5)")
