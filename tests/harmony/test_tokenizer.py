"""The tokenizer against tiktoken's own o200k_harmony, cut vocabularies, and the exported files."""

import json
import random
import shutil

import numpy as np
import pytest
import tiktoken

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import render, render_prompt, tokenizer

WHOLE = tokenizer.get_tokenizer()
SMALL = tokenizer.get_tokenizer(1024)
TEXTS = [
    "",
    "Hello world, don't WE'RE HELLOworld camelCase I'll",
    "  leading, trailing and\u3000wide\u00a0spaces \t ",
    "\r\n\r\n \t\n x\n\n\n",
    'def f(x):\n\treturn x**2  # 你好\n////// ```"""',
    "日本語のテキストと中文。 한국어",
    "🙂👩‍👩‍👧‍👦🇨🇭 emoji",
    "naïve café Ünïcödé Ⅷ ½ ٣ a\u0301\u0300",
    "1234567890 3.14159 1e-5 5 2 9 1",
    "مرحبا بالعالم שלום ก็ดีนะ हिन्दी पाठ",
    "https://example.com/a?b=c&d=%20",
    "x" * 300 + " " * 300,
]


def random_texts(count):
    rng = random.Random(3)
    ranges = [(32, 127)] * 3 + [(0xA0, 0x250), (0x400, 0x700), (0x4E00, 0x5000), (0x1F300, 0x1F650)]
    for _ in range(count):
        letters = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))]
        yield "".join(rng.choice([c, c, c, " ", "\n"]) for c in letters)


def test_whole_vocabulary_is_o200k_harmony(tmp_path, monkeypatch):
    import hashlib

    from tiktoken_ext import openai_public

    url = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    shutil.copy(tokenizer.VOCAB_FILE, tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    official = openai_public.o200k_harmony()
    assert official["pat_str"] == tokenizer.SPLIT_PATTERN
    assert official["mergeable_ranks"] == tokenizer.load_ranks()
    theirs = tiktoken.Encoding(**official)
    assert WHOLE.n_vocab == theirs.n_vocab == 201_088
    assert WHOLE.name == "o200k_harmony"
    assert WHOLE.special_tokens_set == theirs.special_tokens_set
    for name in theirs.special_tokens_set:
        assert tokenizer.special_id(WHOLE, name) == theirs.encode_single_token(name)
    for text in [*TEXTS, *random_texts(50)]:
        assert tokenizer.encode(WHOLE, text) == theirs.encode(text, disallowed_special=())


def test_stop_ids_are_return_endoftext_and_call():
    assert tokenizer.stop_ids(WHOLE) == (200_002, 199_999, 200_012)
    assert tokenizer.special_id(WHOLE, "<|end|>") == 200_007
    assert tokenizer.stop_ids(SMALL) == (1024 - 32 + 4, 1024 - 32 + 1, 1024 - 32 + 14)


@pytest.mark.parametrize("size", [288, 289, 1024, 5003, 200_012])
def test_cut_vocabularies_hold_all_ids_and_any_text(size):
    encoding = tokenizer.get_tokenizer(size)
    assert encoding.n_vocab == size
    assert tokenizer.get_tokenizer(size) is encoding
    for text in [*TEXTS, "<|end|>", *random_texts(20)]:
        ids = tokenizer.encode(encoding, text)
        assert max(ids, default=0) < size - 32
        assert tokenizer.decode(encoding, ids) == text
    named = ["<|startoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]
    ids = [tokenizer.special_id(encoding, name) for name in named]
    assert ids == sorted(ids)
    assert ids[0] == size - 32
    for i in {0, 255, size // 2, size - 33, size - 32, size - 1}:
        assert "\ufffd" not in tokenizer.token_bytes(encoding, i).decode("utf-8", "ignore")
        assert len(tokenizer.token_bytes(encoding, i)) > 0


@pytest.mark.parametrize("size", [200_013, 200_019, 200_030, 200_100, 201_087])
def test_an_embedding_trimmed_to_the_tokenizer_has_openai_s_ids(size):
    """As `resize_token_embeddings(len(tokenizer))` leaves it: 200,019 rows."""
    encoding = tokenizer.get_tokenizer(size)
    for text in TEXTS:
        assert tokenizer.encode(encoding, text) == tokenizer.encode(WHOLE, text)
    special = tokenizer.special_tokens(size)
    assert max(special.values()) == size - 1
    assert all(tokenizer.special_id(WHOLE, name) == i for name, i in special.items())
    assert tokenizer.stop_ids(encoding) == (200_002, 199_999, 200_012)


def test_padded_embeddings_use_the_whole_vocabulary():
    padded = tokenizer.get_tokenizer(201_216)
    assert padded.n_vocab == 201_088
    assert tokenizer.stop_ids(padded) == (200_002, 199_999, 200_012)
    assert tokenizer.decode(padded, [201_200]) == "\ufffd"


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 287.*at least 288"):
        tokenizer.get_tokenizer(287)


def test_a_wrong_hash_is_refused(tmp_path):
    data = bytearray(tokenizer.VOCAB_FILE.read_bytes())
    data[1000] ^= 1
    bad = tmp_path / "o200k_base.tiktoken"
    bad.write_bytes(data)
    with pytest.raises(UserError) as error:
        tokenizer.load_ranks(bad)
    assert str(bad) in str(error.value)
    assert tokenizer.VOCAB_SHA256 in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none\.tiktoken: No such file"):
        tokenizer.load_ranks(tmp_path / "none.tiktoken")


@pytest.mark.parametrize(
    ("ids", "size", "named"),
    [
        ([0, 201_088], 201_088, "id 201088 at position 1 is outside"),
        ([5, -1], 201_088, "id -1 at position 1"),
        ([[5, 6], [7, 1024]], 1024, r"id 1024 at position \(1, 1\)"),
        (np.array([2**40]), 1024, f"id {2**40} at position 0"),
        ([0.5], 1024, "float64"),
        (["a"], 1024, "integers"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(ids, size, named):
    with pytest.raises(UserError, match=named):
        tokenizer.check_ids(ids, size)


def test_ids_inside_the_vocabulary_pass():
    for ids in ([], [0, 201_087], np.zeros((2, 3), np.uint8), [[1, 2], [3, 4]]):
        tokenizer.check_ids(ids)


def test_decoding_replaces_what_is_no_utf8():
    ids = tokenizer.encode(WHOLE, "🀄")
    assert len(ids) > 1
    assert tokenizer.decode(WHOLE, ids) == "🀄"
    assert tokenizer.decode(WHOLE, ids[:1]) == "\ufffd"
    assert tokenizer.decode(WHOLE, [200_006, *tokenizer.encode(WHOLE, "a")]) == "<|start|>a"


def test_long_white_space_is_encoded_in_pieces():
    text = "a" + " " * 900_000 + "b\n" + "\t" * 500_000
    ids = tokenizer.encode(SMALL, text)
    assert b"".join(tokenizer.token_bytes(SMALL, i) for i in ids).decode() == text
    short = "a" + " " * 450_000 + "b\n"
    assert tokenizer.encode(SMALL, short)[:1000] == SMALL.encode_ordinary(short)[:1000]


def greedy_merges(text, ranks, merges):
    """BPE by a table of pairs, as the tokenizers library does it."""
    parts = [bytes([b]) for b in text]
    while True:
        pairs = [
            (merges[pair], i)
            for i in range(len(parts) - 1)
            if (pair := (parts[i], parts[i + 1])) in merges
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_one_merge_a_token_gives_the_same_ids():
    ranks = {t: r for t, r in tokenizer.load_ranks().items() if r < 8_000}
    merges = {tokenizer.find_parts(t, ranks): r for t, r in ranks.items() if len(t) > 1}
    assert len(merges) == 8_000 - 256
    assert all(ranks[a] < r and ranks[b] < r for (a, b), r in merges.items())
    encoding = tokenizer.get_tokenizer(8_032)
    rng = random.Random(1)
    letters = "etaoinshrdluäß中"
    for _ in range(300):
        word = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 24)))
        assert greedy_merges(word.encode(), ranks, merges) == encoding.encode_ordinary(word)


def test_tokenizer_files_of_a_cut_vocabulary(tmp_path):
    paths = tokenizer.write_tokenizer_files(tmp_path, 1024, context=512)
    assert sorted(p.name for p in paths) == sorted(p.name for p in tmp_path.iterdir())
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(data["model"]["vocab"]) == 992
    assert len(data["model"]["merges"]) == 992 - 256
    assert [t["id"] for t in data["added_tokens"]] == list(range(992, 1024))
    assert data["model"]["vocab"]["Ġthe"] == tokenizer.load_ranks()[b" the"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|return|>"
    assert config["model_max_length"] == 512
    with pytest.raises(UserError, match="at least 288"):
        tokenizer.write_tokenizer_files(tmp_path / "none", 100)


def _check_with_transformers(folder, size):
    transformers = pytest.importorskip("transformers")
    from harmony_cases import CHATS, SCHEMAS

    tokenizer.write_tokenizer_files(folder, size)
    ours, theirs = tokenizer.get_tokenizer(size), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == size
    assert theirs.eos_token_id == tokenizer.special_id(ours, "<|return|>")
    for text in [*TEXTS, *random_texts(1000)]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(ours, text)
        assert theirs.decode(ids) == text
    cases = [(c["messages"], c.get("tools")) for n, c in CHATS.items() if n != "special text"]
    user = [{"role": "user", "content": "hi"}]
    # Of "scalars", the template leaves two numbers as Python writes them.
    cases += [
        (user, [{"name": "f", "description": "A\r\nB\n", "parameters": schema}])
        for name, schema in SCHEMAS.items()
        if name != "scalars"
    ]
    for messages, tools in cases:
        options = {"tools": tools, "reasoning_effort": "low", "date": "2025-06-28"}
        prompt, whole = (
            theirs.apply_chat_template(
                messages, add_generation_prompt=add, return_dict=False, **options
            )
            for add in (True, False)
        )
        arguments = (messages, tools, "low", "2025-06-28")
        assert prompt == render_prompt(*arguments, tokenizer=ours)
        assert whole == render(*arguments, tokenizer=ours)[0]


@pytest.mark.parity
def test_transformers_reads_the_files_of_a_cut_vocabulary(tmp_path):
    _check_with_transformers(tmp_path, 1024)


@pytest.mark.parity
@pytest.mark.slow
def test_transformers_reads_the_files_of_the_whole_vocabulary(tmp_path):
    _check_with_transformers(tmp_path, 201_088)
