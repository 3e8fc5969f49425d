"""The FFI bridge, the code cache and the thread pool of native CPU kernels, on toy kernels."""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from pallas_kernels.cpu_ffi import compile as native_compile
from pallas_kernels.cpu_ffi import why_not
from pallas_kernels.cpu_ffi.bridge import Frame, Kernel
from pallas_kernels.cpu_ffi.call_frame import DTYPES, Buffer
from pallas_kernels.cpu_ffi.emit import F32, Emitter, Value
from pallas_kernels.cpu_ffi.once import once
from pallas_kernels.cpu_ffi.threads import THREADS_VARIABLE, default_threads, thread_pool
from tests.kernels import native_call

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"native CPU kernels: {why_not()}")


def scale_body(k: Emitter, a: Frame) -> None:
    a.require(a.N >= 2, "argument x has fewer than 2 columns")

    def row(k: Emitter, a: Frame, i: Value) -> None:
        with k.range(0, a.N) as j:
            a.y[i * a.N + j] = a.x[i * a.N + j] * a.s[0].to(F32) + a.twice.to(F32)

    a.parallel(a.M, row, twice=a.N * 2)


SCALE = Kernel(
    name="test_scale",
    args={"x": Buffer("float32", "M N"), "s": Buffer("int32", "")},
    results={"y": Buffer("float32", "M N")},
    body=scale_body,
    sources=(__file__,),
)


def math_body(k: Emitter, a: Frame) -> None:
    with k.range(0, a.N, 8) as i:
        x = a.x.load(i, 8)
        a.e.store(i, k.exp(x))
        a.b.store(i, k.f32_to_bf16(x))
        a.w.store(i, k.bf16_to_f32(k.f32_to_bf16(x)))
        a.r.store(i, k.round_even(x))
    sums = [a.x.load(8 * i, 8) for i in range(4)]
    a.t.store(0, k.sum4(sums))
    for i, vector in enumerate(sums):
        a.t[4 + i] = k.sum_lanes(vector)
        a.t[8 + i] = k.max_lanes(vector)


MATH = Kernel(
    name="test_math",
    args={"x": Buffer("float32", "N")},
    results={
        "e": Buffer("float32", "N"), "b": Buffer("uint16", "N"), "w": Buffer("float32", "N"),
        "r": Buffer("float32", "N"), "t": Buffer("float32", "12"),
    },
    body=math_body,
    sources=(__file__,),
)  # fmt: skip


def test_a_kernel_runs_under_jit_and_in_a_scan():
    x = jnp.arange(12.0, dtype=jnp.float32).reshape(4, 3)
    step = jax.jit(lambda x, s: SCALE(x, s)[0])
    np.testing.assert_array_equal(np.asarray(step(x, jnp.int32(5))), np.asarray(x) * 5 + 6)
    many = jax.jit(lambda x: jax.lax.scan(lambda c, s: (SCALE(c, s)[0], None), x, jnp.ones(50, jnp.int32))[0])
    np.testing.assert_array_equal(np.asarray(many(x)), np.asarray(x) + 300)


def test_every_mismatch_is_an_error_that_names_the_argument():
    x, s, target = jnp.ones((4, 3)), jnp.int32(1), SCALE.register()
    y = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    wrong = [
        ("expected 2 arguments, found 1", y, (x,)),
        ("argument x has rank 1, expected 2", y, (x[0], s)),
        (r"argument x has XLA_FFI_DataType 4, expected 11 \(float32\)", y, (x.astype(jnp.int32), s)),
        ("argument s has rank 1, expected 0", y, (x, s[None])),
        ("result y has size 3 on axis 1, expected N = 2 as in argument x", y, (x[:, :2], s)),
        ("result y has XLA_FFI_DataType 4", jax.ShapeDtypeStruct((4, 3), jnp.int32), (x, s)),
        ("expected 1 results, found 2", [y, y], (x, s)),
        ("argument x has fewer than 2 columns", jax.ShapeDtypeStruct((4, 1), jnp.float32), (x[:, :1], s)),
    ]
    for message, result, args in wrong:
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.ffi.ffi_call(target, result)(*args))


def test_only_the_execute_stage_acts_and_the_metadata_query_is_answered():
    x, s, y = np.ones((1, 2), np.float32), np.array(3, np.int32), np.zeros((1, 2), np.float32)
    for stage in (0, 1, 2, 4):
        native_call.call(SCALE, [x, s], [y], stage=stage)
        assert not y.any()
    native_call.call(SCALE, [x, s], [y])
    np.testing.assert_array_equal(y, 3 + 4)

    metadata = (ctypes.c_int64 * 6)(48, -1, -1, -1, -1, -1)
    extension = (ctypes.c_int64 * 4)(32, 1, 0, ctypes.addressof(metadata))
    frame = (ctypes.c_int64 * 20)(160, ctypes.addressof(extension))
    assert not native_call.handler(SCALE)(ctypes.addressof(frame))
    assert metadata[3] == 3 << 32 and metadata[5] == 0  # version 0.3, no state


def test_call_frame_offsets_are_those_of_the_header():
    """The fields that the bridge reads, in the order of this jaxlib's c_api.h."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()

    def fields(struct: str) -> list[str]:
        body = header.split(f"struct {struct} {{")[1].split("\n};")[0]
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        return [line.rstrip(";").replace("*", " ").split()[-1] for line in lines if line.endswith(";")]

    head = ["struct_size", "extension_start"]
    assert fields("XLA_FFI_CallFrame")[:7] == [*head, "api", "ctx", "stage", "args", "rets"]
    assert fields("XLA_FFI_Args") == [*head, "size", "types", "args"]
    assert fields("XLA_FFI_Rets") == [*head, "size", "types", "rets"]
    assert fields("XLA_FFI_Buffer") == [*head, "dtype", "data", "rank", "dims"]
    assert fields("XLA_FFI_Error_Create_Args") == [*head, "message", "errc"]
    assert fields("XLA_FFI_Api_Version")[2:] == ["major_version", "minor_version"]
    assert fields("XLA_FFI_Metadata") == ["struct_size", "api_version", "traits", "state_type_id"]
    api = header.split("struct XLA_FFI_Api {")[1]
    assert api.split("_XLA_FFI_API_STRUCT_FIELD(")[1].startswith("XLA_FFI_Error_Create)")
    names = {"float32": "F32", "int32": "S32", "uint8": "U8", "int8": "S8", "bfloat16": "BF16", "float16": "F16",
             "uint16": "U16", "int64": "S64", "float8_e4m3fn": "F8E4M3FN", "float8_e5m2": "F8E5M2"}  # fmt: skip
    for name, (code, _) in DTYPES.items():
        assert f"XLA_FFI_DataType_{names[name]} = {code}," in header


def test_amx_is_left_alone_where_the_system_does_not_give_it(monkeypatch):
    features = native_compile.llvm.get_host_cpu_features()
    monkeypatch.setattr(native_compile.llvm, "get_host_cpu_features", lambda: features)
    features.update({"amx-tile": True, "amx-int8": True})
    make = native_compile.host_target.__wrapped__
    for given in (True, False):
        monkeypatch.setattr(native_compile, "_may_use_amx", lambda given=given: given)
        assert [make().has(name) for name in ("amx-tile", "amx-int8")] == [given, given]


def test_vector_functions():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-90, 88, 4000), rng.uniform(-1, 1, 960), [0, -0.0, -1e30, 0.5, 1.5, 2.5, -0.5, 3e-39]]
    )
    x = x.astype(np.float32)
    n = len(x)
    e, b, w, r, t = native_call.call(
        MATH, [x], [np.empty(n, np.float32), np.empty(n, np.uint16), *(np.empty(n, np.float32) for _ in "wr"),
                    np.empty(12, np.float32)],
    )  # fmt: skip
    exact = np.exp(x.astype(np.float64))
    normal = exact > 2.0**-125
    assert (np.abs(e - exact)[normal] <= 2.5e-7 * exact[normal]).all() and (e[~normal] <= 2.0**-124).all()
    assert e[x == 0].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(b, np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).view(np.uint16))
    np.testing.assert_array_equal(w, np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float32))
    np.testing.assert_array_equal(r, np.rint(x))
    np.testing.assert_array_equal(t[:4], t[4:8])
    np.testing.assert_allclose(t[:4], x[:32].reshape(4, 8).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(t[8:], x[:32].reshape(4, 8).max(1))


def test_threads_are_one_setting(monkeypatch):
    monkeypatch.setenv(THREADS_VARIABLE, "3")
    assert default_threads() == 3
    monkeypatch.setenv(THREADS_VARIABLE, "none")
    with pytest.raises(ValueError, match=THREADS_VARIABLE):
        default_threads()
    pool = thread_pool()
    before, alive = pool.threads, threading.active_count()
    with pytest.raises(ValueError, match="at least 1"):
        pool.set_threads(0)
    x, y = np.ones((64, 2), np.float32), np.zeros((64, 2), np.float32)
    for threads in (4, 1, 2, before):
        pool.set_threads(threads)
        for _ in range(200):
            y[:] = 0
            native_call.call(SCALE, [x, np.array(2, np.int32)], [y])
            assert (y == 6).all()
    assert threading.active_count() == alive  # helpers are not Python threads


def halve_body(k: Emitter, a: Frame) -> None:
    def row(k: Emitter, a: Frame, i: Value) -> None:
        with k.range(0, a.N) as j:
            a.y[i * a.N + j] = a.x[i * a.N + j] * 0.5

    a.parallel(a.M, row)


ROWS = Buffer("float32", "M N")
HALVE = Kernel(name="test_halve", args={"x": ROWS}, results={"y": ROWS}, body=halve_body, sources=(__file__,))


def test_helpers_take_denormal_floats_as_their_caller_does() -> None:
    """XLA's threads take them as 0; new threads do not."""
    pool = thread_pool()
    before = pool.threads
    pool.set_threads(3)
    x = jnp.full((64, 20_000), 1e-39, jnp.float32)
    native, expected = jax.jit(lambda x: HALVE(x)[0]), jax.jit(lambda x: x * 0.5)(x)
    for _ in range(10):
        np.testing.assert_array_equal(native(x), expected)
    pool.set_threads(before)


def test_many_callers_at_once_run_alone_or_helped():
    """Every caller gets its own result while all of them want the helpers."""
    pool = thread_pool()
    before = pool.threads
    pool.set_threads(3)
    failures: list[int] = []

    def caller(number: int) -> None:
        x, y = np.full((37, 5), number, np.float32), np.zeros((37, 5), np.float32)
        for _ in range(300):
            y[:] = 0
            native_call.call(SCALE, [x, np.array(1, np.int32)], [y])
            if not (y == number + 10).all():
                failures.append(number)

    workers = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    pool.set_threads(before)
    assert not failures


def test_object_files_are_cached_and_a_damaged_one_is_built_again(tmp_path, monkeypatch):
    symbols = thread_pool().symbols  # made before, or its code would be in the folder too
    monkeypatch.setenv(native_compile.CACHE_VARIABLE, str(tmp_path))
    builds = []

    def build():
        builds.append(1)
        return SCALE.build()

    def load() -> int:
        return native_compile.load("test_cache", (__file__,), build, ("handler",), symbols)["handler"]

    assert load() and load() and len(builds) == 1
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert load() and len(builds) == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_fresh_process_needs_neither_numba_nor_a_compiler(tmp_path):
    """From a cold cache with one thread; then from the warm one with building forbidden, and sleeping helpers at exit."""
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import jax.numpy as jnp\n"
        "from pallas_kernels.quant_matmul.cpu import quant_matmul\n"
        "from pallas_kernels.cpu_ffi import compile\n"
        "if sys.argv[1] == 'warm': compile.emit_object = None\n"
        "x, blocks = jnp.ones((1, 32)), jnp.zeros((1, 4, 34), jnp.uint8)\n"
        "print(quant_matmul(x, blocks, jnp.int32(0), kind='q8_0').tolist())\n"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), native_compile.CACHE_VARIABLE: str(tmp_path)}
    for when, threads in (("cold", "1"), ("warm", "3")):
        command, environ[THREADS_VARIABLE] = [sys.executable, "-c", program, when], threads
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.strip() == "[[0.0, 0.0, 0.0, 0.0]]", done.stderr[-2000:]


def test_threads_that_ask_at_once_get_one_kernel():
    made = []

    @once
    def make(name: str) -> str:
        time.sleep(0.05)
        made.append(name)
        return name

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, ["a", "b"] * 8)) == ["a", "b"] * 8
    assert sorted(made) == ["a", "b"]


def test_threads_that_meet_register_a_kernel_once() -> None:
    kernel = Kernel("test_scale_raced", SCALE.args, SCALE.results, scale_body, (__file__,))
    start, names = threading.Barrier(4), []

    def register() -> None:
        start.wait()
        names.append(kernel.register())

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["llm_infer.test_scale_raced"] * 4


def kernels() -> dict[str, Kernel]:
    from pallas_kernels.draw_tokens.cpu import _kernel as draw_kernel
    from pallas_kernels.paged_attention import cpu as attention
    from pallas_kernels.quant_matmul import cpu as matmul
    from pallas_kernels.row_sums.cpu import _kernel as sums_kernel

    made = (
        sums_kernel("squares"),
        draw_kernel(),
        attention.attention_kernel(64, "float32", False, False, False),
        matmul.matmul_kernel("q4_1"),
        matmul.int8_kernel("q8_0"),
        matmul.tiles_kernel("q4_1", "fast"),
    )
    return {kernel.name: kernel for kernel in made}


@pytest.mark.parametrize("name", kernels())
def test_the_cache_knows_all_files_that_a_kernel_is_written_by(name: str) -> None:
    """What a source imports of this package, beside `cpu_ffi` (always in the key), is a source too: else old code is used."""
    sources = {Path(path).resolve() for path in kernels()[name].sources}
    root = Path(native_compile.__file__).parents[2]
    imports = [
        node for path in sources for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    modules = {node.module or "" for node in imports if not (node.module or "").startswith("pallas_kernels.cpu_ffi")}
    needed = {root / f"{module.replace('.', '/')}.py" for module in modules if module.startswith("pallas_kernels.")}
    assert needed <= sources, needed - sources
