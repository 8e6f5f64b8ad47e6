"""Bytes of training data as text: compressed or not, UTF-8 with or without a byte-order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from bdcli.data.document import UnreadableError

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # what truncated and corrupt files raise


def open_bytes(path: Path) -> BinaryIO:
    """A file to read, decompressed where its suffix asks for that. Raises OSError."""
    opener = COMPRESSED.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path, "rb")


def decode_text(data: bytes) -> str:
    """UTF-8 as text, without a byte-order mark. Raises UnreadableError."""
    if is_utf16(data):
        raise UnreadableError("is UTF-16, not UTF-8 (iconv -f utf-16 -t utf-8 converts it)")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 (byte {error.start})") from None


def is_utf16(data: bytes) -> bool:
    """Whether bytes begin as UTF-16 does: with its mark, or with one zero byte in two."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return marked or (len(data) >= 4 and [byte == 0 for byte in data[:4]] in ([True, False] * 2, [False, True] * 2))


def reason(error: Exception) -> str:
    """What a library said, in one short line."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
