"""Emits, into each handler, code that reads an `XLA_FFI_CallFrame`: metadata query, stage, checks of every buffer, errors.

Offsets are those of `xla/ffi/api/c_api.h` (see `jax.ffi.include_dir()`), the same in jaxlib 0.10 to 0.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import F32, I8, I16, I32, I64, POINTER, Emitter, Ptr, Value

API_MINOR = 3  # of c_api.h 0.3, which has everything used here
EXECUTE_STAGE, BUFFER_KIND, METADATA_EXTENSION, INVALID_ARGUMENT = 3, 1, 1, 3
MESSAGE_BYTES = 256
# dtype name → (XLA_FFI_DataType, element in memory)
DTYPES = {
    "float32": (11, F32), "int32": (4, I32), "uint8": (6, I8), "int8": (2, I8), "bfloat16": (16, I16),
    "float16": (10, I16), "uint16": (7, I16), "int64": (5, I64), "float8_e4m3fn": (20, I8), "float8_e5m2": (19, I8),
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """One argument or result: dtype name and dimensions, "M K 32": names are symbols, numbers are exact, "" is a scalar."""

    dtype: str
    dims: str

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple(self.dims.split())


def answer_metadata(k: Emitter, call: Ptr) -> None:
    """Answers XLA's query for the API version: it comes in an extension of the call frame, with nothing else filled in."""
    extension = call.pointer_at(1, I64)
    is_there = Value(k, k.builder.icmp_unsigned("!=", extension.ssa, ir.Constant(POINTER, None)))
    with k.when(is_there), k.when(extension.as_(I32)[2].eq(METADATA_EXTENSION)):
        metadata = extension.pointer_at(3, I32)
        metadata[6] = 0  # api_version.major_version
        metadata[7] = API_MINOR
        metadata[8] = 0  # traits
        metadata.as_(I64)[5] = 0  # state_type_id: no state
        k.builder.ret(ir.Constant(POINTER, None))


def return_error(k: Emitter, failed: Value, text: str, *found: Value) -> None:
    """Returns an InvalidArgument error if `failed`; `text` is a printf format for the int64 values `found`."""
    with k.when(failed, likely=False):
        data = bytearray(text.encode() + b"\0")
        kind = ir.ArrayType(I8, len(data))
        constant: Any = ir.GlobalVariable(k.module, kind, k.module.get_unique_name("message"))
        constant.global_constant, constant.linkage, constant.initializer = True, "private", ir.Constant(kind, data)
        constant.type = POINTER
        message = constant
        if found:
            buffer = k.scratch(I8, MESSAGE_BYTES)
            printf = k.module.globals.get("snprintf")
            if printf is None:
                kind = ir.FunctionType(I32, [POINTER, I64, POINTER], var_arg=True)
                printf = ir.Function(k.module, kind, "snprintf")
            k.builder.call(printf, [buffer.ssa, I64(MESSAGE_BYTES), constant, *(v.ssa for v in found)])
            message = buffer.ssa
        record = k.scratch(I64, 4)  # XLA_FFI_Error_Create_Args
        record[0], record[1] = 28, 0
        k.builder.store(message, (record + 2).ssa)
        record[3] = INVALID_ARGUMENT
        api = Ptr(k, k.function.args[0], I64).pointer_at(2, I64)
        create = api.function_at(6, ir.FunctionType(POINTER, [POINTER]))  # XLA_FFI_Error_Create
        k.builder.ret(k.builder.call(create, [record.ssa]))


def return_unless_execute(k: Emitter, call: Ptr) -> None:
    """Returns at once in the stages before EXECUTE, which have nothing to do."""
    with k.when(call.as_(I32)[8].ne(EXECUTE_STAGE)):
        k.builder.ret(ir.Constant(POINTER, None))


class Checker:
    """Emits the checks of a call frame and gathers pointers and dimensions in one int64 array, `slots`.

    After `run`, `names` says what is in which slot: arguments, results, then symbolic dimensions.
    """

    def __init__(self, k: Emitter, call: Ptr, title: str, slots: Ptr, room: int) -> None:
        self.k, self.call, self.title, self.slots, self.room = k, call, title, slots, room
        self.names: list[str] = []
        self._sizes: dict[str, tuple[Value, str]] = {}

    def run(self, args: Mapping[str, Buffer], results: Mapping[str, Buffer], aliases: Mapping[str, str]) -> None:
        """Returns an error from the handler unless everything is as declared."""
        self._group("argument", args, 5)
        self._group("result", results, 10)
        for argument, result in aliases.items():
            same = self.slots[self.names.index(argument)].eq(self.slots[self.names.index(result)])
            return_error(self.k, same ^ 1, f"{self.title}: argument {argument} and result {result} must be one buffer")
        for name, (size, _) in self._sizes.items():
            self._keep(name, size)

    def _keep(self, name: str, value: Value) -> None:
        if len(self.names) >= self.room or name in self.names:
            raise ValueError(f"kernel {self.title}: {name} is declared twice, or there are too many buffers")
        self.slots[len(self.names)] = value
        self.names.append(name)

    def _group(self, what: str, buffers: Mapping[str, Buffer], word: int) -> None:
        """Checks XLA_FFI_Args or XLA_FFI_Rets, which begins at `word` of the call frame."""
        k, title = self.k, self.title
        count = self.call[word + 2]
        return_error(k, count.ne(len(buffers)), f"{title}: expected {len(buffers)} {what}s, found %lld", count)
        kinds, values = self.call.pointer_at(word + 3, I32), self.call.pointer_at(word + 4, I64)
        for i, (name, buffer) in enumerate(buffers.items()):
            label = f"{title}: {what} {name}"
            return_error(k, kinds[i].ne(BUFFER_KIND), f"{label} is not a buffer")
            record = values.pointer_at(i, I64)
            code, dtype = DTYPES[buffer.dtype][0], record.as_(I32)[4]
            text = f"{label} has XLA_FFI_DataType %lld, expected {code} ({buffer.dtype})"
            return_error(k, dtype.ne(code), text, dtype.to(I64))
            rank = record[4]
            text = f"{label} has rank %lld, expected {len(buffer.shape)} [{buffer.dims}]"
            return_error(k, rank.ne(len(buffer.shape)), text, rank)
            sizes = record.pointer_at(5, I64)
            for axis, symbol in enumerate(buffer.shape):
                self._dimension(label, axis, symbol, sizes[axis])
            self._keep(name, record[3])

    def _dimension(self, label: str, axis: int, symbol: str, size: Value) -> None:
        if symbol.isdigit():
            text = f"{label} has size %lld on axis {axis}, expected {symbol}"
            return_error(self.k, size.ne(int(symbol)), text, size)
        elif symbol in self._sizes:
            expected, where = self._sizes[symbol]
            text = f"{label} has size %lld on axis {axis}, expected {symbol} = %lld as in {where}"
            return_error(self.k, size.ne(expected), text, size, expected)
        else:
            self._sizes[symbol] = (size, label.split(": ")[1])
