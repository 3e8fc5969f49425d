"""Native CPU kernels as XLA custom calls: declare the buffers, write the body, get a JAX function.

A kernel's handler answers the metadata query, acts at the EXECUTE stage only, checks count, dtype, rank and
sizes of every buffer (a symbolic dimension must agree everywhere) and returns an `XLA_FFI_Error` that names kernel and
argument; only then does a body see a pointer.

    def body(k: Emitter, a: Frame) -> None:
        def row(k: Emitter, a: Frame, i: Value) -> None:  # runs on the thread pool
            with k.range(0, a.N) as j:
                a.y[i * a.N + j] = a.x[i * a.N + j] * 2.0

        a.parallel(a.M, row)

    rows = {"x": Buffer("float32", "M N")}
    double = Kernel("double", rows, {"y": rows["x"]}, body, sources=(__file__,))
    (y,) = double(x)  # under jit, scan, shard_map; vmap calls it once for each member, see `batches` for rows
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from llvmlite import ir

from pallas_kernels.cpu_ffi.call_frame import (
    DTYPES,
    Buffer,
    Checker,
    answer_metadata,
    return_error,
    return_unless_execute,
)
from pallas_kernels.cpu_ffi.compile import Target, host_target, load
from pallas_kernels.cpu_ffi.emit import I64, POINTER, Emitter, Ptr, Value
from pallas_kernels.cpu_ffi.once import once
from pallas_kernels.cpu_ffi.threads import thread_pool


class Frame:
    """A body's view of the call: each buffer as a `Ptr` attribute, each symbolic dimension as an int64 `Value` attribute."""

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
        """Returns the error `message` (InvalidArgument) to XLA unless the condition holds; only before any output is written."""
        return_error(self._k, condition ^ 1, f"{self._kernel.name}: {message}")

    def num_threads(self) -> Value:
        """Returns the number of the pool's threads, for the size of tasks; a result must not depend on it."""
        return Value(self._k, self._k.intrinsic("num_threads", I64, []))

    def parallel(self, count: Value, body: Callable[[Emitter, Frame, Value], None], **extra: Value) -> None:
        """Calls body(k, frame, i) for i < count on the thread pool; `extra` int64 values become frame attributes.

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
        name: unique name, with every static parameter of the body in it; the XLA target is "llm_infer." + name.
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
        """Builds the LLVM module: `handler` and one function per parallel part, for this host or another target."""
        target = target or host_target()
        module = ir.Module(self.name)
        module.triple = target.triple
        function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), "handler")
        k = Emitter(function, target)
        call = Ptr(k, function.args[0], I64)
        answer_metadata(k, call)
        return_unless_execute(k, call)
        slots = k.scratch(I64, self.slots)
        checker = Checker(k, call, self.name, slots, self.slots)
        checker.run(self.args, self.results, self.aliases)
        self.body(k, Frame(self, k, slots, checker.names))
        k.builder.ret(ir.Constant(POINTER, None))
        k.finish()
        return module

    def register(self) -> str:
        """Compiles the kernel (or fetches it from the cache) and registers it with XLA, once; returns the target's name."""
        return _register(self.name, _KernelByName(self))

    def __call__(self, *args: Any, dims: Mapping[str, int] | None = None) -> tuple[Any, ...]:
        """Calls the kernel under JAX and returns the results. `dims` gives the sizes of symbols that no argument has."""
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
        call = jax.ffi.ffi_call(self.register(), kinds, input_output_aliases=aliases, vmap_method="sequential")
        return tuple(call(*args))


@dataclass(frozen=True)
class _KernelByName:
    """A kernel that equals all others, so that the registration cache is keyed by name alone."""

    kernel: Kernel = field(compare=False)


@once
def _register(name: str, holder: _KernelByName) -> str:
    kernel = holder.kernel
    handler = load(name, kernel.sources, kernel.build, ("handler",), thread_pool().symbols)["handler"]
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    target = f"llm_infer.{name}"
    jax.ffi.register_ffi_target(target, new_capsule(handler, None, None), platform="cpu")
    return target
