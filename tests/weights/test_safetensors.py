"""The safetensors reader: values of every type, shards with an index, and damage of every kind."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_infer.base.errors import ModelError
from llm_infer.weights.safetensors_files import INDEX_NAME, SafetensorsFile, SafetensorsSource


def _values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 24))
    return {
        "f32": x.astype(np.float32),
        "bf16": x.astype(ml_dtypes.bfloat16),
        "f16": x.astype(np.float16),
        "f64": x,
        "vector": x[0].astype(np.float32),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "odd": np.arange(5, dtype=np.uint8),
        "cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }


def test_values_and_conversions(tmp_path: Path) -> None:
    values = _values()
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource.from_directory(tmp_path)
    assert set(source.names) == set(values)
    for name, array in values.items():
        assert source.shape(name) == array.shape and source.dtype(name) == array.dtype
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            out = np.empty((*array.shape, 2), dtype)[..., 0]  # strided
            source.read_into(name, out)
            np.testing.assert_array_equal(out, array.astype(dtype), err_msg=f"{name} {dtype}")
    with pytest.raises(ValueError, match="expected"):
        source.read_into("f32", np.empty((24, 40), np.float32))
    source.close()
    assert not list(source.names)


def test_data_that_are_not_aligned_are_read_right(tmp_path: Path) -> None:
    """The format allows a header of any length and tensors of odd sizes before others."""
    header = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["b"] = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [3, 11]}
    text = json.dumps(header).encode()
    values = np.array([[1, -2], [3, 0.5]], ml_dtypes.bfloat16)
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + values.tobytes())
    out = np.empty((2, 2), np.float32)
    SafetensorsSource([tmp_path / "x.safetensors"]).read_into("b", out)
    np.testing.assert_array_equal(out, values.astype(np.float32))


def _shard(directory: Path) -> dict[str, str]:
    values = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    weight_map = {}
    for part, names in enumerate((["w0", "w1"], ["w2", "w3", "w4"]), 1):
        filename = f"model-{part:05}-of-00002.safetensors"
        save_file({name: values[name] for name in names}, directory / filename)
        weight_map |= dict.fromkeys(names, filename)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 320}, "weight_map": weight_map}))
    return weight_map


def test_shards(tmp_path: Path) -> None:
    _shard(tmp_path)
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "unrelated.safetensors")  # not named by the index
    source = SafetensorsSource.from_directory(tmp_path)
    assert sorted(source.names) == ["w0", "w1", "w2", "w3", "w4"]
    out = np.empty((4, 4), np.float32)
    source.read_into("w3", out)
    assert (out == 3).all()


def _write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    weight_map = _shard(tmp_path)
    first = weight_map["w0"]
    _write_index(tmp_path, weight_map | {"w9": first})
    with pytest.raises(ModelError, match=re.escape(f"'w9' in {first}, but it is not there")):
        SafetensorsSource.from_directory(tmp_path)
    _write_index(tmp_path, weight_map | {"w0": "model-00009.safetensors"})
    with pytest.raises(ModelError, match=r"model-00009\.safetensors is missing"):
        SafetensorsSource.from_directory(tmp_path)
    for bad in ("../outside.safetensors", "/etc/passwd", "weights.bin", 7):
        _write_index(tmp_path, {"w0": bad})
        with pytest.raises(ModelError, match="a safetensors file beside it"):
            SafetensorsSource.from_directory(tmp_path)
    for text in ("", "[1]", '{"weight_map": []}', "{"):
        (tmp_path / INDEX_NAME).write_text(text)
        with pytest.raises(ModelError, match=INDEX_NAME):
            SafetensorsSource.from_directory(tmp_path)


def test_several_files_without_an_index_or_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        SafetensorsSource.from_directory(tmp_path)
    _shard(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(ModelError, match="2 safetensors files"):
        SafetensorsSource.from_directory(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    with pytest.raises(ModelError, match="both in"):
        SafetensorsSource([files[0], files[0]])


def _use(path: Path) -> None:
    source = SafetensorsSource([path])
    for name in source.names:
        source.read_into(name, np.empty(source.shape(name), source.dtype(name)))


def test_truncation_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(_values(), path)
    data = path.read_bytes()
    data_start = 8 + int.from_bytes(data[:8], "little")
    for cut in [*range(0, data_start + 40, 3), *range(data_start, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(ModelError) as caught:
            _use(path)
        assert str(path) in str(caught.value), cut
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 3)):
            damaged[rng.randrange(data_start)] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            _use(path)
        except ModelError:
            refused += 1
    assert refused > 200


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ({"a": 1}, "lacks dtype"),
        ({"a": _entry(dtype="F4")}, "type 'F4'"),
        ({"a": _entry(dtype=["F32"])}, "type"),
        ({"a": _entry(shape=(-2,))}, "shape"),
        ({"a": _entry(shape=(2.0,))}, "shape"),
        ({"a": _entry(shape=(True, 2))}, "shape"),
        ({"a": _entry(shape="2")}, "shape"),
        ({"a": _entry(shape=(10**30,))}, "shape"),
        ({"a": _entry(shape=(1,) * 9)}, "shape"),
        ({"a": _entry(shape=(3,))}, "needs 12 bytes"),
        ({"a": _entry(offsets=(8, 0))}, "needs 8 bytes"),
        ({"a": _entry(offsets=(0, 8, 16))}, "lacks"),
        ({"a": _entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, "cut short"),
        ({"a": _entry(), "b": _entry()}, "starts at byte"),
        ({"b": _entry(shape=(1,), offsets=(4, 8))}, "starts at byte"),
        ({"b": _entry(shape=(1,), offsets=(0, 4))}, "its header describes"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SafetensorsFile(_file(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsFile(tmp_path / "absent.safetensors")
