"""Layers of sequence parallelism: partial sums, reduce-scatter, [residual add,] norm of this rank's rows, all-gather."""

from __future__ import annotations

from fuzz.layers import Layer
from fuzz.program import ALL_REDUCE, DTYPES, EITHER, FUSED, HIDDEN, REDUCE_SCATTER, REFUSED, SEQUENCE_MISSES, Site
from fuzz.text import Writer


class SequenceLayer(Layer):
    """Writes one layer around a reduce-scatter and an all-gather."""

    misses = SEQUENCE_MISSES
    without_miss = 0.35

    def __init__(self, writer: Writer, index: int) -> None:
        super().__init__(writer, index)
        self.group = "ALONE" if self.miss == "scatter: group of one rank" else self.pick("WORLD", "WORLD", "OTHER")
        self.other = "OTHER" if self.group == "WORLD" else "WORLD"
        self.ranks = 1 if self.group == "ALONE" else 2
        self.rows = (writer.shape[0] // self.ranks, *writer.shape[1:])

    def _shape_allows(self, miss: str) -> bool:
        if self.writer.program.dynamic and miss in ("scatter: flat", "scatter: hidden dimension"):
            return False
        return not (self.writer.shape[0] == 2 and miss in ("rows: broadcast residual", "mean over tokens"))

    def write(self) -> None:
        partial = self.let(self._expression(), "p")
        rows = self._scatter(partial)
        if self.miss in ("scatter: hidden dimension", "scatter: flat"):
            self._write_odd(rows)
        else:
            self._write_rows(partial, rows)
        self.writer.program.sites.append(Site(self.index, self.expect, self.miss, collective=REDUCE_SCATTER))

    def _write_rows(self, partial: str, rows: str) -> None:
        total = self._add_rows(self._before_norm(rows))
        normed = total if self.miss == "rows: not normed" else self.norm(total, rows)
        self._before_gather(normed)
        self._read(partial, total)
        if self.miss == "gather: none":
            self.output(normed)
        else:
            gathered = self._gather(normed)
            if self.misses[self.miss].ends_chain if self.miss else False:
                self.output(gathered)
            else:
                sizes = f"{self.writer.h}.shape" if self.miss == "rows: viewed" else ""
                self.writer.n = self.let(
                    f"{gathered}.view({sizes})" if sizes else f"{gathered}.to({self.torch_dtype})", "n"
                )
        fits = self.ranks == 2 and self.miss not in ("rows: wide residual", "rows: viewed", "scatter: other world size")
        if fits and (self.residual or self.rng.random() < 0.5):
            self.writer.rows = total

    @property
    def torch_dtype(self) -> str:
        return str(DTYPES[self.dtype])

    # The reduce-scatter

    def _scatter(self, p: str) -> str:
        group = self.group
        if self.miss == "scatter: other reduction":
            return self.let(
                f"functional.reduce_scatter_tensor({p}, {self.pick('avg', 'max', 'min')!r}, 0, {group})", "a"
            )
        if self.miss == "scatter: read before the wait":
            raw = self.let(f"ops.reduce_scatter_tensor({p}, 'sum', 2, {group}_NAME)", "raw")
            value = self.let(f"ops.wait_tensor({raw})", "a")
            self.output(f"{raw} * 2")
            return value
        if self.miss == "scatter: hidden dimension":
            return self.let(f"functional.reduce_scatter_tensor({p}, 'sum', {self.rank - 1}, {group})", "a")
        if self.miss == "scatter: flat":
            return self.let(f"functional.reduce_scatter_tensor({p}.reshape(-1), 'sum', 0, {group})", "a")
        if self.miss == "scatter: other world size":
            return self.let(f"ops.wait_tensor(ops.reduce_scatter_tensor({p}, 'sum', 1, {group}_NAME))", "a")
        forms = [
            f"functional.reduce_scatter_tensor({p}, 'sum', 0, {group})",
            f"functional.reduce_scatter_tensor({p}, 'SUM', scatter_dim=0, group={group}_NAME)",
            f"ops.wait_tensor(ops.reduce_scatter_tensor({p}, 'sum', {self.ranks}, {group}_NAME))",
        ]
        if self.rng.random() < 0.15 and not self.writer.program.dynamic:
            out = self.let(f"torch.empty({self.rows}, dtype={self.torch_dtype})", "a")
            self.do(f"dist.reduce_scatter_tensor({out}, {p}, group={group})")
            return out
        return self.let(self.rng.choice(forms), "a")

    def _write_odd(self, part: str) -> None:
        """A reduce-scatter that divides the hidden dimension, or everything at once."""
        size = HIDDEN // 2 if self.miss == "scatter: hidden dimension" else self.tokens * HIDDEN // 2
        dim = self.rank - 1 if self.miss == "scatter: hidden dimension" else 0
        normed = self.let(f"F.rms_norm({part}, ({size},), None, 1e-5)", "o")
        self.output(f"functional.all_gather_tensor({normed}, {self.rng.choice((0, dim))}, {self.group})")

    # Between it and the all-gather

    def _before_norm(self, rows: str) -> str:
        if self.miss == "rows: viewed":
            return self.let(self.pick(f"{rows}.unsqueeze(1)", f"{rows}.reshape(-1, 1, {HIDDEN})"), "v")
        steps = {
            "rows: scaled": "{rows} * 0.5",
            "rows: relu": "F.relu({rows})",
            "rows: biased": "{rows} + {bias}",
            "rows: biased, no residual": "{rows} + {bias}",
        }
        if self.miss not in steps:
            return rows
        bias = self.input("bias", (HIDDEN,)) if "{bias}" in steps[self.miss] else ""
        return self.let(steps[self.miss].format(rows=rows, bias=bias), "v")

    def _add_rows(self, v: str) -> str:
        if not self.residual:
            return v
        h = self.writer.rows
        if self.miss == "rows: broadcast residual":
            h = self.let(f"{self.writer.h}[: {self.writer.h}.shape[0] // 2, ..., :1] * 1.5", "h")
        elif not h or self.rng.random() < 0.1:
            if self.writer.program.dynamic:  # an argument of its own would have a size of its own
                h = self.let(f"{self.writer.h}[: {self.writer.h}.shape[0] // 2] * 1.5", "h")
            else:
                h = self.input("rows", self.rows, kind="partial")
        if self.miss == "rows: wide residual":
            h = self.let(f"{h}.to(torch.float32)", "h")
        elif self.miss == "rows: residual of the rows":
            h = self.let(self.pick(f"torch.tanh({v})", f"{h} * {v}"), "h")
        elif self.miss == "rows: alpha":
            return self.let(self.pick(f"torch.add({h}, {v}, alpha=2)", f"torch.add({v}, {h}, alpha=0.5)"), "t")
        elif self.miss == "rows: also read":
            self.output(self.pick(f"{v} * 2", f"{v}.float()", f"torch.log1p({v}.abs())"))
        total = self.let(self.pick(f"{h} + {v}", f"{v} + {h}"), "t")
        if self.miss == "rows: changed before the norm":
            self.do(self.pick(f"{total}.mul_(2.0)", f"{total} += 0.5"))
        return total

    def _before_gather(self, normed: str) -> None:
        if self.miss == "gather: norm also read":
            self.output(self.pick(f"{normed} * 2", f"{normed}.float().sum(-1)", f"{normed}.clone()"))
        if self.miss.startswith("rows: collective "):
            group = self.group if self.miss == "rows: collective between" else self.other
            self.output(f"functional.all_reduce(torch.sin({self.writer.n}), 'sum', {group})")
            self.writer.program.sites.append(Site(self.index, REFUSED, self.miss, collective=ALL_REDUCE))

    def _gather(self, normed: str) -> str:
        group = self.other if self.miss == "gather: other group" else self.group
        if self.miss == "gather: something between":
            normed = self.let(self.pick(f"{normed} * 2", f"F.relu({normed})", f"{normed} + 1"), "o")
        if self.miss == "gather: other dimension":
            return self.let(f"functional.all_gather_tensor({normed}, {self.rank - 1}, {group})", "g")
        if self.miss == "gather: waited for twice":
            raw = self.let(f"ops.all_gather_into_tensor({normed}, 2, {group}_NAME)", "raw")
            self.output(f"ops.wait_tensor({raw})")
            return self.let(f"ops.wait_tensor({raw})", "g")
        ranks = {"gather: other world size": 4, "scatter: other world size": 1}.get(self.miss, self.ranks)
        if self.miss in ("gather: twice", "gather: over both groups"):
            second = group if self.miss == "gather: twice" else self.other
            self.output(f"ops.wait_tensor(ops.all_gather_into_tensor({normed}, 2, {second}_NAME)) * 2")
        operator = f"ops.wait_tensor(ops.all_gather_into_tensor({normed}, {ranks}, {group}_NAME))"
        if ranks != self.ranks or self.miss == "gather: twice":
            return self.let(operator, "g")
        if self.rng.random() < 0.15 and not self.writer.program.dynamic and self.miss != "rows: viewed":
            out = self.let(f"torch.empty({self.writer.shape}, dtype={normed}.dtype)", "g")
            self.do(f"dist.all_gather_into_tensor({out}, {normed}.contiguous(), group={group})")
            return out
        return self.let(self.pick(f"functional.all_gather_tensor({normed}, 0, {group})", operator), "g")

    # Further readers

    def _read(self, partial: str, total: str) -> None:
        for _ in range(self.rng.choice((0, 0, 1, 1, 2))):
            which = self.rng.randrange(6)
            if which == 0:
                self.writer.outputs.append(total)
            elif which == 1:
                self.output(self.pick(f"{total}.view(-1)", f"{total}.unsqueeze(0)", f"{total} * 2"))
            elif which == 2:
                self.writer.outputs.append(partial)
            elif which == 3 and len(self.spare) > 1:  # not the last, which may be the norm itself
                self.output(f"{self.rng.choice(self.spare[:-1])} * 1.5")
            elif which == 4:
                self.do("x.add_(1)")
            elif which == 5 and self.miss not in ("rows: wide residual", "rows: viewed", "scatter: other world size"):
                buffer = self.input(f"buffer{self.count}_", self.rows)
                self.do(f"{buffer}.copy_({total})")
            if which in (0, 1, 5) and self.expect == FUSED and not self.residual:
                self.expect = EITHER if which == 1 else FUSED
