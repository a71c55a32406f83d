"""The o200k_harmony tokenizer, offline: the whole vocabulary, or cut to a small model's size.

This module also writes the tokenizer files that Hugging Face's libraries read, for exported
checkpoints.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.system import chat_template

if TYPE_CHECKING:
    import tiktoken

VOCAB_SIZE = 201_088  # the vocabulary size of gpt-oss
VOCAB_FILE = Path(__file__).parent / "vocab" / "o200k_base.tiktoken"
VOCAB_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

NUM_RANKS = 199_998  # number of mergeable tokens, and the id of the first special token
# Special tokens that a cut vocabulary keeps: ids 199,998 to 200,029, all of Harmony's among them.
NUM_SPECIAL = 32
# An embedding with more rows has all of OpenAI's ids that Harmony needs, so it is not a cut one.
LAST_HARMONY_ID = 200_012  # <|call|>
MIN_VOCAB_SIZE = 256 + NUM_SPECIAL  # all single bytes and the special tokens

_SPECIAL_NAMES = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# o200k splits text into these pieces before merging: words, numbers of up to 3 digits, punctuation,
# white space.
SPLIT_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Tokens at which sampling stops: the end of an answer, of a plain text, and a call of a tool.
STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")

_LONGEST_SPACE = 400_000

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
)

_SPECIAL_ROLES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|return|>",
    "pad_token": "<|endoftext|>",
}


@cache
def load_ranks(path: Path = VOCAB_FILE) -> dict[bytes, int]:
    """Read a rank table (token bytes -> rank) and check that it is o200k_base's.

    Raises UserError if the file is missing or its sha256 differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"vocabulary {path}: {error.strerror or error}; reinstall gptoss-jax"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        raise UserError(
            f"vocabulary {path}: sha256 is {digest}, expected {VOCAB_SHA256}; reinstall gptoss-jax"
        )
    lines = (line.split() for line in data.splitlines())
    return {binascii.a2b_base64(token): int(rank) for token, rank in lines}


def special_tokens(vocab_size: int = VOCAB_SIZE) -> dict[str, int]:
    """Return the special tokens of a vocabulary (name -> id) in the order of their ids.

    Where the embedding reaches the id of `<|call|>`, the ids are OpenAI's, even if its rows were
    trimmed to those that the tokenizer uses. A smaller vocabulary is a cut one: it ends in 32
    special tokens, which are moved down together, so the id is the original id minus
    (200,030 - vocab_size). The name stays the original name, also in `<|reserved_...|>`.
    """
    shift = NUM_RANKS - _num_ranks(vocab_size)
    real_ids = range(NUM_RANKS, min(vocab_size, VOCAB_SIZE) + shift)
    return {_SPECIAL_NAMES.get(i, f"<|reserved_{i}|>"): i - shift for i in real_ids}


def _num_ranks(vocab_size: int) -> int:
    return NUM_RANKS if vocab_size > LAST_HARMONY_ID else vocab_size - NUM_SPECIAL


@cache
def get_tokenizer(vocab_size: int = VOCAB_SIZE) -> tiktoken.Encoding:
    """Return the tokenizer of a model with `vocab_size` rows in its embedding.

    With 201,088 rows (or more, if the embedding is padded) it is exactly o200k_harmony; with at
    least 200,013, it is that without the last ids. A smaller tokenizer has the first
    vocab_size - 32 ranks, then 32 special tokens (see `special_tokens`). These ranks are a complete
    BPE, because the parts of a token have lower ranks. Raises UserError below 288, or as
    `load_ranks` does.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size is {vocab_size}: the tokenizer needs at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {NUM_SPECIAL} special tokens)"
        )
    ranks = load_ranks()
    count = _num_ranks(vocab_size)
    if count < NUM_RANKS:
        ranks = {token: rank for token, rank in ranks.items() if rank < count}
    special = special_tokens(vocab_size)
    name = "o200k_harmony"
    if vocab_size >= VOCAB_SIZE:
        special["<|reserved_200018|>"] = 200_018  # tiktoken has two names for this id
    else:
        name = f"{name}_{vocab_size}"
    import tiktoken  # imported here, so that reading a configuration does not import it

    return tiktoken.Encoding(
        name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def special_id(encoding: tiktoken.Encoding, name: str) -> int:
    """Return the id of a special token by name, such as `<|start|>`."""
    return encoding.encode_single_token(name)


def stop_ids(encoding: tiktoken.Encoding) -> tuple[int, ...]:
    """Return the ids of `STOPS`, which end an assistant's turn or a text.

    `<|end|>` is not one of them: it ends a message, and the assistant continues with the next.
    """
    return tuple(special_id(encoding, name) for name in STOPS)


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of plain text; text that looks like a special token is encoded as text.

    Runs of more than 400,000 white space characters are encoded in pieces, because tiktoken's
    regular expression overflows its stack on them.
    """
    ids: list[int] = []
    start = 0
    if len(text) > _LONGEST_SPACE:
        for space in re.finditer(r"\s+", text):
            for end in range(space.start() + _LONGEST_SPACE, space.end(), _LONGEST_SPACE):
                ids += encoding.encode_ordinary(text[start:end])
                start = end
    return ids + encoding.encode_ordinary(text[start:])


def token_bytes(encoding: tiktoken.Encoding, token: int) -> bytes:
    """Return a token's bytes; for an id that the tokenizer lacks, the bytes of U+FFFD."""
    try:
        return encoding.decode_single_token_bytes(token)
    except (KeyError, OverflowError):
        return "\ufffd".encode()


def decode(encoding: tiktoken.Encoding, ids: Sequence[int]) -> str:
    """Return the text of ids, with special tokens by name; invalid UTF-8 becomes U+FFFD."""
    return b"".join(token_bytes(encoding, int(i)) for i in ids).decode("utf-8", errors="replace")


def check_ids(ids: Any, vocab_size: int = VOCAB_SIZE) -> None:
    """Raise UserError unless every id is a row of the embedding: an integer in [0, vocab_size).

    `ids` is a list, a list of lists of equal length, or an array. Other distributions of
    o200k_harmony also name id 201,088, for which gpt-oss has no row: it is refused too.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return
    if array.dtype.kind not in "iu":
        raise UserError(f"ids are {array.dtype}: token ids are integers")
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        position = where[0] if len(where) == 1 else where
        cut = (
            f"; its tokenizer is tokenizer.get_tokenizer({vocab_size})"
            if vocab_size < VOCAB_SIZE
            else ""
        )
        raise UserError(
            f"id {int(array[where])} at position {position} is outside the vocabulary: "
            f"ids go from 0 to {vocab_size - 1}{cut}"
        )


def write_tokenizer_files(
    folder: str | Path,
    vocab_size: int = VOCAB_SIZE,
    *,
    context: int = 131_072,
    template: str | None = None,
) -> list[Path]:
    """Write the four files of `TOKENIZER_FILES` into an existing folder and return their paths.

    `transformers.AutoTokenizer` then gives the same ids as tiktoken, with one exception: by
    default, it encodes the text of a special token as that token. Writing takes some seconds and
    13 MB for 201,088 ids. `context` becomes model_max_length. `template` is the chat template, by
    default `system.chat_template()`. Raises UserError as `get_tokenizer` does.
    """
    folder = Path(folder)
    get_tokenizer(vocab_size)  # refuses a bad vocabulary size before anything is written
    contents = {
        "tokenizer.json": _tokenizer_json(vocab_size),
        "tokenizer_config.json": {
            **_SPECIAL_ROLES,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": _SPECIAL_ROLES,
    }
    for name, content in contents.items():
        indent = 2 if name != "tokenizer.json" else None
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    template = chat_template() if template is None else template
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return [folder / name for name in TOKENIZER_FILES]


def find_parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts whose merge makes `token` (of 2 bytes or more).

    We merge the bytes of the token as BPE does, always the pair of lowest rank, until two parts are
    left. Whenever BPE produces `token` in a text, it has made exactly these merges of its bytes.
    So one merge per token gives the same ids as tiktoken, which merges any pair that spells a
    token.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (ranks.get(a + b) for a, b in pairwise(parts))
        _, at = min((rank, i) for i, rank in enumerate(pairs) if rank is not None)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """Return the printable character that represents each byte in byte-level BPE files.

    Printable Latin-1 represents itself; the other bytes get U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, free = [], 0x100
    for byte in range(256):
        characters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return characters


def _tokenizer_json(vocab_size: int) -> dict[str, Any]:
    special = special_tokens(vocab_size)
    count = min(special.values())
    ranks = load_ranks()
    tokens = sorted(ranks, key=lambda token: ranks[token])[:count]
    # Byte b is written as characters[b]; Latin-1 is the codec that maps bytes to code points.
    table = dict(enumerate(_byte_characters()))

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(table)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is in the vocabulary is one token, as in tiktoken
            "vocab": {spell(token): rank for rank, token in enumerate(tokens)},
            "merges": [
                [spell(part) for part in find_parts(token, ranks)]
                for token in tokens
                if len(token) > 1
            ],
        },
    }
