"""Prompts: read them, turn them into ids, fit them into the context, cut real ones from the standard library."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.tokenizer import added_ids, check_ids

# Standard-library modules kept out of training (recipes and scripts read this list); prompts come from them.
HELD_OUT = (
    "argparse", "inspect", "tarfile", "typing", "pickletools", "smtplib", "optparse", "difflib", "mailbox",
    "statistics", "calendar", "configparser", "shutil", "subprocess", "doctest", "zipfile",
)  # fmt: skip


def read_prompt(source: str) -> str:
    """Text of a UTF-8 file, or of standard input for `-`. Nothing is stripped."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except FileNotFoundError:
        hint = "Write one with: bdcli prompt --ctx 4k --out prompt.txt"
        raise UserError(f"prompt file {source} does not exist", hint) from None
    except IsADirectoryError:
        raise UserError(f"{source} is a folder", "Give a text file, or - for standard input") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})", "Give a readable text file") from None
    if not data:
        raise UserError(f"the prompt from {name} is empty", "Write one with: bdcli prompt --ctx 4k --out prompt.txt")
    if b"\0" in data:
        raise UserError(f"{name} is a binary file", "Give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = f"Convert it: iconv -f latin1 -t utf-8 {source}"
        raise UserError(f"{name} is not UTF-8 (byte {error.start})", hint) from None


def encode(tokenizer, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt. The tokenizer alone decides about BOS and the chat template.

    An EOS that it appends is left out: nobody wrote it, and the text is to continue. Raises UserError on a token that
    the model does not have.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("--chat: this tokenizer has no chat template", "Leave --chat out for a base model")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        check_ids(tokenizer, ids)
        return ids
    return _as_prompts(tokenizer, [tokenizer(text, verbose=False)["input_ids"]])[0]


def encode_all(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of several texts, which the tokenizer spreads over cores."""
    return _as_prompts(tokenizer, tokenizer(list(texts), verbose=False)["input_ids"])


def _as_prompts(tokenizer, texts: list[list[int]]) -> list[list[int]]:
    """Ids of texts without what the tokenizer appends to each, checked."""
    back = list(added_ids(tokenizer)[1])
    for ids in texts:
        check_ids(tokenizer, ids)
    return [ids[: -len(back)] if back and ids[-len(back) :] == back else ids for ids in texts]


def fit(ids: list[int], limit: int, new_tokens: int, trim: str | None, limit_name: str = "") -> list[int]:
    """Ids that leave space for `new_tokens` within `limit` positions; `trim` "middle" keeps a quarter head, then tail.

    Raises UserError with the numbers, or `limit_name`, when the prompt is too long and `trim` is None, or nothing fits.
    """
    space = limit - new_tokens
    if len(ids) <= space:
        return ids
    numbers = f"{len(ids)} prompt + {new_tokens} new tokens exceed the model's {limit_name or limit}"
    if trim is None or space < 2:
        raise UserError(
            numbers, "Use --trim middle or lower --max-new-tokens" if space >= 2 else "Lower --max-new-tokens"
        )
    head = space // 4
    return ids[:head] + ids[len(ids) - (space - head) :]


def stdlib_text() -> str:
    """The held-out modules of the running Python's standard library, one after another."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for name in HELD_OUT:
        path = folder / f"{name}.py"
        path = path if path.exists() else folder / name / "__init__.py"
        if path.exists():
            parts.append(path.read_text("utf-8"))
    if not parts:
        raise UserError(f"{folder} holds no standard-library sources", "Give a text: bdcli prompt --source FILE")
    return "".join(parts)


def cut_prompt(tokenizer, text: str, tokens: int, share: float = 0.75) -> str:
    """A piece of `text` that encodes to exactly `tokens` ids and ends at the last line break before `share` of it.

    The end does not depend on `tokens`, so prompts of several contexts from one text end at the same place.
    """
    end = text.rfind("\n", 0, int(len(text) * share)) + 1 or len(text)
    piece = text[max(0, end - 16 * tokens) : end]
    front = len(added_ids(tokenizer)[0])
    offsets = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if front + len(offsets) < tokens or tokens <= front:
        raise UserError(
            f"the source has {front + len(offsets)} tokens up to its end point, not {tokens}", "Choose another --ctx"
        )
    start = offsets[front + len(offsets) - tokens][0]
    # a cut inside a word can merge differently: look for the nearest start that gives the exact count
    for distance in range(256):
        for candidate in {start - distance, start + distance}:
            if candidate >= 0 and len(encode(tokenizer, piece[candidate:])) == tokens:
                return piece[candidate:]
    raise UserError(f"no piece of exactly {tokens} tokens was found", "Choose another --ctx")
