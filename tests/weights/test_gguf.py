"""The GGUF reader: values equal to the `gguf` package's, and no damage leads to anything but a ModelError."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from llm_infer.base.errors import ModelError
from llm_infer.models.opened import gguf_model
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.gguf_blocks import _OWN, block_format
from tests.weights.tiny_models import hf_tensors, write_gguf

T = GGMLQuantizationType
TRIALS = 1200  # damaged headers, about 3 s; 40,000 passed when this was written


def _write(path: Path, tensors: dict[str, tuple[np.ndarray, T]], **scalars: int) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in scalars.items():
        writer.add_uint32(key, value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for type_id, own in _OWN.items():
        assert own.name == T(type_id).name
        assert (own.block_size, own.block_bytes) == GGML_QUANT_SIZES[T(type_id)]
    assert block_format(T.Q6_K).name == "Q6_K"  # type: ignore[union-attr]
    assert block_format(9999) is None


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q8_0, T.Q5_1, T.TQ2_0])
def test_values_equal_the_reference_bit_for_bit(tmp_path: Path, kind: T) -> None:
    # 1100 rows of 256 are more than one chunk.
    values = np.random.default_rng(0).standard_normal((1100, 256)).astype(np.float32)
    raw = quantize(values, kind)
    file = GGUFFile(_write(tmp_path / "a.gguf", {"w": (raw, kind)}))
    tensor = file.tensors["w"]
    expected = dequantize(raw, kind)
    assert tensor.shape == (1100, 256) and tensor.type == kind.name
    np.testing.assert_array_equal(tensor.blocks, raw.view(np.uint8))
    assert not tensor.blocks.flags.writeable

    out = np.empty(tensor.shape, np.float32)
    tensor.read_into(out)
    np.testing.assert_array_equal(out, expected)

    order = np.random.default_rng(1).permutation(1100)
    tensor.read_into(out, order)
    np.testing.assert_array_equal(out, expected[order])

    wide = np.zeros((1100, 300), ml_dtypes.bfloat16)  # another type, and rows that are not contiguous
    tensor.read_into(wide[:, 20:276])
    np.testing.assert_array_equal(wide[:, 20:276], expected.astype(ml_dtypes.bfloat16))
    assert not wide[:, :20].any() and not wide[:, 276:].any()


def test_vectors_and_tensors_of_three_axes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vector, experts = rng.standard_normal(7).astype(np.float32), rng.standard_normal((3, 5, 32)).astype(np.float32)
    raw = quantize(experts, T.Q8_0)
    file = GGUFFile(_write(tmp_path / "a.gguf", {"v": (vector, T.F32), "x": (raw, T.Q8_0)}))
    out = np.empty(7, np.float32)
    file.tensors["v"].read_into(out)
    np.testing.assert_array_equal(out, vector)
    file.tensors["v"].read_into(out, np.arange(7)[::-1])
    np.testing.assert_array_equal(out, vector[::-1])
    out = np.empty((3, 5, 32), np.float32)
    file.tensors["x"].read_into(out)
    np.testing.assert_array_equal(out, dequantize(raw, T.Q8_0))
    with pytest.raises(ValueError, match="expected"):
        file.tensors["x"].read_into(np.empty((5, 3, 32), np.float32))


def test_a_type_nobody_can_read_is_named(tmp_path: Path) -> None:
    kind = T.Q8_1
    width = GGML_QUANT_SIZES[kind][1]
    file = GGUFFile(_write(tmp_path / "a.gguf", {"w": (np.zeros((2, width), np.uint8), kind)}))
    with pytest.raises(ModelError, match="Q8_1 cannot be read"):
        file.tensors["w"].read_into(np.empty(file.tensors["w"].shape, np.float32))


def test_metadata_of_every_type(tmp_path: Path) -> None:
    scalars = {
        GGUFValueType.UINT8: 200,
        GGUFValueType.INT8: -3,
        GGUFValueType.UINT16: 60000,
        GGUFValueType.INT16: -30000,
        GGUFValueType.UINT32: 4_000_000_000,
        GGUFValueType.INT32: -5,
        GGUFValueType.FLOAT32: 0.5,
        GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "grüße 漢字",
        GGUFValueType.UINT64: 1 << 63,
        GGUFValueType.INT64: -(1 << 62),
        GGUFValueType.FLOAT64: 0.1,
    }
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    for kind, value in scalars.items():
        writer.add_key_value(f"scalar.{kind.name}", value, kind)
        writer.add_key_value(f"array.{kind.name}", [value, value], GGUFValueType.ARRAY, sub_type=kind)
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    for kind, value in scalars.items():
        found = metadata[f"scalar.{kind.name}"]
        assert found == value and type(found) is type(value)
        array = metadata[f"array.{kind.name}"]
        assert list(array) == [value, value]
        assert isinstance(array, list if kind == GGUFValueType.STRING else np.ndarray)
    assert [list(inner) for inner in metadata["nested"]] == [[1, 2], [3]]


def _use(path: Path) -> None:
    """All that a model's start does with a file."""
    file = GGUFFile(path)
    gguf_model(file)[0]
    source = gguf_model(file)[1]
    for name in source.names:
        source.read_into(name, np.empty(source.shape(name), np.float32))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A valid file of several block types, and where its tensor data begin."""
    tensors = {n: t for n, t in hf_tensors().items() if "layers.1" not in n and "mlp" not in n}
    kinds = [T.Q4_1, T.Q8_0, T.F16, T.Q4_0]
    types = {n: kinds[i % 4] for i, n in enumerate(tensors) if "norm" not in n}
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", tensors, types, rope_factors=np.ones(8))
    _use(path)
    return path.read_bytes(), min(tensor.data_offset for tensor in GGUFReader(path).tensors)


def test_every_truncation_is_a_model_error(tmp_path: Path, small: tuple[bytes, int]) -> None:
    data, data_start = small
    path = tmp_path / "cut.gguf"
    cuts = [*range(0, data_start, 5), *range(data_start, len(data) - 32, 997), len(data) - 33]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ModelError) as caught:
            _use(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), cut


def test_damaged_headers_are_model_errors_or_still_readable(tmp_path: Path, small: tuple[bytes, int]) -> None:
    data, data_start = small
    rng = random.Random(0)
    path = tmp_path / "flip.gguf"
    refused = 0
    for trial in range(TRIALS):
        damaged = bytearray(data)
        for _ in range(1 + trial % 3):
            position = rng.randrange(data_start)
            damaged[position] ^= 1 << rng.randrange(8) if trial % 2 else rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            _use(path)
        except ModelError:
            refused += 1
    assert refused > TRIALS / 4


def _header(
    *, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b""
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _tensor(name: bytes, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (_header(version=1), "version 1"),
        (_header(version=3 << 24), "big-endian"),
        (_header(tensors=1 << 60), "announces 1152921504606846976 tensors"),
        (_header(entries=1 << 63, rest=bytes(100)), "metadata entries"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(9)), "strings"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62) + bytes(9)), "numbers"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<IQ", 8, 1 << 50) + bytes(9)), "cut short"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<I", 8) + _string(b"\xff\xfe")), "not UTF-8"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<IIQ", 9, 8, 1) + _string(b"\xff")), "not UTF-8"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<I", 77) + bytes(8)), "unknown metadata type 77"),
        (_header(entries=1, rest=_string(b"k" * 70000) + bytes(8)), "the format allows 65535"),
        (_header(entries=1, rest=_string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "nested"),
        (_header(entries=2, rest=(_string(b"k") + struct.pack("<IB", 0, 1)) * 2), "'k' occurs twice"),
        (_header(tensors=2, rest=_tensor(b"w", 8) + _tensor(b"w", 8, offset=32) + bytes(200)), "'w' occurs twice"),
        (_header(tensors=2, rest=_tensor(b"v", 64) + _tensor(b"w", 8, offset=32) + bytes(900)), "overlap"),
        (_header(tensors=1, rest=_tensor(b"w", 8, offset=1 << 50) + bytes(90)), "cut short"),
        (_header(tensors=1, rest=_tensor(b"w", 1 << 40, 1 << 40) + bytes(90)), "cut short"),
        (_header(tensors=1, rest=_tensor(b"w", 8, offset=3) + bytes(90)), "multiple of 32"),
        (_header(tensors=1, rest=_tensor(b"w", 8, 0) + bytes(90)), r"shape \[0, 8\]"),
        (_header(tensors=1, rest=_tensor(b"w", 33, kind=3) + bytes(90)), "Q4_1 blocks of 32"),
        (_header(tensors=1, rest=_tensor(b"w", 8, kind=999) + bytes(90)), "unknown type 999"),
        (_header(tensors=1, rest=_tensor(b"w", 1, 1, 1, 1, 1) + bytes(90)), "5 dimensions"),
        (
            _header(entries=1, rest=_string(b"general.alignment") + struct.pack("<II", 4, 24) + bytes(9)),
            "power of two",
        ),
        (_header(entries=1, rest=_string(b"split.count") + struct.pack("<IH", 2, 3)), "one of 3 parts"),
    ],
    ids=repr,
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")


def test_metadata_and_directory_equal_the_reference_reader(tmp_path: Path, small: tuple[bytes, int]) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small[0])
    file, reference = GGUFFile(path), GGUFReader(path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            found = file.metadata[key]
            assert (list(found) if isinstance(found, np.ndarray) else found) == field.contents(), key
    for tensor in reference.tensors:
        own = file.tensors[tensor.name]
        assert own.shape == tuple(int(n) for n in tensor.shape[::-1]) and own.type == tensor.tensor_type.name
        np.testing.assert_array_equal(own.blocks.reshape(-1), tensor.data.view(np.uint8).reshape(-1))


@pytest.mark.real
def test_the_default_model_parses_fast(default_gguf: Path) -> None:
    GGUFFile(default_gguf)  # the first time also brings the file into memory
    started = time.process_time()
    file = GGUFFile(default_gguf)
    seconds = time.process_time() - started
    print(f"header parsed in {seconds:.3f} s of CPU time")
    assert seconds < 0.5  # 0.1 s on an idle core; the bound only has to tell it from GGUFReader's 2 s and more
    assert len(file.tensors) == 272 and file.version == 3
    tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    assert (len(tokens), tokens[:2], tokens[28]) == (49152, ["<|endoftext|>", "<|im_start|>"], ",")
    assert (len(merges), merges[0]) == (48900, "Ġ t")
    assert file.metadata["tokenizer.ggml.token_type"].shape == (49152,)
    embedding = file.tensors["token_embd.weight"]
    assert (embedding.shape, embedding.type, embedding.blocks.shape) == ((49152, 576), "Q8_0", (49152, 612))


def _parts(tmp_path: Path) -> list[Path]:
    """A model of five tensors in parts of two, as llama.cpp's tools write it."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"w{index}", np.full((2, 32), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("m-*.gguf"))


def test_a_model_in_several_parts_is_one_model(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    file = GGUFFile(parts[0])
    for index in range(5):
        values = np.empty((2, 32), np.float32)
        file.tensors[f"w{index}"].read_into(values)
        assert (values == index).all()
    assert len(file.tensors) == 5 and file.metadata["general.architecture"] == "llama"
    with pytest.raises(ModelError, match=r"part 2 of 3 of a model: give the first, .*/m-00001-of-00003\.gguf"):
        GGUFFile(parts[1])
    first, second = (path.read_bytes() for path in parts[:2])
    for content, message in (
        (first, r"00002-of-00003.gguf: metadata split.no=0, expected 1: a file of another model\?"),
        (second.replace(b"w2", b"w0"), "00002-of-00003.gguf: tensor 'w0' is in another part of the model, too"),
    ):
        parts[1].write_bytes(content)
        with pytest.raises(ModelError, match=message):
            GGUFFile(parts[0])
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"00002-of-00003.gguf: cannot be read \(No such file"):
        GGUFFile(parts[0])
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(
        ModelError, match=r"one of 3 parts of a model: expected a name that ends in -00001-of-00003.gguf"
    ):
        GGUFFile(renamed)
