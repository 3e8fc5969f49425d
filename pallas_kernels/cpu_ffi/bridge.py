"""Native CPU kernels as XLA custom calls: declare the buffers, write the body, get a JAX function.

XLA hands a handler an `XLA_FFI_CallFrame`. The handler written here answers the metadata query, acts at the EXECUTE stage
only, checks count, dtype, rank and sizes of every buffer (a symbolic dimension must agree everywhere) and returns an
`XLA_FFI_Error` that names kernel and argument; only then does a body see a pointer. Offsets are those of
`xla/ffi/api/c_api.h` (see `jax.ffi.include_dir()`), the same in jaxlib 0.10 to 0.12.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
from llvmlite import ir

from pallas_kernels.cpu_ffi.compile import Target, host_target, load
from pallas_kernels.cpu_ffi.emit import F32, I8, I16, I32, I64, POINTER, Emitter, Ptr, Value
from pallas_kernels.cpu_ffi.threads import thread_pool

API_MINOR = 3  # of c_api.h 0.3: everything used here
EXECUTE_STAGE, BUFFER_KIND, METADATA_EXTENSION, INVALID_ARGUMENT = 3, 1, 1, 3
MESSAGE_BYTES = 256
# dtype name → (XLA_FFI_DataType, element in memory)
DTYPES = {
    "float32": (11, F32), "int32": (4, I32), "uint8": (6, I8), "int8": (2, I8), "bfloat16": (16, I16),
    "float16": (10, I16), "uint16": (7, I16), "int64": (5, I64), "float8_e4m3fn": (20, I8), "float8_e5m2": (19, I8),
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """One argument or result: dtype name and dimensions, "M K 32": names are symbols, numbers are exact, "" a scalar."""

    dtype: str
    dims: str

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple(self.dims.split())


class Frame:
    """What a body sees: each buffer as a `Ptr` attribute, each symbolic dimension as an int64 `Value` attribute."""

    def __init__(self, kernel: Kernel, k: Emitter, slots: Ptr, names: list[str]) -> None:
        self._kernel, self._k, self._slots, self._names = kernel, k, slots, names
        buffers = {**kernel.args, **kernel.results}
        for position, name in enumerate(names):
            is_buffer = name in buffers
            value = slots.pointer_at(position, DTYPES[buffers[name].dtype][1]) if is_buffer else slots[position]
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"kernel {self._kernel.name} has no buffer or dimension {name!r}")

    def require(self, condition: Value, message: str) -> None:
        """Return the error `message` (InvalidArgument) to XLA unless the condition holds. Only before any output."""
        _return_error(self._k, condition ^ 1, f"{self._kernel.name}: {message}")

    def num_threads(self) -> Value:
        """Threads of the pool: for the size of tasks; a result must not depend on it."""
        return Value(self._k, self._k.intrinsic("num_threads", I64, []))

    def parallel(self, count: Value, body: Callable[[Emitter, Frame, Value], None], **extra: Value) -> None:
        """Call body(k, frame, i) for i < count on the thread pool; `extra` int64 values become frame attributes.

        A body is a function of its own: it can reach its frame and nothing else of the caller's run-time values.
        """
        k, module = self._k, self._k.module
        names = list(self._names)
        for name, value in extra.items():
            if name in names:
                position = names.index(name)
            else:
                position, names = len(names), [*names, name]
            if position >= self._kernel.slots:
                raise ValueError(f"kernel {self._kernel.name}: too many extra values")
            self._slots[position] = value
        number = sum(f.name.startswith("task") for f in module.functions)
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I64])
        task = ir.Function(module, kind, f"task{number}")
        inner = Emitter(task, k.target)
        frame = Frame(self._kernel, inner, Ptr(inner, task.args[0], I64), names)
        body(inner, frame, Value(inner, task.args[1]))
        inner.finish()
        k.intrinsic("parallel_run", ir.VoidType(), [task, self._slots.ssa, count.ssa])


@dataclass(frozen=True)
class Kernel:
    """A native kernel.

    Args:
        name: unique, with every static parameter of the body in it; the XLA target is "llm_infer." + name.
        args: buffers in call order; results likewise. A result that `aliases` names is the same memory as that argument.
        body: body(k, frame) runs in the handler and starts the parallel parts. It must write every result.
        sources: the files besides `cpu_ffi` that the machine code depends on.
    """

    name: str
    args: Mapping[str, Buffer]
    results: Mapping[str, Buffer]
    body: Callable[[Emitter, Frame], None]
    sources: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)  # argument → result

    slots = 64

    def build(self, target: Target | None = None) -> ir.Module:
        """The LLVM module: `handler` and one function per parallel part, for this host or another target."""
        target = target or host_target()
        module = ir.Module(self.name)
        module.triple = target.triple
        function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), "handler")
        k = Emitter(function, target)
        call = Ptr(k, function.args[0], I64)
        _answer_metadata(k, call)
        with k.when(call.as_(I32)[8].ne(EXECUTE_STAGE)):
            k.builder.ret(ir.Constant(POINTER, None))
        names = _Checker(self, k, call).run()
        frame_slots = names.pop("")
        self.body(k, Frame(self, k, frame_slots, list(names)))
        k.builder.ret(ir.Constant(POINTER, None))
        k.finish()
        return module

    def register(self) -> str:
        """Compile (or fetch from the cache) and tell XLA about it, once; returns the target's name."""
        return _register(self.name, _KernelByName(self))

    def __call__(self, *args: Any, dims: Mapping[str, int] | None = None) -> tuple[Any, ...]:
        """Call under JAX; returns the results. `dims` gives sizes of symbols that no argument has."""
        sizes = dict(dims or {})
        for value, buffer in zip(args, self.args.values(), strict=True):
            sizes.update({n: int(s) for n, s in zip(buffer.shape, value.shape, strict=False) if not n.isdigit()})
        order = list(self.args)
        out_of = {result: order.index(argument) for argument, result in self.aliases.items()}
        kinds = []
        for buffer in self.results.values():
            shape = tuple(int(n) if n.isdigit() else sizes[n] for n in buffer.shape)
            kinds.append(jax.ShapeDtypeStruct(shape, buffer.dtype))
        aliases = {out_of[name]: position for position, name in enumerate(self.results) if name in out_of}
        return tuple(jax.ffi.ffi_call(self.register(), kinds, input_output_aliases=aliases)(*args))


@dataclass(frozen=True)
class _KernelByName:
    """Compares equal whatever the kernel, so that the registration cache is keyed by name alone."""

    kernel: Kernel = field(compare=False)


@cache
def _register(name: str, holder: _KernelByName) -> str:
    kernel = holder.kernel
    handler = load(name, kernel.sources, kernel.build, ("handler",), thread_pool().symbols)["handler"]
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    target = f"llm_infer.{name}"
    jax.ffi.register_ffi_target(target, new_capsule(handler, None, None), platform="cpu")
    return target


def _answer_metadata(k: Emitter, call: Ptr) -> None:
    """XLA asks for the API version through an extension of the call frame, with nothing else filled in."""
    extension = call.pointer_at(1, I64)
    with k.when(Value(k, k.builder.icmp_unsigned("!=", extension.ssa, ir.Constant(POINTER, None)))):
        with k.when(extension.as_(I32)[2].eq(METADATA_EXTENSION)):
            metadata = extension.pointer_at(3, I32)
            metadata[6] = 0  # api_version.major_version
            metadata[7] = API_MINOR
            metadata[8] = 0  # traits
            metadata.as_(I64)[5] = 0  # state_type_id: no state
            k.builder.ret(ir.Constant(POINTER, None))


def _return_error(k: Emitter, failed: Value, text: str, *found: Value) -> None:
    """Return an InvalidArgument error if `failed`; `text` is a printf format for the int64 values `found`."""
    with k.when(failed, likely=False):
        data = bytearray(text.encode() + b"\0")
        kind = ir.ArrayType(I8, len(data))
        constant = ir.GlobalVariable(k.module, kind, k.module.get_unique_name("message"))
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


class _Checker:
    """Emits the checks of a call frame and gathers pointers and dimensions in one int64 array."""

    def __init__(self, kernel: Kernel, k: Emitter, call: Ptr) -> None:
        self.kernel, self.k, self.call = kernel, k, call
        self.slots = k.scratch(I64, kernel.slots)
        self.names: dict[str, Any] = {}
        self.sizes: dict[str, tuple[Value, str]] = {}

    def run(self) -> dict[str, Any]:
        """Slot names in order, and under "" the array itself."""
        self._group("argument", self.kernel.args, 5)
        self._group("result", self.kernel.results, 10)
        position = {name: i for i, name in enumerate(self.kernel.results)}
        for argument, result in self.kernel.aliases.items():
            same = self.slots[list(self.names).index(argument)].eq(self.slots[list(self.names).index(result)])
            text = f"{self.kernel.name}: argument {argument} and result {position[result]} must be one buffer"
            _return_error(self.k, same ^ 1, text)
        for name, (size, _) in self.sizes.items():
            self._keep(name, size)
        return {**self.names, "": self.slots}

    def _keep(self, name: str, value: Value) -> None:
        if len(self.names) >= self.kernel.slots or name in self.names:
            raise ValueError(f"kernel {self.kernel.name}: {name} is declared twice, or too many buffers")
        self.slots[len(self.names)] = value
        self.names[name] = None

    def _group(self, what: str, buffers: Mapping[str, Buffer], word: int) -> None:
        """Check XLA_FFI_Args or XLA_FFI_Rets, which begins at `word` of the call frame."""
        k, title = self.k, self.kernel.name
        count = self.call[word + 2]
        text = f"{title}: expected {len(buffers)} {what}s, found %lld"
        _return_error(k, count.ne(len(buffers)), text, count)
        kinds, values = self.call.pointer_at(word + 3, I32), self.call.pointer_at(word + 4, I64)
        for i, (name, buffer) in enumerate(buffers.items()):
            label = f"{title}: {what} {name}"
            _return_error(k, kinds[i].ne(BUFFER_KIND), f"{label} is not a buffer")
            record = values.pointer_at(i, I64)
            code, dtype = DTYPES[buffer.dtype][0], record.as_(I32)[4]
            text = f"{label} has XLA_FFI_DataType %lld, expected {code} ({buffer.dtype})"
            _return_error(k, dtype.ne(code), text, dtype.to(I64))
            rank = record[4]
            text = f"{label} has rank %lld, expected {len(buffer.shape)} [{buffer.dims}]"
            _return_error(k, rank.ne(len(buffer.shape)), text, rank)
            sizes = record.pointer_at(5, I64)
            for axis, symbol in enumerate(buffer.shape):
                self._dimension(label, axis, symbol, sizes[axis])
            self._keep(name, record[3])

    def _dimension(self, label: str, axis: int, symbol: str, size: Value) -> None:
        if symbol.isdigit():
            text = f"{label} has size %lld on axis {axis}, expected {symbol}"
            _return_error(self.k, size.ne(int(symbol)), text, size)
        elif symbol in self.sizes:
            expected, where = self.sizes[symbol]
            text = f"{label} has size %lld on axis {axis}, expected {symbol} = %lld as in {where}"
            _return_error(self.k, size.ne(expected), text, size, expected)
        else:
            self.sizes[symbol] = (size, label.split(": ")[1])
