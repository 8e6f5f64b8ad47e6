"""Text files, read in one way everywhere: prompts, documents of training and measuring, members of archives.

Text is UTF-8. A byte-order mark is dropped; nothing else is changed, line ends and white space included. What is not
UTF-8 is refused with the command that converts it.
"""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path
from typing import BinaryIO

from bdcli.base.errors import UserError

LARGEST_TEXT_BYTES = 1 << 30
MARKS = {  # byte-order marks, the longest first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNMARKED = ("utf-32le", "utf-32be", "utf-16le", "utf-16be")
_SAMPLE_BYTES = 4096  # a multiple of 4
_SURE_SHARE = 0.95  # of characters that must make sense
_LATIN_SHARE = 0.3  # of bytes beyond ASCII up to which a text may be Latin-1


def read_text(path: Path, limit_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """Text of a UTF-8 file. Raises UserError where it is larger than `limit_bytes` or of another encoding, OSError."""
    with path.open("rb") as file:
        return decode_text(read_bytes(file, str(path), limit_bytes), str(path), path)


def read_bytes(file: BinaryIO, name: str, limit_bytes: int = LARGEST_TEXT_BYTES) -> bytes:
    """All that an open file gives. Raises UserError where that is more than `limit_bytes`."""
    data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise UserError(f"{name} has more than the {limit_bytes / 1e6:.0f} MB that are read at once", "Split it")
    return data


def decode_text(data: bytes, name: str, path: Path | None = None) -> str:
    """`data` as text. `name` is how errors call it, `path` the file that a command could convert.

    Raises UserError on another encoding, which it names where that shows, and on binary data.
    """
    encoding = next((other for mark, other in MARKS.items() if data.startswith(mark)), None) or _unmarked(data)
    if encoding is not None:
        raise UserError(f"{name} is {encoding[:6].upper()}, not UTF-8", _conversion(encoding, path))
    if b"\0" in data:
        raise UserError(f"{name} is a binary file", "Give UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        beyond = sum(byte > 127 for byte in data[:_SAMPLE_BYTES]) / len(data[:_SAMPLE_BYTES])
        latin = beyond <= _LATIN_SHARE or len(data) < 8
        hint = _conversion("latin1" if latin else "ENCODING", path)
        raise UserError(
            f"{name} is not UTF-8 (byte {place})", hint.replace("Convert it", "If it is Latin-1") if latin else hint
        ) from None


def _conversion(encoding: str, path: Path | None) -> str:
    """The command that converts a file, if it is one."""
    if path is None:
        return "Give UTF-8 text"
    return f"Convert it: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > NEW"


def _unmarked(data: bytes) -> str | None:
    """The encoding of UTF-16 or UTF-32 text without a mark, as far as it can be seen; None for anything else."""
    sample = data[:_SAMPLE_BYTES]
    if 4 * sample.count(0) >= len(sample) > 0:
        texts = {encoding: sample.decode(encoding, "replace") for encoding in _UNMARKED}
        good = {e: sum(c != "\ufffd" and (c.isprintable() or c.isspace()) for c in t) for e, t in texts.items()}
        sure = [encoding for encoding, text in texts.items() if good[encoding] >= _SURE_SHARE * len(text)]
        if sure:
            return max(sure, key=lambda encoding: sum(map(str.isascii, texts[encoding])))
    return "utf-16le" if _is_chinese(sample) else None


def _is_chinese(sample: bytes) -> bool:
    """No UTF-8, and nearly all characters of UTF-16 would be kana, Han or white space."""
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end == len(sample) or len(sample) < 8:
            return False  # cut inside a character, or too little to judge by
        text = sample.decode("utf-16le", "replace")
        good = sum("\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" or c.isspace() for c in text)
        return good >= _SURE_SHARE * len(text)
    return False
