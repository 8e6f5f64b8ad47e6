"""Files of training data as documents: which files of a folder are read, and how each kind is."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.texts import decode_text
from bdcli.data.document import Document, Unread, UnreadableError, is_held_out, printable
from bdcli.data.encoding import COMPRESSED, DAMAGED, open_bytes, reason
from bdcli.data.rows import json_rows, parquet_rows

KINDS = (".txt", ".jsonl", ".parquet", ".tar")  # and compressed ones of all but parquet
_SHORT_TARS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}
_OTHER_COMPRESSED = (".zst", ".zip", ".lz4", ".br", ".7z", ".z")
_FILE_TYPES = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def file_kind(name: str) -> str | None:
    """One of KINDS by the suffix, in whatever case and compressed or not; None for a file that is not read."""
    suffixes = [s.lower() for s in Path(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in _SHORT_TARS:
        return ".tar"
    packed = len(suffixes) == 2 and suffixes[-1] in COMPRESSED
    kind = suffixes[-2 if packed else -1] if suffixes else None
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def check_file(path: Path) -> None:
    """Raise UserError where a file is of no kind that is read."""
    if file_kind(path.name) is None:
        packed = ", ".join(COMPRESSED)
        raise UserError(
            f"data source {path} is of no kind that is read", f"Kinds: {', '.join(KINDS)}, with {packed} or without"
        )


def folder_files(root: Path, unread: Unread) -> list[Path]:
    """The files of a folder that are read, in order. Links are followed, and what was found already is left out.

    Hidden files, other kinds, dangling links, pipes and folders that cannot be listed are passed over.
    """
    walk = _Walk(unread)
    walk.folder(root)
    return sorted(walk.found)


class _Walk:
    """Files below folders: first what is there itself, then what links lead to."""

    def __init__(self, unread: Unread):
        self.found: list[Path] = []
        self._unread = unread
        self._seen: set[tuple[int, int]] = set()

    def folder(self, root: Path) -> None:
        linked: list[Path] = []
        self._seen.add(_identity(root.stat()))
        self._list(root, linked)
        for path in linked:  # grows while links lead to further ones
            info = path.stat()
            if _identity(info) in self._seen:
                self._unread.pass_over("link to what is read already", path.name)
                continue
            self._seen.add(_identity(info))
            if stat.S_ISDIR(info.st_mode):
                self._list(path, linked)
            else:
                self.found.append(path)

    def _list(self, root: Path, linked: list[Path]) -> None:
        """Take what stands below a folder; links to files and folders go into `linked`."""
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self._unread.fail(folder, f"cannot be listed ({reason(error)})")
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    self._unread.pass_over("hidden", entry.name)
                elif (info := self._info(entry)) is not None:
                    path = folder / entry.name
                    is_folder = stat.S_ISDIR(info.st_mode)
                    if entry.is_symlink():
                        if is_folder or self._is_read(entry.name, info):
                            linked.append(path)
                    elif is_folder:
                        self._seen.add(_identity(info))
                        folders.append(path)
                    elif self._is_read(entry.name, info):
                        self._seen.add(_identity(info))
                        self.found.append(path)

    def _info(self, entry: os.DirEntry) -> os.stat_result | None:
        try:
            return entry.stat()
        except OSError:
            self._unread.pass_over("dangling link", entry.name)
            return None

    def _is_read(self, name: str, info: os.stat_result) -> bool:
        """Whether a file that is no folder is a regular one of KINDS; else it is passed over."""
        if not stat.S_ISREG(info.st_mode):
            self._unread.pass_over(_FILE_TYPES.get(stat.S_IFMT(info.st_mode), "device"), name)
            return False
        if file_kind(name) is None:
            self._unread.pass_over(_suffix(name), name)
            return False
        return True


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _suffix(name: str) -> str:
    """How a kind of file is called that is not read: its suffix, or two where the last says how it is compressed."""
    suffixes = [s.lower() for s in Path(name).suffixes if re.fullmatch(r"\.[\w~-]{1,12}", s)]
    if not suffixes or not Path(name).suffix:
        return "without a suffix"
    packed = suffixes[-1] in (*COMPRESSED, *_OTHER_COMPRESSED)
    return "".join(suffixes[-2:] if packed else suffixes[-1:])


def file_documents(path: Path, unread: Unread) -> Iterator[Document]:
    """Documents of one file of KINDS, or of the texts in a tar; what cannot be read is counted in `unread`."""
    kind, stem = file_kind(path.name), printable(_stem(path.name))
    if kind == ".parquet":
        yield from parquet_rows(path, unread)
    elif kind == ".tar":
        yield from _tar_documents(path, unread)
    else:
        try:
            with open_bytes(path) as file:
                if kind == ".jsonl":
                    yield from json_rows(stem, file, str(path), unread)
                else:
                    yield _text_document(stem, file.read())
        except UnreadableError as error:
            unread.fail(path, error)
        except DAMAGED as error:
            unread.fail(path, f"cannot be read ({reason(error)})")


def _text_document(name: str, data: bytes) -> Document:
    """A document of a text file's bytes. Raises UnreadableError."""
    try:
        return Document(name, decode_text(data, "it", Path("FILE")), is_held_out(name))
    except UserError as error:
        command = error.hint.partition("iconv")[1:]
        raise UnreadableError(
            error.problem.removeprefix("it ") + (f" ({''.join(command)})" if command[0] else "")
        ) from None


def _tar_documents(path: Path, unread: Unread) -> Iterator[Document]:
    """Documents of the members of a tar: JSON lines, and texts whatever their suffix."""
    number = 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isfile():
                    continue
                if name.startswith("."):
                    unread.pass_over("hidden", name)
                    continue
                number += 1
                where = f"{path}: {member.name}"
                try:
                    with archive.extractfile(member) as file:
                        if file_kind(name) == ".jsonl" and name.lower().endswith(".jsonl"):
                            yield from json_rows(printable(_stem(name)), file, where, unread)
                        else:
                            yield _text_document(printable(Path(name).stem), file.read())
                except UnreadableError as error:
                    unread.fail(where, error)
    except (tarfile.TarError, *DAMAGED) as error:
        unread.fail(path, f"cannot be read{f' beyond member {number}' * (number > 0)} ({reason(error)})")
        return
    if not number:
        unread.fail(path, "holds no file")


def _stem(name: str) -> str:
    """A file's name without its suffix, and without that of its compression."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem
