"""Decoder-like chains: layers that hand one residual on, which some of them also read in ways of their own."""

from __future__ import annotations

from fuzz.layers import Layer
from fuzz.program import EITHER, FUSED, HIDDEN
from fuzz.text import Writer

READERS = (
    "returned",
    "viewed",
    "sliced",
    "routed",
    "cast",
    "held",
    "product held",
    "mutated",
    "copied",
    "part of the next sum",
    "norm held",
    "cleared",
    "to the power of nothing",
)


class ChainLayer(Layer):
    """Writes one layer of a chain: most add to the same residual, over the same group."""

    without_miss = 0.5

    def __init__(self, writer: Writer, index: int) -> None:
        super().__init__(writer, index)
        self.next_sum = ""
        if not self.miss:
            self.residual = self.rng.random() < 0.93

    def _shape_allows(self, miss: str) -> bool:
        return super()._shape_allows(miss) and not self.misses[miss].ends_chain

    def _expression(self) -> str:
        """A matrix product where the norm may stay in a buffer, more often than elsewhere."""
        return f"{self.writer.n} @ {self._matrix()}" if self.rng.random() < 0.5 else super()._expression()

    def _plain_reduce(self, p: str) -> str:
        if self.rng.random() < 0.12:
            return super()._plain_reduce(p)
        group = self.writer.group
        forms = (
            f"functional.all_reduce({p}, 'sum', {group})",
            f"ops.wait_tensor(ops.all_reduce({p}, 'sum', {group}_NAME))",
        )
        return self.let(self.pick(*forms), "a")

    def _add(self, v: str) -> str:
        if not self.miss and self.residual and self.rng.random() < 0.25:
            weight = self.pick("None", self.input("w_inner", (HIDDEN,), kind="weight"))
            v = self.let(f"F.rms_norm({v}, ({HIDDEN},), {weight}, 1e-6)", "v")
        return super()._add(v)

    def _write_rest(self, partial: str, reduced: str) -> None:
        super()._write_rest(partial, reduced)
        if self.next_sum:
            n = self.writer.n
            self.writer.n = self.let(f"{n} + {self.next_sum}.to({n}.dtype)", "n")

    def _extras(self, partial: str, value: str, total: str, normed: str) -> None:
        if self.miss == "weights of each other":
            self._each_other(total, normed)
        for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2))):
            self._read(self.rng.choice(READERS), total, normed)

    def _read(self, reader: str, total: str, normed: str) -> None:
        if self.viewed and not self.residual and self.expect == FUSED:
            self.expect = EITHER  # a view of a view, as in Layer
        writer = self.writer
        if reader == "returned":
            writer.outputs.append(total)
        elif reader == "viewed":
            self.output(self.pick(f"{total}.view(-1)", f"{total}.unsqueeze(0)", f"{total}.reshape(-1, {HIDDEN}).t()"))
        elif reader == "sliced":
            self.output(self.pick(f"{total}[:1]", f"{total}[..., -1:, :]", f"{total}[..., :4]"))
        elif reader == "routed":
            router = self.input(f"router{self.count}_", (HIDDEN, 4))
            self.output(f"torch.softmax({total} @ {router}.to({total}.dtype), -1)")
        elif reader == "cast":
            self.output(self.pick(f"{total}.float()", f"{total}.float().mean(-1)"))
        elif reader == "held":  # cheap, so that Inductor may compute it where it is read
            writer.held.append(
                self.let(self.pick(f"{total} * 2 + 1", f"{total}.float()", f"torch.tanh({total})"), "held")
            )
        elif reader == "product held":
            matrix = self.input(f"m{self.count}_", (HIDDEN, HIDDEN))
            writer.held.append(self.let(f"{total} @ {matrix}.to({total}.dtype)", "held"))
        elif reader == "norm held":
            writer.held.append(normed)
        elif reader == "mutated":
            self.do(self.pick(f"{total}.mul_(0.5)", f"{total}.add_(1)"))
        elif reader == "copied" and self.miss != "wide residual":
            buffer = self.input(f"buffer{self.count}_", writer.shape)
            self.do(self.pick(f"{buffer}.copy_({total})", f"{buffer}.add_({total})"))
        elif reader == "part of the next sum":
            self.next_sum = total
        elif reader == "to the power of nothing":  # a value that the next layer does not need, though it reads it
            matrix = self.input(f"m{self.count}_", (HIDDEN, HIDDEN))
            product = self.let(f"{total} @ {matrix}.to({total}.dtype)", "held")
            writer.held.append(product)
            self.next_sum = f"({product} ** 0)"
        elif reader == "cleared":
            self.output(f"{total}.clone().zero_()")
