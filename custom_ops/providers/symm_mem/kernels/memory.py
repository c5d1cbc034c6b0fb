"""Memory accesses of the kernels in PTX: packets of 16 bytes, system-scope flags and bounded waits.

Ranks exchange data in one of three ways:

* **data as flag.** A packet is 16 bytes, four 32-bit words. Until it arrives, its destination has
  `SENTINEL` (all ones, a NaN in bf16, fp16 and fp32) in every word. The reader polls until no word
  is the sentinel. Each word is its own flag, so the only requirement is that 32-bit stores are not
  torn. Writers replace the one NaN that equals the sentinel by the NaN next to it (`sanitize`), so
  every value arrives, including -0.0 and NaN.
* **tagged word.** One 64-bit relaxed store of an fp32 value and a 32-bit tag, the call's number.
  Scalar 64-bit accesses are single-copy atomic. Because of the tag, nothing needs a reset.
* **flag.** A 64-bit word with the call's number, written after a barrier of the block and a
  system-scope fence, and read by ld.acquire.sys before a barrier. The fence is cumulative over the
  barrier, so it covers the stores of the whole block. The acquire invalidates L1, so loads after
  the barrier are not stale.

Every tensor operand has at least as many elements as the block has threads, in the default layout
(element i belongs to thread i modulo the number of threads). So no element belongs to two threads,
and a reader may reset a packet that it has seen. tests/kernels/test_symm_mem_compile.py checks the
compiled layouts for that.

Waits are bounded. After every 256 failed polls, a wait reads the control block's error word and
gives up if another wait has. Past the control block's time limit it writes the rank that it waited
for, the kind of wait and the call's number to that word and to the host's copy, and gives up. Once
the error word is set, kernels send nothing, wait for nothing and have NaN as their results: data
that arrives late could otherwise pass for that of a later call, here and on the peers.
"""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem import layout
from fusewire.custom_ops.providers.symm_mem.kernels.pairs import join_registers

CTL_ONE_SHOT = tl.constexpr(layout.CTL_ONE_SHOT)
CTL_DATA = tl.constexpr(layout.CTL_DATA)
CTL_FLAGS = tl.constexpr(layout.CTL_FLAGS)
CTL_ERROR = tl.constexpr(layout.CTL_ERROR)
CTL_HOST_ERROR = tl.constexpr(layout.CTL_HOST_ERROR)
CTL_LIMIT_NS = tl.constexpr(layout.CTL_LIMIT_NS)
CTL_PEERS = tl.constexpr(layout.CTL_PEERS)
CTL_ZEROS = tl.constexpr(layout.CTL_ZEROS)
CACHE_LINE_BYTES = tl.constexpr(layout.CACHE_LINE_BYTES)

WAIT_ONE_SHOT = tl.constexpr(layout.WAIT_ONE_SHOT)
WAIT_PARTIAL_DATA = tl.constexpr(layout.WAIT_PARTIAL_DATA)
WAIT_RESULT_DATA = tl.constexpr(layout.WAIT_RESULT_DATA)
WAIT_PARTIAL_FLAG = tl.constexpr(layout.WAIT_PARTIAL_FLAG)
WAIT_RESULT_FLAG = tl.constexpr(layout.WAIT_RESULT_FLAG)
WAIT_SLICE = tl.constexpr(layout.WAIT_SLICE)
OTHER_CALL = tl.constexpr(layout.OTHER_CALL)
FLAG_CALL_BITS = tl.constexpr(layout.FLAG_CALL_BITS)
FLAG_OPTION_BITS = tl.constexpr(layout.FLAG_OPTION_BITS)

SENTINEL = tl.constexpr(-1)
# The total that every launch adds to its counter, as a power of two; also the most blocks.
COUNTER_LOG2 = tl.constexpr(16)

_BEGIN = [
    "{",
    ".reg .pred p;",
    ".reg .b32 m, s, n;",
    ".reg .b64 t, t0, e, u;",
    "mov.b32 n, 0;",
    "mov.b64 t0, 0;",
]


@triton.constexpr_function
def _max_of(first: int, count: int) -> list[str]:
    """Return PTX that puts the unsigned maximum of `count` operands from `$first` in register m."""
    return [f"max.u32 m, ${first}, ${first + 1};"] + [f"max.u32 m, m, ${first + k};" for k in range(2, count)]


@triton.constexpr_function
def _slow_path(ctl: str, code: str, late: bool, blame: list[str], check: tuple[str, ...] = ()) -> list[str]:
    """Return PTX to run after a failed poll: count, and at times check error word and clock.

    Jumps to label `again`, or to `done` if it gives up. `blame` puts the awaited rank in register
    s. A `late` wait has a quarter more time, so that the wait nearest to the cause reports first.
    `check` runs before the clock is read; it may put a rank in s and a kind in m and jump to
    `report`. A report has the number of the current call, which all counters give together.
    """
    calls = []
    for counter in (CTL_ONE_SHOT, CTL_DATA, CTL_FLAGS):
        calls += [f"ld.relaxed.sys.global.b64 u, [{ctl}+{8 * counter.value}];"]
        calls += [f"shr.u64 u, u, {COUNTER_LOG2.value};", "add.u64 e, e, u;"]
    return [
        "add.u32 n, n, 1;",
        "and.b32 m, n, 255;",
        "setp.ne.u32 p, m, 0;",
        "@p bra again;",
        f"ld.relaxed.sys.global.b64 e, [{ctl}+{8 * CTL_ERROR.value}];",
        "setp.ne.b64 p, e, 0;",
        "@p bra done;",
        *check,
        "mov.u64 t, %globaltimer;",
        "setp.eq.u64 p, t0, 0;",
        "@p mov.b64 t0, t;",
        "sub.u64 t, t, t0;",
        f"ld.relaxed.sys.global.b64 e, [{ctl}+{8 * CTL_LIMIT_NS.value}];",
        *(["shr.u64 u, e, 2;", "add.u64 e, e, u;"] if late else []),
        "setp.lt.u64 p, t, e;",
        "@p bra again;",
        *blame,
        f"mov.b32 m, {code};",
        "report:",
        "add.u32 s, s, 1;",
        "shl.b32 m, m, 8;",
        "or.b32 s, s, m;",
        "mov.b32 m, 0;",
        "mov.b64 t, {s, m};",
        "mov.b64 e, 1;",
        *calls,
        "shl.b64 e, e, 16;",
        "or.b64 e, e, t;",
        "mov.b64 u, 0;",
        f"atom.relaxed.sys.global.cas.b64 t, [{ctl}+{8 * CTL_ERROR.value}], u, e;",
        "setp.ne.b64 p, t, 0;",
        "@p bra done;",
        f"ld.relaxed.sys.global.b64 t, [{ctl}+{8 * CTL_HOST_ERROR.value}];",
        "setp.eq.b64 p, t, 0;",
        "@p bra done;",
        "st.relaxed.sys.global.b64 [t], e;",
        "bra done;",
    ]


@triton.constexpr_function
def _poll_asm(packets: int, rows: int, words: int, step: int, late: bool, join: str = "sum") -> str:
    """Return PTX that loads packets and rows of tagged words until all have arrived.

    A packet has arrived when no word is the sentinel, a tagged word when it has the tag. Operands:
    out, 4 words per packet and a row's values joined; in, the packets' and the rows' addresses, tag
    (only with rows), control block, code, rank.
    """
    sums, at = 4 * packets, 4 * packets + rows
    tag, ctl, code, rank = (f"${at + packets + rows + k - (rows == 0)}" for k in range(4))
    names = [f"f{s}" for s in range(1, words)] if join == "pairs" else ["f"] * max(words - 1, 1)
    held = ", ".join([*dict.fromkeys(names), "g", "k"])
    body, blame = [f".reg .b32 {held};", ".reg .b64 v;", "again:", "mov.b32 k, 0;"], [f"mov.b32 s, {rank};"]
    for j in range(packets):
        to = ", ".join(f"${4 * j + k}" for k in range(4))
        body.append(f"ld.relaxed.sys.global.v4.b32 {{{to}}}, [${at + j}];")
    for j, s in [(j, s) for j in range(rows) for s in range(words)]:
        values, row = [f"${sums + j}", *names], f"[${at + packets + j}+{8 * s}]"
        if s % 2 == 0:  # one load reads two words
            load = f"v2.b64 {{u, v}}, {row}" if s + 1 < words else f"b64 u, {row}"
            body.append(f"ld.relaxed.sys.global.{load};")
        body += [f"mov.b64 {{{values[s]}, g}}, {'v' if s % 2 else 'u'};", f"xor.b32 g, g, {tag};", "or.b32 k, k, g;"]
        body += join_registers(values, s, words, join)
    if packets:
        body += [*_max_of(0, 4 * packets), "setp.eq.u32 p, m, 0xffffffff;", "@p mov.b32 k, 1;"]
    for j in reversed(range(packets if step else 0)):
        blame += [*_max_of(4 * j, 4), "setp.eq.u32 p, m, 0xffffffff;", f"@p add.u32 s, {rank}, {j * step};"]
    body += ["setp.eq.u32 p, k, 0;", "@p bra end;", *_slow_path(ctl, code, late, blame)]
    nans = [f"mov.b32 ${sums + j}, 0x7fffffff;" for j in range(rows)]
    return "\n".join([*_BEGIN, *body, "done:", *nans, "end:", "}"])


@triton.constexpr_function
def _wait_flag_asm(late: bool) -> str:
    """Return PTX that waits until a flag holds a value; $0 is 1 if the wait gave up.

    A flag of the same call with other bits above FLAG_CALL_BITS is reported at once as OTHER_CALL.
    Operands: address, value, mask, control block, code, rank.
    """
    check = ("xor.b64 e, u, $2;", f"shl.b64 e, e, {64 - FLAG_CALL_BITS.value};", "setp.ne.u64 p, e, 0;")
    check += ("@p bra same;", "mov.b32 s, $6;", f"mov.b32 m, {OTHER_CALL.value};", "bra report;", "same:")
    body = ["mov.b32 $0, 0;", "setp.eq.u32 p, $3, 0;", "@p bra end;", "again:"]
    body += ["ld.acquire.sys.global.b64 u, [$1];", "setp.eq.b64 p, u, $2;", "@p bra end;"]
    slow = _slow_path("$4", "$5", late, ["mov.b32 s, $6;"], check)
    return "\n".join([*_BEGIN, *body, *slow, "done:", "mov.b32 $0, 1;", "end:", "}"])


@triton.constexpr_function
def _constraints(outs: int, addresses: int, rest: str) -> str:
    # Early clobber, because outputs are written before the last input is read.
    return ",".join(["=&r"] * outs + ["l"] * addresses + [rest])


@triton.constexpr_function
def _int32s(n: int) -> tuple[Any, ...]:
    return (tl.int32,) * n


@triton.constexpr_function
def _load_asm(op: str) -> str:
    zeros = " ".join(f"mov.b32 ${k}, 0;" for k in range(4))
    return f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros} @p {op}.v4.b32 {{$0, $1, $2, $3}}, [$4]; }}"


@triton.jit
def load16(addr: tl.tensor, mask: tl.tensor, COHERENT: tl.constexpr) -> tl.tuple:
    """Load 16 bytes at each address as four int32 tensors, zeros where masked.

    COHERENT: a peer writes them, so bypass L1.
    """
    return tl.inline_asm_elementwise(
        _load_asm("ld.relaxed.sys.global" if COHERENT else "ld.global"),
        "=&r,=&r,=&r,=&r,l,r",
        (addr, mask.to(tl.int32)),
        dtype=_int32s(4),
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch(addr: tl.tensor, mask: tl.tensor) -> None:
    """Load the cache line at each address into L2, without using registers."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        (addr, mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load8(addr: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """Load 8 bytes at each address as two int32 tensors, zeros where masked."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r",
        (addr, mask.to(tl.int32)),
        dtype=_int32s(2),
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_i64(addr: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load the 64-bit word at each address, zero where masked. Is not moved out of loops."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b64 $0, 0; @p ld.global.b64 $0, [$1]; }",
        "=&l,l,r",
        (addr, mask.to(tl.int32)),
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.constexpr_function
def _store_asm(op: str) -> str:
    return f"{{ .reg .pred p; setp.ne.b32 p, $6, 0; @p {op}.v4.b32 [$1], {{$2, $3, $4, $5}}; mov.b32 $0, 0; }}"


@triton.jit
def store16(addr: tl.tensor, words: tl.tuple, mask: tl.tensor, POLLED: tl.constexpr) -> None:
    """Store four int32 tensors as 16 bytes at each address.

    POLLED: a peer polls them, so store relaxed at system scope.
    """
    tl.inline_asm_elementwise(
        _store_asm("st.relaxed.sys.global" if POLLED else "st.global"),
        "=r,l,r,r,r,r,r",
        (addr, words[0], words[1], words[2], words[3], mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sanitize(words: tl.tuple) -> tl.tuple:
    """Return the four words with the sentinel replaced by the NaN next to it."""
    out = ()
    for k in tl.static_range(4):
        word = tl.minimum(words[k].to(tl.uint32, bitcast=True), 0xFFFFFFFE)
        out = out + (word.to(tl.int32, bitcast=True),)
    return out


@triton.jit
def poll16(
    addrs: tl.tuple,
    ctl: tl.tensor,
    code: tl.constexpr,
    rank: tl.tensor,
    N: tl.constexpr,
    RANK_STEP: tl.constexpr,
    LATE: tl.constexpr,
) -> tl.tuple:
    """Wait for the packets at N tensors of addresses; return their 4N words, packet by packet.

    A wait that gives up reports rank + j * RANK_STEP, where j is the first missing packet, and
    returns the words that it read: sentinels, which are NaNs.
    """
    return tl.inline_asm_elementwise(
        _poll_asm(N, 0, 0, RANK_STEP, LATE),
        _constraints(4 * N, N, "l,r,r"),
        addrs + (ctl, code, rank),
        dtype=_int32s(4 * N),
        is_pure=False,
        pack=1,
    )


@triton.jit
def put_tagged(addr: tl.tensor, value: tl.tensor, tag: tl.tensor, mask: tl.tensor) -> None:
    """Store (fp32 value, int32 tag) as one 64-bit word where mask."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b64 u; setp.ne.b32 p, $4, 0; mov.b64 u, {$2, $3}; "
        "@p st.relaxed.sys.global.b64 [$1], u; mov.b32 $0, 0; }",
        "=r,l,r,r,r",
        (addr, value.to(tl.int32, bitcast=True), tag, mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def poll_sums(
    packets: tl.tuple,
    rows: tl.tuple,
    tag: tl.tensor,
    ctl: tl.tensor,
    code: tl.constexpr,
    rank: tl.tensor,
    PACKETS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    LATE: tl.constexpr,
    JOIN: tl.constexpr = "sum",
) -> tl.tuple:
    """Wait for packets, and for rows of WORDS tagged words, in one loop.

    Returns the packets' words, then the bits of each row's values joined (`pairs.join_registers`);
    NaN if the wait gave up.
    """
    return tl.inline_asm_elementwise(
        _poll_asm(PACKETS, ROWS, WORDS, 0, LATE, JOIN),
        _constraints(4 * PACKETS + ROWS, PACKETS + ROWS, "r,l,r,r"),
        packets + rows + (tag, ctl, code, rank),
        dtype=_int32s(4 * PACKETS + ROWS),
        is_pure=False,
        pack=1,
    )


@triton.jit
def set_flags(a: tl.tensor, at_a: tl.tensor, b: tl.tensor, at_b: tl.tensor, value: tl.tensor) -> None:
    """Release two flags, each where its mask is set.

    A reader that acquires one sees all stores of the block before its last barrier. Both share one
    fence: a second fence would wait until the peer has confirmed the first flag.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p, q, r; setp.ne.b32 p, $1, 0; setp.ne.b32 q, $3, 0; or.pred r, p, q; "
        "@r fence.acq_rel.sys; @p st.relaxed.sys.global.b64 [$2], $5; "
        "@q st.relaxed.sys.global.b64 [$4], $5; mov.b32 $0, 0; }",
        "=r,r,l,r,l,l",
        (a.to(tl.int32), at_a, b.to(tl.int32), at_b, value),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_flag(
    addr: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    ctl: tl.tensor,
    code: tl.constexpr,
    rank: tl.tensor,
    LATE: tl.constexpr,
) -> tl.tensor:
    """Acquire one flag per lane; return int32, 1 where the wait gave up. A barrier must follow."""
    return tl.inline_asm_elementwise(
        _wait_flag_asm(LATE),
        "=&r,l,l,r,l,r,r",
        (addr, value, mask.to(tl.int32), ctl, code, rank),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


compute_cache_keys(globals())
