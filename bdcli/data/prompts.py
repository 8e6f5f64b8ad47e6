"""Prompts: read them, turn them into ids, fit them into the context, cut real ones from the standard library."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.texts import decode_text, read_bytes, read_text
from bdcli.model.tokenizer import added_ids, check_ids

PIECE_CHARACTERS = 1 << 21  # encoded at once: a tokenizer takes about 150 bytes a character
ENCODED_CHARACTERS = 1 << 20  # so short a prompt is encoded before its length is judged
LISTED = 4  # special tokens named in a note
PLACEHOLDER = "\ue000text\ue001"  # private characters that no template has

# Standard-library modules kept out of training (recipes and scripts read this list); prompts come from them.
HELD_OUT = (
    "argparse", "inspect", "tarfile", "typing", "pickletools", "smtplib", "optparse", "difflib", "mailbox",
    "statistics", "calendar", "configparser", "shutil", "subprocess", "doctest", "zipfile",
)  # fmt: skip


def read_prompt(source: str) -> str:
    """Text of a UTF-8 file, or of standard input for `-`. Nothing is stripped."""
    name = "standard input" if source == "-" else source
    try:
        text = decode_text(read_bytes(sys.stdin.buffer, name), name) if source == "-" else read_text(Path(source))
    except FileNotFoundError:
        hint = "Write one with: bdcli prompt --ctx 4k --out prompt.txt"
        raise UserError(f"prompt file {source} does not exist", hint) from None
    except IsADirectoryError:
        raise UserError(f"{source} is a folder", "Give a text file, or - for standard input") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})", "Give a readable text file") from None
    if not text:
        raise UserError(f"the prompt from {name} is empty", "Write one with: bdcli prompt --ctx 4k --out prompt.txt")
    return text


def encode(tokenizer, text: str, chat: bool = False, special: str = "parse") -> list[int]:
    """Token ids of a prompt. The tokenizer alone decides about BOS and the chat template.

    `special`: special tokens that the text spells, such as `</s>`, are those tokens (`parse`, as `transformers` has it)
    or text like any other (`text`). An EOS that the tokenizer appends is left out: nobody wrote it, and the text is to
    continue. Raises UserError on a token that the model does not have.
    """
    if chat:
        return _chat_ids(tokenizer, text, special)
    return _as_prompts(tokenizer, [tokenizer(text, verbose=False, **_splitting(special == "text"))["input_ids"]])[0]


def encode_document(tokenizer, text: str, special: str = "text") -> list[int]:
    """Token ids of a document of any length. Long ones are encoded in pieces of whole lines, so that memory is bounded.

    By default no document ends early because it spells a special token.
    """
    first, *rest = pieces(text)
    ids = encode(tokenizer, first, special=special)
    for piece in rest:
        ids += _plain(tokenizer, piece, special == "text")
    return ids


def encode_documents(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode_document` of several texts; the tokenizer spreads short ones over cores."""
    if max(map(len, texts)) > PIECE_CHARACTERS:
        return [encode_document(tokenizer, text) for text in texts]
    return _as_prompts(tokenizer, tokenizer(list(texts), verbose=False, **_splitting(True))["input_ids"])


def pieces(text: str) -> list[str]:
    """`text` in pieces of at most PIECE_CHARACTERS, cut behind line ends where there are any."""
    found, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def special_tokens_note(tokenizer, text: str) -> str | None:
    """A line that says which special tokens `text` spells, and how to read them as text; None where it spells none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token) for token in added.values() if token.special} - {""}
    if not names or getattr(tokenizer, "split_special_tokens", False):
        return None
    spelled = Counter(re.findall("|".join(map(re.escape, sorted(names, key=len, reverse=True))), text))
    if not spelled:
        return None
    count = sum(spelled.values())
    listed = ", ".join(f"{name} ({n})" for name, n in spelled.most_common(LISTED))
    more = f" and {len(spelled) - LISTED} others" if len(spelled) > LISTED else ""
    return f"the text spells {count} special token{'s' if count > 1 else ''}, read as such: {listed}{more}"


def _plain(tokenizer, text: str, literal: bool) -> list[int]:
    """Ids of `text` without what the tokenizer adds."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False, **_splitting(literal))["input_ids"]
    check_ids(tokenizer, ids)
    return ids


def _splitting(literal: bool) -> dict[str, bool]:
    """What a tokenizer is asked for; a folder's own default stands where special tokens are to be parsed."""
    return {"split_special_tokens": True} if literal else {}


def _chat_ids(tokenizer, text: str, special: str) -> list[int]:
    """Ids of the chat template around `text`; the template's own special tokens are read as such in any case."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--chat: this tokenizer has no chat template", "Leave --chat out for a base model")
    rendered = _rendered(tokenizer, text)
    if special == "parse" or special_tokens_note(tokenizer, text) is None:
        return _plain(tokenizer, rendered, False)
    frame = _rendered(tokenizer, PLACEHOLDER)
    before, found, after = frame.partition(PLACEHOLDER)
    inside = next((t for t in (text, text.strip()) if found and before + t + after == rendered), None)
    if inside is None:
        raise UserError(
            "--special-tokens text: the chat template changes the text that it is given", "Leave one of both out"
        )
    return _plain(tokenizer, before, False) + _plain(tokenizer, inside, True) + _plain(tokenizer, after, False)


def _rendered(tokenizer, text: str) -> str:
    """The chat template around one message of the user. Raises UserError on whatever a template raises."""
    message = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja's errors and the template's own, of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} fails ({reason})", "Mend the template, or leave --chat out"
        ) from None


def shorten(tokenizer, text: str, limit: int, new_tokens: int, trim: str | None) -> str:
    """`text`, without its middle where it is longer than so many tokens can be, before any of it is encoded.

    Texts of up to ENCODED_CHARACTERS are left to `fit`, which knows their exact length. With `trim` "middle" more of
    head and tail is left than `fit` keeps of their ids. Raises UserError with the sizes where `trim` is None.
    """
    if len(text) <= ENCODED_CHARACTERS:
        return text
    space, longest = max(limit - new_tokens, 2), max(map(len, tokenizer.get_vocab()))
    if len(text) <= space * longest:
        return text
    if trim is None:
        raise UserError(
            f"{len(text)} characters of prompt + {new_tokens} new tokens exceed the model's {limit} positions: "
            f"a token has at most {longest} characters",
            "Use --trim middle or shorten the prompt",
        )
    head = (space // 4 + 1) * longest
    return text[:head] + text[len(text) - (space * longest - head) :]


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
    count = sum(len(_plain(tokenizer, p, False)) for p in pieces(piece)) if len(piece) > PIECE_CHARACTERS else tokens
    if front + count < tokens:
        raise UserError(f"the source has {front + count} tokens up to its end point, not {tokens}", "Lower --ctx")
    offsets = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if front + len(offsets) < tokens or tokens <= front:
        hint = "Lower --ctx" if tokens > front else "Raise --ctx"
        raise UserError(f"the source has {front + len(offsets)} tokens up to its end point, not {tokens}", hint)
    start = offsets[front + len(offsets) - tokens][0]
    # a cut inside a word can merge differently: look for the nearest start that gives the exact count
    for distance in range(256):
        for candidate in {start - distance, start + distance}:
            if candidate >= 0 and len(encode(tokenizer, piece[candidate:])) == tokens:
                return piece[candidate:]
    raise UserError(f"no piece of exactly {tokens} tokens was found", "Choose another --ctx")
