"""The coefficients of the cost formula: microseconds for each term, by variant and protocol.

Written by `python -m tests.support.costs` from the shipped tables; do not edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Parameters = Mapping[str, Sequence[Mapping[str, float]]]

PARAMETERS: Parameters = {
    "symm_mem/oneshot": ({"call": 1.933, "row_to_peers": 0.006865, "fourth_root": 3.081},),
    "symm_mem/twoshot": (
        {"call": 2.851, "row_to_peers": 0.005817, "fourth_root": 2.742},
        {"call": 9.768, "own_rows": 6.981},
    ),
    "flashinfer/oneshot": (
        {"call": 3.193, "row_to_peers": 0.03122, "fourth_root": 4.689, "rows": 6.52, "all_x": 0.7282},
    ),
    "flashinfer/twoshot": ({"call": 10.77, "row_to_peers": 0.2792, "x": 1.648},),
    "native": ({"call": 7.294, "row_to_peers": 0.1087, "root": 9.553},),
}
