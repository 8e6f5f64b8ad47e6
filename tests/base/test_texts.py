"""Text files of other editors: a mark is dropped, other encodings are named with the command that converts them."""

import itertools
import subprocess

import pytest

from bdcli.base.errors import UserError
from bdcli.base.texts import decode_text, read_text

LATIN = "Zoë's naïve café, and then some more of it.\r\n" * 3
HAN = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 3  # no spaces, no line ends: no zero byte in UTF-16


def test_a_mark_is_dropped_and_nothing_else_changed(tmp_path):
    path = tmp_path / "p.txt"
    for text in ("a\r\nb\r c \n\n", "\ufeff inside \ufeff", "  lead", "日本\n"):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_text(path) == text
        path.write_bytes(text.encode())
        assert read_text(path) == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    "text", [LATIN, HAN, "hi", HAN + "\n"], ids=["latin", "han", "two letters", "han and line end"]
)
@pytest.mark.parametrize("encoding", ["utf-16le", "utf-16be", "utf-32le", "utf-32be"])
def test_utf_16_and_32_are_named_with_the_line_that_converts_them(encoding, text, tmp_path):
    for mark, words in itertools.product(("\ufeff", ""), (text,)):
        path = tmp_path / "my prompt.txt"
        path.write_bytes((mark + words).encode(encoding))
        if not mark and encoding == "utf-16be" and HAN in text:
            continue  # nothing tells it from other encodings
        with pytest.raises(UserError, match=encoding[:6].upper()) as error:
            read_text(path)
        command = error.value.hint.removeprefix("Convert it: ")
        assert f"'{path}'" in command
        converted = tmp_path / "NEW"
        subprocess.run(command.replace("> NEW", f"> '{converted}'"), shell=True, check=True)
        assert read_text(converted) == words


def test_latin_1_is_named_and_standard_input_has_no_command(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(LATIN.encode("latin1"))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 2\). If it is Latin-1: iconv -f latin1 -t utf-8 "):
        read_text(path)
    for data in (LATIN.encode("latin1"), LATIN.encode("utf-16"), HAN.encode("utf-32"), HAN.encode("gb18030")):
        with pytest.raises(UserError) as error:
            decode_text(data, "standard input")
        assert "iconv" not in str(error.value) and "standard input is" in str(error.value)
    path.write_bytes(HAN.encode("gb18030"))
    with pytest.raises(UserError, match="iconv -f ENCODING"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(UserError, match="byte 5"):
        read_text(path)


def test_binary_and_very_large_files_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    for data in (b"\x7fELF\0\0\1", bytes(range(256)) * 9, b"text\0more", b"\0" * 64):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is a binary file"):
            read_text(path)
    path.write_bytes(b"a" * 3_000_001)
    with pytest.raises(UserError, match="has more than the 2 MB that are read at once"):
        read_text(path, limit_bytes=2_000_000)
    assert len(read_text(path, limit_bytes=3_000_001)) == 3_000_001
