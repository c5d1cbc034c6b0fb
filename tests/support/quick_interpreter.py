"""Keep what Triton's interpreter works out again at every operation: half of its time.

Types, shapes and constants are the same at each pass through a kernel. Nothing that is checked
changes: an operand or type that was not seen before takes Triton's own way, and a sum of integers
that overflows is still an error.

Only for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Two operands of one such type are computed in it.
_PLAIN = frozenset(("int1", "int32", "int64", "fp32"))
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _keep_numpy_types() -> None:
    find, known = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        if (found := known.get(kind.name)) is None:
            found = known[kind.name] = find(kind)
        return found

    interpreter._get_np_dtype = get_np_dtype


def _keep_shapes() -> None:
    make_type, make_tensor = core.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, Any] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key in types:
            self.__dict__.update(types[key])
        else:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[type.name]
        else:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel

    core.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor


def _keep_constants() -> None:
    check, constants = TritonSemantic.binary_op_type_checking_impl, {}

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *flags: Any, **more: Any) -> Any:
        if not isinstance(lhs, tl.tensor) or lhs.dtype.name not in _PLAIN:
            return check(self, lhs, rhs, *flags, **more)
        if isinstance(rhs, tl.tensor):
            return (lhs, rhs) if lhs.type.name == rhs.type.name else check(self, lhs, rhs, *flags, **more)
        # -0.0 equals 0.0, and 1 equals True.
        key = (lhs.type.name, type(rhs), str(rhs), flags, *more.items())
        if key not in constants:
            left, right = check(self, lhs, rhs, *flags, **more)
            if left is not lhs:
                return left, right
            right.handle.data.flags.writeable = False
            constants[key] = right
        return lhs, constants[key]

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def _check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    kind = lhs.dtype
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"


@functools.cache
def make_quick() -> None:
    """Change the interpreter in this process, once."""
    _keep_numpy_types()
    _keep_shapes()
    _keep_constants()
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
