"""What the `symm_mem` protocols rest on, in the simulator.

* Controls: one wait, flag, fence, reset or generation is taken out at a time, by altering a line
  of a kernel's source. It is missed if a number is wrong or a wait never ends, within `SCHEDULES`
  random schedules. What is taken out and not missed is in `UNNOTICED`, with the reason.
* Delays: a rank that stops for a while, at any step, changes nothing.
* Residency: a rank's GPU has room for some blocks of each launch only, as beside another kernel;
  the next starts when one ends, in the order of their numbers. The rule is in `kernels/__init__`,
  under Progress.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.providers.symm_mem.launch_config import LaunchConfig
from fusewire.errors import PeerTimeoutError

from support.interpreted import main, run_cases

BF16 = torch.bfloat16
SCHEDULES = 20
# A wrong number, a call that is not NaN after a fault, or a wait that never ends.
NOTICED = ("residual", "norm", "scales", "is not NaN", "did not take part in time")
INNER, WIDE = {"inner": (BF16, "scale_then_round")}, {"form": "wide_sum_round_then_scale"}
DATA, FLAGS = {"protocol": "data"}, {"protocol": "flags"}
SLICED = {"config": LaunchConfig(2, 1, 32, slices=2)}
# With so many slices and packets a thread reads one sum of squares a row.
ONE_WORD = {"config": LaunchConfig(3, 1, 32, slices=3, unroll=8)}

# Scenarios: ranks, hidden size, calls, and whether rank 1 stops ("missing") or comes late in call
# 1.
ONE = (2, 64, [("one_shot", 2, {})] * 5)
ONE_SLICED = (2, 512, [("one_shot", 1, SLICED)] * 2)
ONE_INNER = (2, 512, [("one_shot", 1, {**SLICED, **INNER})])
ONE_LATE = (2, 64, [("one_shot", 2, {})] * 5, "late")
FULL = (2, 64, [("two_shot", 3, DATA)] * 4)
SHARDED = (2, 64, [("two_shot_sharded", 3, {**DATA, **WIDE})] * 5)
DATA_SLICED = (2, 512, [("two_shot", 2, {**DATA, **SLICED})])
DATA_INNER = (2, 512, [("two_shot", 2, {**DATA, **SLICED, **INNER})])
DATA_ONE_WORD = (2, 528, [("two_shot", 2, {**DATA, **ONE_WORD})])
DATA_LATE = (2, 64, [("two_shot", 3, DATA)] * 5, "late")
IN_FLAGS = (2, 64, [("two_shot", 3, FLAGS)] * 3)
FLAGS_SHARDED = (2, 64, [("two_shot_sharded", 3, FLAGS)])
FLAGS_LATE = (2, 64, [("two_shot", 3, FLAGS)] * 5, "late")
FLAGS_MISSING = (2, 64, [("two_shot", 3, FLAGS)] * 2, "missing")
IN_PLACE_MISSING = (2, 64, [("two_shot", 3, {"output": 0})] * 3, "missing")
TOKEN, GROUP = {"quant": "token"}, {"quant": "group"}
FP8_SLICED = (2, 512, [("one_shot", 1, {**SLICED, **TOKEN})])
FP8_GROUPS = (2, 256, [("two_shot_sharded", 3, GROUP)])
FP8_MISSING = (2, 128, [("two_shot_sharded", 3, TOKEN)] * 2, "missing")
FP8_IN_PLACE_MISSING = (2, 128, [("two_shot_sharded", 3, {**TOKEN, "output": 0})] * 3, "missing")


def once(scenario):
    """The first call only: what is taken out is missed at once."""
    return (*scenario[:2], scenario[2][:1])


# --- What replaces a wait -------------------------------------------------------------------------

# The packets that are there, and the sums of tagged words whatever their tags.
PACKETS = "sum((load16(a, a == a, True) for a in {}), ())"
SUMS = "tuple(words_there(a, {}) for a in {})"

ONE_SHOT = "one_shot.one_shot_kernel"
TWO_DATA = "two_shot_data.two_shot_data_kernel"
TWO_FLAGS = "two_shot_flags.two_shot_flags_kernel"
SLICE_LARGEST = 'poll_sums((), (at,), tag_of(call), ctl, WAIT_SLICE, rank, 0, 1, SLICES, True, "largest")[0]'
TAGS = ("packets.tag_of", "(call & 0x7FFFFFFF)", "(call & 0)")
RESET = "store16(here, (empty, empty, empty, empty), mask & (rank != src), False)"
LOST = "tl.where(has_failed(ctl_at), tokens, 0)"
SLICE_WAIT = (
    "packets.slices_sum",
    "poll_sums((), (at,), tag_of(call), ctl, WAIT_SLICE, rank, 0, 1, USED, True, JOIN)",
    SUMS.format("USED", "(at,)"),
)
WAIT_SUMS = """poll_sums(
                    *(addrs, lines, tag_of(call), ctl_at, WAIT_RESULT_DATA, owner),
                    *(UNROLL, UNROLL, SQUARES_PER_ROW, True, "pairs" if BATCH_INVARIANT else "sum"),
                )"""
ONLY_PACKETS = "poll16(addrs, ctl_at, WAIT_RESULT_DATA, owner, UNROLL, 0, True) + " + SUMS.format(
    "SQUARES_PER_ROW", "lines"
)
ONLY_SUMS = PACKETS.format("addrs") + " + " + WAIT_SUMS.replace("addrs", "()").replace("UNROLL, UNROLL", "0, UNROLL")
INNER_AT = "CACHE_LINE_BYTES + CACHE_LINE_BYTES // 2"
PARTIAL_FLAG = "wait_flag(flag, flag_value, is_peer, ctl_at, WAIT_PARTIAL_FLAG, thread, False)"
RESULT_FLAG = "wait_flag(flag, flag_value, waits, ctl_at, WAIT_RESULT_FLAG, thread, True)"

# What is taken out: the function, its text and the altered text; and the scenario that must miss
# it.
CONTROLS = {
    "one-shot: the wait for rows": (
        ONE_SHOT, "poll16(addrs, ctl_at, WAIT_ONE_SHOT, 0, WORLD, 1, False)", PACKETS.format("addrs"), once(ONE),
    ),
    "one-shot: two slots": (ONE_SHOT, "(call & 1) * slot_bytes", "(call & 0) * slot_bytes", ONE),
    "one-shot: the reset of packets": (ONE_SHOT, RESET, "pass", ONE),
    "one-shot: data like the sentinel": (ONE_SHOT, "sanitize(mine)", "mine", once(ONE)),
    "one-shot: the wait for a row's slices": (*SLICE_WAIT, ONE_SLICED),
    "one-shot: the call in slices' tags": (*TAGS, ONE_SLICED),
    "one-shot: a word of its own for the inner norm": (ONE_SHOT, INNER_AT, "CACHE_LINE_BYTES", ONE_INNER),
    "one-shot: silence after a fault": (ONE_SHOT, LOST, "tokens * 0", ONE_LATE),
    "data: the wait for partial rows": (
        TWO_DATA, "poll16(addrs, ctl_at, WAIT_PARTIAL_DATA, 0, WORLD, 1, False)", PACKETS.format("addrs"), once(FULL),
    ),
    "data: the wait for normalised rows": (
        TWO_DATA, "poll16(addrs, ctl_at, WAIT_RESULT_DATA, owner, UNROLL, 0, True)", PACKETS.format("addrs"), once(SHARDED),
    ),
    "data: the wait for rows, not for squares": (TWO_DATA, WAIT_SUMS, ONLY_SUMS, once(FULL)),
    "data: the wait for squares, not for rows": (TWO_DATA, WAIT_SUMS, ONLY_PACKETS, DATA_SLICED),
    "data: the wait for one word of squares": (TWO_DATA, WAIT_SUMS, ONLY_PACKETS, DATA_ONE_WORD),
    "data: the call in squares' tags": (*TAGS, FULL),
    "data: two slots": (TWO_DATA, "(call & 1) * slot_bytes", "(call & 0) * slot_bytes", SHARDED),
    "data: the reset of partial rows": (TWO_DATA, RESET, "pass", FULL),
    "data: the reset of results": (
        TWO_DATA, "store16(own + results + there, (empty, empty, empty, empty), q < limit, False)", "pass", SHARDED,
    ),
    "data: partial rows like the sentinel": (TWO_DATA, "sanitize(words)", "words", once(FULL)),
    "data: sums like the sentinel": (TWO_DATA, "sanitize(addend if WIDE_SUM else total)", "total", once(FULL)),
    "data: norms like the sentinel": (TWO_DATA, "sanitize(norm)", "norm", once(SHARDED)),
    "data: the wait for a row's slices": (*SLICE_WAIT, DATA_SLICED),
    "data: a word of its own for the inner norm": (TWO_DATA, INNER_AT, "CACHE_LINE_BYTES", DATA_INNER),
    "data: silence after a fault": (TWO_DATA, LOST, "tokens * 0", DATA_LATE),
    "flags: the wait for partial rows": (TWO_FLAGS, PARTIAL_FLAG, "thread * 0", once(IN_FLAGS)),
    "flags: the wait for results": (TWO_FLAGS, RESULT_FLAG, "thread * 0", once(IN_FLAGS)),
    "flags: the wait for results, sharded": (TWO_FLAGS, RESULT_FLAG, "thread * 0", FLAGS_SHARDED),
    "flags: the call in flags": ("packets.flag_of", "(call & ((1 << FLAG_CALL_BITS) - 1))", "(call & 0)", IN_FLAGS),
    "flags: the fence before flags": ("memory.set_flags", "@r fence.acq_rel.sys; ", "", once(IN_FLAGS)),
    "flags: the barrier before flags": (
        TWO_FLAGS, "tl.debug_barrier()\n            first = flags_out", "first = flags_out", once(IN_FLAGS),
    ),
    "flags: silence after a fault": (
        TWO_FLAGS, "has_failed(ctl_at).to(tl.int32)", "has_failed(ctl_at).to(tl.int32) * 0", FLAGS_LATE,
    ),
    "flags: NaN for sums that lack a part": (
        TWO_FLAGS, "poisoned(words_of(sums, KIND, True), bad)", "words_of(sums, KIND, True)", FLAGS_MISSING,
    ),
    "flags: NaN for rows that did not come": (
        TWO_FLAGS, "poisoned(packet_of(arrived, j - g), bad)", "packet_of(arrived, j - g)", FLAGS_MISSING,
    ),
    "FP8: the wait for the slices' largest values": (
        "quantize.slices_largest", SLICE_LARGEST, "bits", FP8_SLICED,
    ),
    "FP8: words of their own for the largest values": (ONE_SHOT, "own + quant_at + ", "own + slices_at + ", FP8_SLICED),
    "FP8: the barrier before scales leave": ("quantize.staged_scales", "tl.debug_barrier()", "pass", FP8_GROUPS),
    "FP8: NaN for rows that did not come": (
        TWO_FLAGS, "poisoned_fp8(arrived, j - g, bad)", "(arrived[2 * (j - g)], arrived[2 * (j - g) + 1])", FP8_MISSING,
    ),
    "FP8: NaN for scales that did not come": (
        TWO_FLAGS, "tl.where(bad > 0, NAN_SCALE, scales)", "scales", FP8_MISSING,
    ),
    "FP8: NaN in place": (
        TWO_FLAGS, "store_fp8(at, nan_fp8(packet), valid, KIND)", "pass", FP8_IN_PLACE_MISSING,
    ),
    "flags: NaN in place": (TWO_FLAGS, "if bad > 0:", "if bad > 1:", IN_PLACE_MISSING),
}  # fmt: skip


# The first schedule, which saves time; earlier ones miss nothing.
FIRST = {"one-shot: two slots": 1, "data: two slots": 6}


@contextlib.contextmanager
def altered(name, text, other):
    """Run a kernel's function with another text in its source."""
    from triton.runtime.interpreter import InterpretedFunction

    module, _, function = name.partition(".")
    module = importlib.import_module(f"fusewire.custom_ops.providers.symm_mem.kernels.{module}")
    function = getattr(module, function)
    rewriter = function.rewriter
    lines = inspect.getsourcelines(function.fn)[0]
    rewriter.def_lineno = rewriter._find_def(lines)
    source = rewriter._prepare_source(lines)
    assert source.count(text) == 1, f"{name} has {source.count(text)} times {text}"
    with (
        mock.patch.object(rewriter, "_prepare_source", return_value=source.replace(text, other)),
        mock.patch.dict(InterpretedFunction.rewritten_fn),
        mock.patch.dict(vars(module), {"words_there": words_there}),
    ):
        InterpretedFunction.rewritten_fn.pop(function.fn, None)
        yield


def words_there(at, count):
    """The sum of the values of tagged words, whatever their tags, as bits."""
    import triton.language as tl

    from fusewire.custom_ops.providers.symm_mem.kernels.memory import load_i64

    total = None
    for word in range(count):
        value = load_i64(at + 8 * word, at == at).to(tl.int32).to(tl.float32, bitcast=True)
        total = value if total is None else total + value
    return total.to(tl.int32, bitcast=True)


# What is taken out and not missed, with the reason.
UNNOTICED = {
    "the barrier before the counter": (
        "packets.end_call", "tl.debug_barrier()", "pass", ONE,
        "needed: a thread may be so late that it reads the counter of the next call. Simulated threads of a block "
        "do not drift apart",
    ),
    "the barrier after partial rows' flags": (
        TWO_FLAGS, "tl.debug_barrier()\n            sums = ()", "sums = ()", IN_FLAGS,
        "needed: one thread for each peer has seen its flag, and the others load that peer's rows. As above",
    ),
    "the barrier after results' flags": (
        TWO_FLAGS, "tl.debug_barrier()\n            peer_rotation = recomputed(pid)\n            if is_dynamic",
        "peer_rotation = recomputed(pid)\n            if is_dynamic", IN_FLAGS, "needed, as above",
    ),
    "loads of what peers write past L1": (
        TWO_FLAGS, "load16(part_at + local, mask, True)", "load16(part_at + local, mask, False)", IN_FLAGS,
        "the acquire of the flag invalidates L1, so this is redundant; simulated loads have no cache",
    ),
    "the call in the tags of 1 / rms": (
        TWO_FLAGS, "put_tagged(row_at, one, tag_of(call), is_peer)", "put_tagged(row_at, one, tag_of(call * 0), is_peer)",
        IN_FLAGS, "redundant: the thread that stores the word sets the row's flag after it, behind the same fence",
    ),
}  # fmt: skip


def problem(scenario, seed):
    """Return what goes wrong in one schedule: a wrong number, a wait that never ends, or ""."""
    from support.simulator import simulate

    world, hidden, calls, *stops = scenario
    try:
        simulate(world, hidden, BF16, calls, seed, **dict.fromkeys(stops, (1, 1, seed % 8)))
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- Ranks that stop for a while ------------------------------------------------------------------

PROTOCOLS = {
    "one-shot": ("one_shot", {}),
    "data": ("two_shot", DATA),
    "data, sharded": ("two_shot_sharded", DATA),
    "flags": ("two_shot", FLAGS),
}
MORE_PROTOCOLS = {
    **PROTOCOLS,
    "one-shot, slices": ("one_shot", SLICED),
    "data, slices": ("two_shot", {**DATA, **SLICED}),
    "flags, sharded": ("two_shot_sharded", FLAGS),
    "flags, in place": ("two_shot", {"output": 0}),
}


def _delays(protocols, turns):
    """One rank at a time stops in call 1 after so many turns, until nobody else can go on."""
    cases = itertools.product(protocols, (0, 1), turns)
    return {f"delay, {name}, rank {rank}, {turn}": (name, rank, turn) for name, rank, turn in cases}


DELAYS, MORE_DELAYS = _delays(PROTOCOLS, (7,)), _delays(MORE_PROTOCOLS, range(120))


def run_delay(name, rank, turn):
    from support.simulator import simulate

    kind, options = MORE_PROTOCOLS[name]
    hidden, tokens = (512, 2) if "slices" in name else (64, 3)
    simulate(2, hidden, BF16, [(kind, tokens, options)] * 2, turn, delayed=(rank, 1, turn))


# --- Residency ------------------------------------------------------------------------------------

BLOCKS = 4  # of each launch, on ranks with as many multiprocessors
ALL = 99


def _config(slices=1, block=32, **options):
    return {"config": LaunchConfig(BLOCKS, 1, block, slices=slices, **options)}


# Kind, tokens, options, hidden size; then how many blocks a rank needs if all ranks have no more,
# and if one rank has fewer than the others, which have room for all.
LAUNCHES = {
    # A block owns whole rows: one at a time is enough.
    "one-shot": ("one_shot", 6, _config(), 64, 1, 1),
    "one-shot, inner": ("one_shot", 6, {**_config(), **INNER, **WIDE}, 64, 1, 1),
    "flags": ("two_shot", 12, {**FLAGS, **_config(result_lag=1)}, 64, 1, 1),
    "flags, lookahead": ("two_shot", 12, {**FLAGS, **_config(lookahead=2), **INNER}, 64, 1, 1),
    "flags, in place": ("two_shot", 11, {"output": 0, **_config(), **WIDE}, 64, 1, 1),
    "flags, sharded": ("two_shot_sharded", 11, {**FLAGS, **_config(result_lag=1), **INNER}, 64, 1, 1),
    "flags, sharded, in place": ("two_shot_sharded", 12, {"output": 0, **_config(lookahead=2)}, 64, 1, 1),
    # Data as flag, a tile of each row.
    "data": ("two_shot", 8, {**DATA, **_config()}, 256, 1, 1),
    "data, wide": ("two_shot", 7, {**DATA, **_config(), **INNER, **WIDE}, 256, 1, 1),
    "data, sharded": ("two_shot_sharded", 8, {**DATA, **_config()}, 256, 1, 1),
    "data, sharded, wide": ("two_shot_sharded", 8, {**DATA, **_config(), **WIDE}, 256, 1, 1),
    # A tile holds four rows: its reader waits for the four blocks that own them, who wait likewise.
    "data, rows of a tile": ("two_shot", 8, {**DATA, **_config()}, 64, 2, 1),
    "data, rows of a tile, sharded": ("two_shot_sharded", 8, {**DATA, **_config(), **INNER}, 64, 2, 1),
    # Blocks share a row: its slices, or the tiles in which it is copied.
    "one-shot, slices": ("one_shot", 4, {**_config(2), **INNER}, 512, 2, 2),
    "one-shot, one row": ("one_shot", 1, {**_config(4), **WIDE}, 512, 4, 4),
    "data, slices": ("two_shot", 4, {**DATA, **_config(2, unroll=2)}, 512, 3, 2),
    "data, slices, sharded": ("two_shot_sharded", 4, {**DATA, **_config(2), **WIDE}, 512, 2, 2),
    "data, tiles of a row": ("two_shot", 2, {**DATA, **_config(1, 128)}, 1024, 4, 4),
    "data, tiles of a row, sharded": ("two_shot_sharded", 2, {**DATA, **_config(1, 128), **INNER}, 1024, 4, 4),
}
LONG = (
    *("one-shot, inner", "flags, lookahead", "flags, in place", "data, wide", "data, sharded, wide"),
    *("data, slices, sharded", "data, tiles of a row, sharded"),
)


def _rooms():
    """A case is a launch, each rank's room, whether that is enough, and how often it is launched."""
    found = {}
    for name, (*_, alike, alone) in LAUNCHES.items():
        enough = [(1, 2)] if alike == 1 else [(alike, alike)] if alike == alone else [(alike, alike), (ALL, alone)]
        for fits in (*enough, (alike - 1, alike - 1)):
            if min(fits) > 0 and name not in LONG:
                found[f"room, {name}, {fits}"] = (name, fits, fits in enough, 1)
    return found


def _more_rooms():
    """All numbers on two ranks, and three ranks that differ."""
    found = {}
    for name, (*_, alike, alone) in LAUNCHES.items():
        two, three = itertools.product((1, 2, 3, 4, ALL), repeat=2), itertools.permutations((2, 3, 4))
        if name == "data, slices, sharded":
            three = ()  # the tiles of a row are twice as many, and so are the blocks that copy it
        for fits in (*two, *three):
            if min(fits) >= alike or (ALL in fits and min(fits) >= alone):
                found[f"room, {name}, {fits}, often"] = (name, fits, True, 3)
            elif fits == (ALL, alone - 1):
                found[f"room, {name}, {fits}"] = (name, fits, False, 1)
    return found


ROOMS, MORE_ROOMS = _rooms(), _more_rooms()


def run_room(name, fits, enough, often):
    from support.simulator import simulate

    kind, tokens, options, hidden, *_ = LAUNCHES[name]
    given = (len(fits), hidden, BF16, [(kind, tokens, options)] * often, sum(fits), BLOCKS)
    timeout = pytest.raises(PeerTimeoutError, match="did not take part in time")
    with contextlib.nullcontext() if enough else timeout:
        simulate(*given, resident=fits)


# --- The tests ------------------------------------------------------------------------------------


def run_control(name):
    function, text, other, scenario = CONTROLS[name]
    with altered(function, text, other):
        for seed in range(FIRST.get(name, 0), SCHEDULES):
            if found := problem(scenario, seed):
                assert any(sign in found for sign in NOTICED), found
                return
    raise AssertionError(f"{SCHEDULES} schedules miss nothing")


def run_unnoticed(name):
    """Should one of these be noticed one day, it belongs to the controls."""
    function, text, other, scenario, _ = UNNOTICED[name]
    with altered(function, text, other):
        for seed in range(SCHEDULES):
            assert not (found := problem(scenario, seed)), f"is noticed: {found}"


def run_arithmetic():
    """Values that support/quick_interpreter.py has met before change nothing of what follows."""
    import numpy as np
    import triton.language as tl

    from support.simulated_arithmetic import array_of, make_tensor
    from support.simulator import Machine, install

    install(Machine(0))
    number, most = make_tensor(np.float32([1.0]), [], tl.float32), make_tensor(np.int32([2**31 - 1]), [], tl.int32)
    for _ in range(2):
        assert [bool(np.signbit(array_of(number * zero))[0]) for zero in (0.0, -0.0)] == [False, True]
        assert [int(array_of(most - value)[0]) for value in (1, 2)] == [2**31 - 2, 2**31 - 3]
        for overflows in (lambda: most + 1, lambda: most * 2, lambda: -2 - most):
            with pytest.raises(AssertionError, match="int32 overflow detected"):
                overflows()


def run_case(name):
    delays, rooms = {**DELAYS, **MORE_DELAYS}, {**ROOMS, **MORE_ROOMS}
    if name in CONTROLS:
        run_control(name)
    elif name in UNNOTICED:
        run_unnoticed(name)
    elif name in delays:
        run_delay(*delays[name])
    elif name in rooms:
        run_room(*rooms[name])
    elif name == ARITHMETIC:
        run_arithmetic()
    else:
        scenario = CONTROLS[name.removeprefix(AS_IT_IS)][-1]
        for seed in range(SCHEDULES):
            assert not (found := problem(scenario, seed)), found


AS_IT_IS, ARITHMETIC = "as it is, ", "arithmetic"
# Like another control, for another protocol, operator or scenario.
MORE_CONTROLS = (
    *("data: the wait for a row's slices", "data: the wait for one word of squares", "data: the call in squares' tags"),
    *("data: a word of its own for the inner norm", "flags: the wait for results, sharded"),
)
NORMAL = [name for name in CONTROLS if name not in MORE_CONTROLS]


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, [*NORMAL, *DELAYS, *ROOMS, ARITHMETIC])


@pytest.mark.parametrize("name", NORMAL)
def test_what_a_protocol_rests_on_is_missed(name, results):
    assert not results[name], results[name]


@pytest.mark.parametrize("name", DELAYS)
def test_a_rank_that_stops_for_a_while_changes_nothing(name, results):
    assert not results[name], results[name]


@pytest.mark.parametrize("name", ROOMS)
def test_the_blocks_that_a_launch_needs_at_once(name, results):
    assert not results[name], results[name]


def test_the_interpreters_arithmetic(results):
    assert not results[ARITHMETIC], results[ARITHMETIC]


LONG_RUNS = {
    "controls": [*MORE_CONTROLS, *UNNOTICED, *(AS_IT_IS + name for name in CONTROLS)],
    "delays": list(MORE_DELAYS),
    "rooms": list(MORE_ROOMS),
}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("run", LONG_RUNS)
def test_the_long_form(run):
    failed = {name: text for name, text in run_cases(__file__, LONG_RUNS[run], 3000).items() if text}
    assert not failed, f"{len(failed)} cases failed: {dict(list(failed.items())[:2])}"


if __name__ == "__main__":
    main(run_case)
