"""A GGUF file, split or whole: metadata, where each tensor is, and its bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads it too, but takes seconds
for the header of a small model, since it makes an array of each token.
"""

from __future__ import annotations

import functools
import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.model.gguf.blocks import ENCODINGS, Encoding

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT_BYTES = 32  # where general.alignment does not say otherwise
_MAX_DIMENSIONS = 4
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_INTACT = "Download it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is. `shape` in the order of torch: rows first, the stored row last."""

    name: str
    path: Path
    shape: tuple[int, ...]
    kind: int  # of ggml_type
    start: int  # byte in the file

    @property
    def encoding(self) -> Encoding:
        return ENCODINGS[self.kind]

    @property
    def kind_name(self) -> str:
        known = ENCODINGS.get(self.kind)
        return known.name if known else _OTHER_TYPES.get(self.kind, f"of number {self.kind}")

    def read(self) -> Tensor:
        """Its bytes, uint8 [rows, bytes of a row]."""
        row_bytes = self.encoding.row_bytes(self.shape[-1])
        rows = prod(self.shape[:-1])
        # mode c: private to this process, so that torch does not warn of memory that cannot be written
        flat = np.memmap(self.path, np.uint8, "c", self.start, (rows * row_bytes,))
        return torch.from_numpy(flat).view(rows, row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """What the headers of a file and of its further parts say."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type, default: object = None):
        """A value of the metadata. Raises UserError where it is not of type `kind`."""
        value = self.metadata.get(key, default)
        if value is not default and not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}", _INTACT)
        return value


def parts(path: Path) -> list[Path]:
    """The files of a model of which `path` is any part, in order; a file that is not split is alone.

    Raises UserError naming a part that is missing.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    stem, _, count = named.groups()
    files = [path.with_name(f"{stem}-{number:05}-of-{count}{SUFFIX}") for number in range(1, int(count) + 1)]
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None or path not in files:
        raise UserError(f"{missing or path} is missing: the model has {int(count)} parts", "Download all of them")
    return files


def open_gguf(path: Path) -> GgufFile:
    """Headers of all parts of a model; the last few are remembered while their files do not change.

    Raises UserError where a file is damaged, cut short, or no GGUF file of a version that is read here.
    """
    files = parts(path)
    try:
        stamps = tuple((info.st_size, info.st_mtime_ns) for info in (file.stat() for file in files))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "Give a GGUF file") from None
    return _open(tuple(files), stamps)


@functools.lru_cache(maxsize=4)
def _open(files: tuple[Path, ...], _stamps: tuple[tuple[int, int], ...]) -> GgufFile:
    metadata, tensors = _read_header(files[0])
    file = GgufFile(files[0], metadata, tensors)
    count = file.get("split.count", int, 1)
    if count != len(files) and count > 1:
        raise UserError(
            f"{files[0]} is one of {count} parts", f"Name them as they were made: NAME-00001-of-{count:05}{SUFFIX}"
        )
    for part in files[1:]:
        for name, tensor in _read_header(part)[1].items():
            if name in tensors:
                raise UserError(f"{part}: tensor {name} is in another part too", _INTACT)
            tensors[name] = tensor
    wanted = file.get("split.tensors.count", int, len(tensors))
    if wanted != len(tensors):
        raise UserError(f"{files[0]}: its parts have {len(tensors)} tensors, not {wanted}", "Download all parts again")
    return file


def _read_header(path: Path) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file", _INTACT)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Reader(data))
    except (_Damaged, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is damaged or truncated ({str(error) or type(error).__name__})", _INTACT) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "Give a GGUF file") from None


class _Damaged(Exception):
    """The header says something that cannot be."""


def _parse(path: Path, reader: _Reader) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    version = reader.scalar("<I")
    if version not in _VERSIONS:
        what = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise UserError(f"{path} {what}", "Convert the model again with a present llama.cpp")
    tensor_count, field_count = reader.scalar("<Q"), reader.scalar("<Q")
    metadata: dict[str, object] = {}
    for _ in range(field_count):
        key = reader.string()
        if key in metadata:
            raise _Damaged(f"two fields {key}")
        metadata[key] = reader.value(reader.scalar("<I"))
    entries = [_read_entry(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT_BYTES)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"alignment {alignment}")
    data_start = -(-reader.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        tensor = StoredTensor(name, path, shape, kind, data_start + offset)
        if name in tensors:
            raise _Damaged(f"two tensors {name}")
        if kind in ENCODINGS and tensor.start + prod(shape[:-1]) * tensor.encoding.row_bytes(shape[-1]) > reader.size:
            raise _Damaged(f"it ends before tensor {name} does")
        tensors[name] = tensor
    return metadata, tensors


def _read_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, dimensions = reader.string(), reader.scalar("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"tensor {name} of {dimensions} dimensions")
    shape = tuple(reversed([reader.scalar("<Q") for _ in range(dimensions)]))
    kind, offset = reader.scalar("<I"), reader.scalar("<Q")
    known = ENCODINGS.get(kind)
    if known is not None and (0 in shape or shape[-1] % known.block_weights):
        raise _Damaged(f"tensor {name} of shape {shape} in blocks of {known.block_weights}")
    return name, shape, kind, offset


class _Reader:
    """Reads a header from its beginning; `at` is the next byte. What lies beyond the end is an error."""

    def __init__(self, data: mmap.mmap):
        self._data, self.size = data, len(data)
        self.at = 4

    def scalar(self, form: str) -> int | float | bool:
        (found,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return found

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _Damaged("it ends within the header")
        self.at += count
        return self._data[self.at - count : self.at]

    def string(self) -> str:
        return self.bytes(self.scalar("<Q")).decode("utf-8")

    def value(self, kind: int) -> object:
        """One metadata value. 32-bit floats come as the shortest number that rounds to them: 1e-05, not 9.99...e-06."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _Damaged(f"a field of unknown type {kind}")
        found = self.scalar(_SCALARS[kind])
        return float(str(np.float32(found))) if kind == _FLOAT32 else found

    def _array(self) -> list:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            whole = self.bytes(count * struct.calcsize(_SCALARS[kind]))
            return np.frombuffer(whole, np.dtype(_SCALARS[kind])).tolist()
        if count > self.size - self.at:
            raise _Damaged("it ends within the header")
        return [self.value(kind) for _ in range(count)]
