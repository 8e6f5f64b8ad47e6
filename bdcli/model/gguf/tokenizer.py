"""The tokenizer of a GGUF file, built with `tokenizers` from its vocabulary.

`transformers` has a conversion of its own (seen in 5.24). It splits no digits for smollm, drops the prefix space of a
text that begins with one, ignores `add_space_prefix`, merges what llama-bpe keeps whole, and does not normalise for
qwen2, so it is not used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.model.gguf.file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type
_FOLDER_INSTEAD = "Use the model's Hugging Face folder"
_CONVERT_AGAIN = "Convert the model again with a present llama.cpp"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
# End a turn of a chat; a file that names another EOS may have a chat template that ends turns with one of them.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer cuts a text before it merges."""

    pattern: str
    single_digits: bool = False  # before the pattern
    whole_words: bool = False  # a word of the vocabulary is not cut (`ignore_merges`)
    add_bos: bool = False  # where the file does not say
    composed: bool = False  # NFC first


_LLAMA_3 = Splitting(_CASELESS + r"\p{N}{1,3}" + _REST, whole_words=True, add_bos=True)
_QWEN_2 = Splitting(_CASELESS + r"\p{N}" + _REST, composed=True)
_CODE = Splitting(_WORDS, single_digits=True)
SPLITTINGS = {  # by tokenizer.ggml.pre
    "gpt-2": Splitting(_WORDS),
    "smollm": _CODE,
    "starcoder": _CODE,
    "refact": _CODE,
    "codeshell": _CODE,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama-bpe": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "tekken": Splitting(_TEKKEN, whole_words=True, add_bos=True),
}


def build_tokenizer(file: GgufFile):
    """A `PreTrainedTokenizerFast`. Raises UserError where the file has none, or one of a kind that is not known."""
    from transformers import PreTrainedTokenizerFast

    kind = _field(file, "model", str)
    if kind not in _BUILDERS:
        known = " and ".join(_BUILDERS)
        raise UserError(f"{file.path}: tokenizer {kind} is not supported, only {known}", _FOLDER_INSTEAD)
    tokens = _tokens(file)
    try:
        tokenizer, add_bos = _BUILDERS[kind](file, tokens)
        _add_special_tokens(tokenizer, file, tokens)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more exact, as for a merge of tokens that do not exist
        raise UserError(f"{file.path}: the tokenizer cannot be built ({error})", "Download it again") from None
    ids = special_ids(file)
    ends = {
        "bos": ids["bos"] if file.get("tokenizer.ggml.add_bos_token", bool, add_bos) else None,
        "eos": ids["eos"] if file.get("tokenizer.ggml.add_eos_token", bool, False) else None,
    }
    tokenizer.post_processor = _template(tokens, ends)
    named = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if ids[name] is not None}
    template = file.get("tokenizer.chat_template", str)
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=file.get(f"{file.metadata['general.architecture']}.context_length", int),
        **named,
        **({"chat_template": template} if template else {}),
    )
    table = file.tensors.get("token_embd.weight")
    built.embedding_rows = None if table is None else table.shape[0]
    return built


def special_ids(file: GgufFile) -> dict[str, int | None]:
    """Ids that the file names: bos, eos, unk, pad, eot, eom."""
    count = len(file.get("tokenizer.ggml.tokens", list, ()))
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in _SPECIAL.items()}
    if file.metadata.get("tokenizer.ggml.model") == "llama":
        ids = {name: {"bos": 1, "eos": 2, "unk": 0}.get(name) if i is None else i for name, i in ids.items()}
    return {name: i if i is not None and 0 <= i < count else None for name, i in ids.items()}


def end_tokens(file: GgufFile) -> frozenset[int]:
    """EOS, end of turn and end of message where the file names them, and what its chat template ends a turn with."""
    ids = special_ids(file)
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    template = file.get("tokenizer.chat_template", str, "")
    kinds = _kinds(file, tokens)
    ends = [end for end in _TURN_ENDS if end in template and end in tokens]
    shown = {tokens.index(end) for end in ends}
    named = {ids[name] for name in ("eos", "eot", "eom")} - {None}
    return frozenset(named | {i for i in shown if kinds[i] in (CONTROL, USER_DEFINED)})


def _field(file: GgufFile, name: str, kind: type):
    value = file.get(f"tokenizer.ggml.{name}", kind)
    if not value:
        raise UserError(f"{file.path} holds no tokenizer (tokenizer.ggml.{name} is missing)", _FOLDER_INSTEAD)
    return value


def _tokens(file: GgufFile) -> list[str]:
    tokens = _field(file, "tokens", list)
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise UserError(f"{file.path}: token {twice!r} is in the vocabulary twice", _FOLDER_INSTEAD)
    table = file.tensors.get("token_embd.weight")
    if table is not None and table.shape[0] < len(tokens):
        raise UserError(f"{file.path} has {len(tokens)} tokens and {table.shape[0]} embeddings", _CONVERT_AGAIN)
    return tokens


def _kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    """Type of each token."""
    kinds = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"{file.path} has {len(tokens)} tokens and {len(kinds)} types of them", "Download it again")
    return kinds


def _vocabulary(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    """Ids by token, without those that pad the vocabulary."""
    kinds = _kinds(file, tokens)
    padding = {i for i, kind in enumerate(kinds) if kind == UNUSED and re.fullmatch(r"\[PAD\d+\]", tokens[i])}
    return {token: i for i, token in enumerate(tokens) if i not in padding}


def _byte_level(file: GgufFile, tokens: list[str]):
    """Byte-level BPE (GPT-2, Llama 3, Qwen): the merges are listed, the way to split has a name."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.get("tokenizer.ggml.pre", str)
    if name not in SPLITTINGS:
        what = f"splits its text as {name}, which is not known" if name else "does not say how to split a text"
        hint = f"Known: {', '.join(SPLITTINGS)}. {_FOLDER_INSTEAD}" if name else _CONVERT_AGAIN
        raise UserError(f"{file.path}: the tokenizer {what}", hint)
    splitting = SPLITTINGS[name]
    merges = [_merge(file, merge) for merge in _field(file, "merges", list)]
    model = models.BPE(vocab=_vocabulary(file, tokens), merges=merges, ignore_merges=splitting.whole_words)
    tokenizer = Tokenizer(model)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    steps += [
        pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, splitting.add_bos


def _merge(file: GgufFile, merge: str) -> tuple[str, str]:
    """The two sides, either of which may begin with a space."""
    at = merge.find(" ", 1)
    if at < 0:
        raise UserError(f"{file.path}: merge {merge!r} has one side", "Download it again")
    return merge[:at], merge[at + 1 :]


def _sentencepiece(file: GgufFile, tokens: list[str]):
    """SentencePiece BPE (Llama 2, Mistral): merges follow from the scores, bytes stand for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _field(file, "scores", list)
    if len(scores) != len(tokens):
        raise UserError(f"{file.path} has {len(tokens)} tokens and {len(scores)} scores", "Download it again")
    normal = {score for score, kind in zip(scores, _kinds(file, tokens)) if kind == NORMAL}
    if len(normal) == 1 and len(tokens) > 1:
        raise UserError(f"{file.path}: all tokens have the score {normal.pop()}, so no merge is known", _CONVERT_AGAIN)
    vocabulary = _vocabulary(file, tokens)
    unknown = special_ids(file)["unk"]
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of_scores(vocabulary, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer, True


def _merges_of_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the third with the highest score first."""
    merges = []
    for token, i in vocabulary.items():
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        ranked = [(vocabulary[a], vocabulary[b], a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
        merges += [(-scores[i], a, b) for _, _, a, b in sorted(ranked)]
    return [(a, b) for _, a, b in sorted(merges, key=lambda merge: merge[0])]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_special_tokens(tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Tokens that are matched whole in a text; those of control are left out of decoded text."""
    from tokenizers import AddedToken

    kinds = _kinds(file, tokens)
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        special = kind == CONTROL
        add([AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, kinds) if k == kind and t])


def _template(tokens: list[str], ends: dict[str, int | None]):
    """BOS before a text and EOS after it, where `ends` has them."""
    from tokenizers import processors

    added = [(tokens[i], i) for i in ends.values() if i is not None]
    begin = [tokens[ends["bos"]]] if ends["bos"] is not None else []
    end = [tokens[ends["eos"]]] if ends["eos"] is not None else []
    return processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{t}:1" for t in begin), "$B:1", *(f"{t}:1" for t in end)],
        special_tokens=added,
    )
