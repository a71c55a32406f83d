"""Batches: resumable at every step, the same on any number of hosts, of whole epochs."""

import collections
import dataclasses
import json
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gptoss_jax import data, harmony
from gptoss_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptoss_jax.data import examples as examples_module
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.windows import Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")
NUM_RECORDS = 41
VOCAB = 700


def make_config(train, *, seed=0, held_out=(), context=512, eval_batches=0, **options):
    options = {"sequence_length": 48, "batch_size": 4, "pack_window": 16, **options}
    return Config(
        model=ModelConfig(vocab_size=VOCAB, context=context),
        data=DataConfig(train=(str(train),), held_out=tuple(map(str, held_out)), **options),
        train=TrainConfig(seed=seed, eval_batches=eval_batches, eval_max_tokens=8),
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    """41 texts of 2 to 35 tokens, each of which starts differently."""
    rng = random.Random(5)
    rows = [{"text": f"{i} " + "ab " * rng.randint(0, 16)} for i in range(NUM_RECORDS)]
    return write(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def chats(tmp_path):
    rows = []
    for i in range(23):
        question = {"role": "user", "content": f"say {i}"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"{i} " * (i + 1)}]})
    return write(tmp_path / "chats.jsonl", rows)


def take(batches, n):
    """Take n batches, then stop the threads."""
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(x, field), getattr(y, field))


def joined(parts):
    """Join the hosts' parts of each step."""
    return [
        type(step[0])(*(np.concatenate([getattr(b, f) for b in step]) for f in FIELDS))
        for step in zip(*parts, strict=True)
    ]


def segments(batch):
    """List the token sequences of a batch."""
    found = []
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        found += [tuple(tokens[ids == k].tolist()) for k in range(1, ids.max() + 1)]
    return found


def encode(text):
    encoding = tokenizer.get_tokenizer(VOCAB)
    return [*encoding.encode_ordinary(text), tokenizer.special_id(encoding, "<|endoftext|>")]


def test_resume_at_every_step_gives_the_same_batches(texts):
    config = make_config(texts)
    batches, states, all_batches = data.train_batches(config), [], []
    for _ in range(28):  # over 3 epochs of 3 windows
        states.append(json.loads(json.dumps(batches.get_state())))
        all_batches.append(next(batches))
    batches.close()
    assert states[-1]["step"] == 27 and states[-1]["window"] > 9
    for step in range(26):
        resumed = data.train_batches(config)
        resumed.set_state(states[step])
        assert resumed.get_state() == states[step]
        assert_same(take(resumed, 2), all_batches[step : step + 2])


def test_state_can_be_set_while_threads_work_ahead(texts):
    batches = data.train_batches(make_config(texts))
    start = batches.get_state()
    first = [next(batches) for _ in range(12)]
    for n in range(1, 12):
        batches.set_state(start)
        assert_same([next(batches) for _ in range(n)], first[:n])
    batches.close()


def test_windows_in_which_nothing_is_trained_are_passed_over(tmp_path):
    rows = [{"text": f"{i} is one" if i % 4 == 0 else ""} for i in range(16)]
    config = make_config(write(tmp_path / "a.jsonl", rows), pack_window=1, batch_size=3)
    batches, states, whole = data.train_batches(config), [], []
    for _ in range(8):
        states.append(batches.get_state())
        whole.append(next(batches))
    batches.close()
    assert states[-1]["window"] > 7 * 3 * 2
    for state, batch in zip(states, whole, strict=True):
        resumed = data.train_batches(config)
        resumed.set_state(state)
        assert_same(take(resumed, 1), [batch])


def test_closing_does_not_wait_for_a_window(texts, monkeypatch):
    read = examples_module.Examples.__getitem__

    def slow(self, i):
        time.sleep(0.1)
        return read(self, i)

    config = make_config(texts, pack_window=NUM_RECORDS)
    _ = open_examples(config).stats
    monkeypatch.setattr(examples_module.Examples, "__getitem__", slow)
    batches = data.train_batches(config)
    next(batches)  # the next window of 4 seconds has begun
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 2


def test_resuming_reads_only_from_where_it_is(texts, monkeypatch):
    opened = []
    plan = Windows.packed
    monkeypatch.setattr(
        Windows, "packed", lambda s, w, **how: opened.append(w) or plan(s, w, **how)
    )
    batches = data.train_batches(make_config(texts))
    batches.set_state({"step": 10**6, "window": 10**6, "row": 1})
    next(batches)
    batches.close()
    assert min(opened) == 10**6


def test_threads_work_ahead(texts, monkeypatch):
    opened = []
    plan = Windows.packed
    monkeypatch.setattr(
        Windows, "packed", lambda s, w, **how: opened.append(w) or plan(s, w, **how)
    )
    batches = data.train_batches(make_config(texts, pack_window=5))
    next(batches)  # takes at most 4 of these windows, of a row or two each
    deadline = time.monotonic() + 20
    while len(opened) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(opened) >= 10
    batches.close()


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(texts, process_count):
    config = make_config(texts)
    whole = take(data.train_batches(config), 15)

    def host(index):
        size = 4 // process_count
        return data.train_batches(config, rows=(index * size, index * size + size))

    parts = [take(host(i), 15) for i in range(process_count)]
    assert parts[0][0].tokens.shape == (4 // process_count, 48)
    assert_same(joined(parts), whole)

    states = []  # and a run may go on with another number of hosts
    for i in range(process_count):
        batches = host(i)
        _ = [next(batches) for _ in range(7)]
        states.append(batches.get_state())
        batches.close()
    assert all(state == states[0] for state in states)
    alone = data.train_batches(config)
    alone.set_state(states[0])
    assert_same(take(alone, 8), whole[7:])


def test_hosts_may_share_rows_and_have_some_more_than_others(texts):
    config = make_config(texts)
    whole = take(data.train_batches(config), 3)
    for first, last in ((0, 3), (2, 4), (3, 4)):
        part = take(data.train_batches(config, rows=(first, last)), 3)
        want = [jax.tree.map(lambda x: x[first:last], batch) for batch in whole]  # noqa: B023
        assert_same(part, want)


@pytest.mark.parametrize("pack_window", [1, 16, 41, 1_000])
def test_an_epoch_holds_each_record_once(texts, pack_window):
    config = make_config(texts, pack_window=pack_window)
    expected = sorted(
        tuple(encode(json.loads(line)["text"])) for line in texts.read_text().splitlines()
    )
    windows = Windows(open_examples(config), seed=0)
    assert windows.per_round == -(-NUM_RECORDS // pack_window)
    orders = []
    for epoch in range(3):
        first = epoch * windows.per_round
        rows = [row for w in range(first, first + windows.per_round) for row in windows[w]]
        found = [tuple(s.tokens.tolist()) for row in rows for s in row]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_hold_the_rows_of_the_windows_without_a_gap(texts):
    config = make_config(texts)
    windows = Windows(open_examples(config), seed=config.train.seed)
    rows = [row for w in range(9) for row in windows[w]]
    expected = [tuple(s.tokens.tolist()) for row in rows for s in row]
    found = [
        s for batch in take(data.train_batches(config), len(rows) // 4) for s in segments(batch)
    ]
    assert found == expected[: len(found)] and len(found) > 2 * NUM_RECORDS


def test_the_seed_decides_the_order(texts):
    first = {
        seed: take(data.train_batches(make_config(texts, seed=seed)), 2) for seed in (0, 1, -3)
    }
    assert_same(take(data.train_batches(make_config(texts, seed=1)), 2), first[1])
    assert len({b[0].tokens.tobytes() for b in first.values()}) == 3
    # One seed's second epoch is not the next one's first.
    windows = [Windows(open_examples(make_config(texts)), seed=s) for s in (0, 1)]
    orders = [[w.record(k) for k in range(2 * NUM_RECORDS)] for w in windows]
    assert orders[0][NUM_RECORDS:] != orders[1][:NUM_RECORDS]


def test_chats_are_rendered_as_harmony_does(chats):
    config = make_config(chats, sequence_length=256, reasoning="low", train_on=("user",))
    expected = {}
    for line in chats.read_text().splitlines():
        tokens, weights = harmony.render(
            json.loads(line)["messages"],
            reasoning="low",
            train_on=("user",),
            tokenizer=tokenizer.get_tokenizer(VOCAB),
        )
        expected[tuple(tokens)] = weights
    windows = Windows(open_examples(config), seed=0)
    rows = [row for w in range(windows.per_round) for row in windows[w]]
    found = {tuple(s.tokens.tolist()): s.weights.tolist() for row in rows for s in row}
    assert found == expected and len(found) == 23
    batch = take(data.train_batches(config), 1)[0]
    assert 0 < batch.weights.sum() < (batch.segment_ids > 0).sum() / 4


def test_texts_and_chats_mix(tmp_path):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y z"}]
    (tmp_path / "book.txt").write_text("One day.\n" * 3)
    write(tmp_path / "a.jsonl", [{"text": "some words"}, {"messages": chat}])
    options = {"sequence_length": 640, "train_on": ("assistant/final=0.5",)}
    config = make_config(tmp_path, context=640, **options)
    examples = open_examples(config)
    found = [examples[i][0] for i in range(3)]
    encoding = tokenizer.get_tokenizer(VOCAB)
    said = [encoding.decode(s.tokens[s.weights > 0].tolist()) for s in found]
    assert said == [
        "some words<|endoftext|>",
        "<|channel|>final<|message|>y z<|return|>",
        "One day.\n" * 3 + "<|endoftext|>",
    ]
    # A text counts as a whole, whatever train_on says of chats.
    assert [set(s.weights.tolist()) for s in found] == [{1.0}, {0.0, 0.5}, {1.0}]
    (batch,) = take(data.train_batches(config), 1)
    assert set(batch.weights[batch.segment_ids > 0].tolist()) == {0.0, 0.5, 1.0}


def test_records_may_say_their_own_reasoning_and_tools(tmp_path):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "Do it."}}]
    file = write(
        tmp_path / "a.jsonl", [{"messages": messages, "tools": tools, "reasoning": "high"}]
    )
    config = make_config(file, sequence_length=512)
    (segment,) = open_examples(config)[0]
    text = tokenizer.get_tokenizer(VOCAB).decode(segment.tokens.tolist())
    assert "Reasoning: high" in text and "Do it." in text


def test_long_records_are_truncated_or_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "1 2 3 4 5 6 7 8 9 " * 10}])
    config = make_config(file)
    whole = encode("1 2 3 4 5 6 7 8 9 " * 10)
    (cut,) = open_examples(config)[1]
    assert cut.tokens.tolist() == whole[:48]
    assert "; 1 truncated" in data.describe(config)
    with pytest.raises(UserError) as error:
        data.train_batches(make_config(file, on_long="refuse"))
    assert str(error.value) == (
        f"{file}:2: {len(whole)} tokens are longer than data.sequence_length (48); shorten it, "
        "raise that, or set data.on_long=truncate"
    )


def test_a_text_file_loses_no_target(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i} and {i * i}\n" for i in range(200)))
    windows = Windows(open_examples(make_config(file, on_long="refuse")), seed=0)
    targets = collections.Counter()
    for w in range(windows.per_round):
        for row in windows[w]:
            assert sum(len(s.tokens) for s in row) <= 48
            for s in row:
                targets.update(s.tokens[1:].tolist())
    stretches = [r.fields["text"] for r in windows.examples.records]
    expected = collections.Counter()
    for i, text in enumerate(stretches):
        tokens = encode(text)
        expected.update(tokens[1:] if i == len(stretches) - 1 else tokens[1:-1])
    assert targets == expected and len(stretches) > 5


def test_nothing_to_train_on(tmp_path, chats):
    for config in (
        make_config(chats, sequence_length=256, train_on=("tool",)),
        make_config(chats, sequence_length=16),  # no answer starts that early
    ):
        with pytest.raises(UserError) as error:
            data.train_batches(config)
        d = config.data
        assert str(error.value) == (
            f"data.train: no token of its 23 records is trained; data.train_on is {d.train_on[0]}, "
            f"and data.sequence_length {d.sequence_length}"
        )


def test_what_only_rendering_shows_stops_or_is_left_out(tmp_path):
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    orphan = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "y"}]
    file = write(tmp_path / "a.jsonl", [{"messages": good}, {"messages": orphan}])
    with pytest.raises(UserError) as error:
        data.train_batches(make_config(file, sequence_length=256))
    assert str(error.value).startswith(f"{file}:2: messages[0].name is missing")
    config = make_config(file, sequence_length=256, on_bad_record="skip")
    assert f"1 bad record left out, the first {file}:2: messages[0].name" in data.describe(config)
    assert len({s for b in take(data.train_batches(config), 3) for s in segments(b)}) == 1


def test_an_error_in_the_background_reaches_the_loop(texts, monkeypatch):
    monkeypatch.setattr(examples_module, "CACHE_TOKENS", 0)
    batches = data.train_batches(make_config(texts))
    texts.write_bytes(b"x" * texts.stat().st_size)  # of the same size
    with pytest.raises(UserError, match=r"changed while it was in use"):
        while True:  # what was read ahead is given first
            next(batches)
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_large_data_is_sampled_and_streamed_to_the_same_batches(texts, monkeypatch):
    config = make_config(texts)
    expected = take(data.train_batches(config), 12)
    exact = data.describe(config)
    examples_module._open.cache_clear()
    for name, value in {"CACHE_TOKENS": 100, "SURVEY_BYTES": 1, "SURVEY_RECORDS": 5}.items():
        monkeypatch.setattr(examples_module, name, value)
    assert open_examples(config).stats.records == 6
    assert_same(take(data.train_batches(config), 12), expected)
    assert " about " in data.describe(config) and " about " not in exact
    examples_module._open.cache_clear()


def test_what_a_sample_misses_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "SURVEY_BYTES", 1)
    monkeypatch.setattr(examples_module, "SURVEY_RECORDS", 2)
    rows = [{"text": ""}] * 5
    rows[3] = {"text": "the only one to train on " * 9}
    file = write(tmp_path / "a.jsonl", rows)
    assert open_examples(make_config(file)).stats.trained == 47
    rows[0] = {"text": "fine"}
    write(file, rows)
    with pytest.raises(UserError, match=rf"^{file}:4: \d+ tokens are longer than"):
        data.train_batches(make_config(file, on_long="refuse"))


def test_changed_files_are_read_anew(texts):
    config = make_config(texts)
    before = open_examples(config)
    old = before[3][0].tokens.tolist()
    assert open_examples(config) is before
    texts.write_bytes(texts.read_bytes().replace(b'"3 ', b'"x '))  # of the same size
    (after,) = open_examples(config)[3]
    assert after.tokens.tolist() != old


def test_describe_says_what_is_there(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "a" * 20}, {"text": ""}, {"text": "b b b"}])
    a, b = len(encode("a" * 20)), len(encode("b b b"))
    assert data.describe(make_config(file, held_out=[file]), held_out=True) == (
        f"data.held_out: 3 records in 1 file; {a + b} tokens ({a + b - 2} trained); "
        f"1 row of 48, {(a + b) / 48:.1%} full; 1 left out with nothing to train"
    )


def test_held_out_batches_are_finite_and_the_same_whatever_the_seed(texts):
    config = make_config(texts, held_out=[texts])
    batches = data.eval_batches(config)
    found = [s for batch in batches for s in segments(batch)]
    assert sorted(found) == sorted(
        tuple(encode(json.loads(line)["text"])) for line in texts.read_text().splitlines()
    )
    rows = sum(int((b.segment_ids.max(axis=1) > 0).sum()) for b in batches)
    assert rows % 4 and len(batches) == -(-rows // 4)
    last = batches[-1]
    assert last.tokens.shape == (4, 48) and not last.weights[rows % 4 :].any()

    assert_same(data.eval_batches(make_config(texts, held_out=[texts], seed=9)), batches)
    limited = make_config(texts, held_out=[texts], eval_batches=2)
    assert_same(data.eval_batches(limited), batches[:2])
    parts = [data.eval_batches(config, rows=rows) for rows in ((0, 2), (2, 4))]
    assert_same(joined(parts), batches)
    assert data.eval_batches(make_config(texts)) == []
    with pytest.raises(UserError, match=r"^data\.held_out: there is no file or folder nowhere"):
        data.eval_batches(make_config(texts, held_out=["nowhere"]))


def test_questions_stop_before_the_assistant_answers(tmp_path):
    def said(role, content, **fields):
        return {"role": role, "content": content, **fields}

    ask, think = said("user", "one?"), said("assistant", "hmm", channel="analysis")
    call = said("assistant", "", tool_calls=[{"name": "f", "arguments": {}}])
    rows = [
        {"messages": [ask, said("assistant", "1", thinking="hmm")], "reasoning": "high"},
        {
            "messages": [
                ask,
                said("assistant", "2"),
                said("user", "x"),
                think,
                said("assistant", "3"),
            ]
        },
        {"messages": [ask, call, said("tool", "4"), said("assistant", "5", channel="final")]},
        {"messages": [ask, call]},
        {"messages": [ask, think]},
        {"messages": [ask]},
        {"text": "no chat"},
        {"messages": [said("user", "long " * 400), said("assistant", "6")]},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    config = make_config(file, held_out=[file], reasoning="low")
    questions = {q.name: q for q in data.eval_questions(config, 99)}
    assert {k: q.answer for k, q in questions.items()} == {
        f"{file}:1": "1",
        f"{file}:2": "3",
        f"{file}:3": "5",
    }
    ends = {1: 1, 2: 3, 3: 3}
    for line, end in ends.items():
        row = rows[line - 1]
        assert questions[f"{file}:{line}"].prompt == harmony.render_prompt(
            row["messages"][:end],
            reasoning=row.get("reasoning", "low"),
            tokenizer=tokenizer.get_tokenizer(VOCAB),
        )
    assert len(data.eval_questions(config, 2)) == 2
    assert data.eval_questions(config, 0) == data.eval_questions(make_config(file), 5) == []


def test_fingerprints_say_what_differs(texts, tmp_path):
    config = make_config(texts)
    then = json.loads(json.dumps(data.fingerprint(config)))
    assert data.differences(then, data.fingerprint(config)) == []
    moved = tmp_path / "elsewhere" / texts.name
    moved.parent.mkdir()
    moved.write_bytes(texts.read_bytes())
    assert data.differences(then, data.fingerprint(make_config(moved))) == []
    # What changes no batch is not in it.
    other = dataclasses.replace(config, train=TrainConfig(steps=7), workdir="x")
    assert data.differences(then, data.fingerprint(other)) == []

    changed = make_config(texts, seed=4, sequence_length=32, train_on=("user",))
    assert data.differences(then, data.fingerprint(changed)) == [
        "data.sequence_length was 48, is 32",
        "data.train_on was ['assistant'], is ['user']",
        "train.seed was 0, is 4",
    ]
    content = texts.read_bytes()
    texts.write_bytes(content.replace(b"ab", b"ac", 1))
    assert data.differences(then, data.fingerprint(config)) == [
        "data file texts.jsonl has other content"
    ]
    texts.write_bytes(content + b"\n")
    assert data.differences(then, data.fingerprint(config)) == [
        f"data file texts.jsonl was {len(content):,} bytes, is {len(content) + 1:,}"
    ]
    both = dataclasses.replace(config.data, train=(str(moved), str(texts)))
    now = data.fingerprint(dataclasses.replace(config, data=both))
    assert data.differences(then, now) == ["data file texts.jsonl (2) is new"]
    assert data.differences(now, then) == ["data file texts.jsonl (2) is gone"]
    turned = {**now, "files": now["files"][::-1]}
    assert "texts.jsonl" in " ".join(data.differences(now, turned))


def test_huge_files_are_hashed_at_places(texts, monkeypatch):
    module = sys.modules["gptoss_jax.data.describe"]  # which a function hides in the room
    monkeypatch.setattr(module, "HASH_WHOLE", 10)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 5)
    config = make_config(texts)
    then = data.fingerprint(config)
    assert "sha256_sampled" in then["files"][0]
    content = texts.read_bytes()
    texts.write_bytes(content[:-2] + b" \n")  # the end is always among the places
    assert data.differences(then, data.fingerprint(config)) == [
        "data file texts.jsonl has other content"
    ]


def test_python_exits_in_silence_with_threads_at_work(texts):
    script = (
        "from gptoss_jax import data\n"
        "from gptoss_jax.config import *\n"
        f"c = Config(model=ModelConfig(vocab_size={VOCAB}),"
        f" data=DataConfig(train=({str(texts)!r},), sequence_length=48, batch_size=4))\n"
        "batches = data.train_batches(c)\n"
        "print(next(batches).tokens.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 48)\n", "")
