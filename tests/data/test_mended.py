"""A run goes on over data that was mended: what was seen stays as it was."""

import collections
import json
import random

import numpy as np
import pytest

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptoss_jax.data import mended
from gptoss_jax.data.examples import open_examples, open_sources
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

N = 60


def chat(k, answer=""):
    said = {"role": "assistant", "content": answer or f"it is {k}" + " and more" * (k % 7)}
    return json.dumps({"messages": [{"role": "user", "content": f"question {k}?"}, said]})


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def make_config(folder, *files, pack_window=20, **settings):
    train = TrainConfig(seed=settings.pop("seed", 3))
    settings = {"sequence_length": 256, "batch_size": 2, "pack_window": pack_window, **settings}
    return Config(
        model=ModelConfig(vocab_size=tokenizer.VOCAB_SIZE),
        data=DataConfig(train=files, **settings),
        train=train,
        workdir=str(folder / "run"),
    )


def begin(config, folder):
    """Do what a run does at its start and at its first checkpoint."""
    run = folder / "run"
    run.mkdir()
    data.keep_records(config, run)
    (run / "checkpoints" / "1").mkdir(parents=True)


def texts(batch):
    """Return the texts of a batch's segments, in order."""
    encoding = tokenizer.get_tokenizer(tokenizer.VOCAB_SIZE)
    found = []
    for row, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        found += [encoding.decode(row[ids == s].tolist()) for s in range(1, ids.max() + 1)]
    return found


def question(text):
    return int(text.split("question ")[1].split("?")[0])


def take(batches, count):
    found = [texts(next(batches)) for _ in range(count)]
    state = batches.get_state()
    batches.close()
    return found, state


def epoch(config, state, *, changed, seen):
    """Go on from a state until each question but those in `seen` was asked; return the texts."""
    batches = data.train_batches(config)
    batches.set_state(state, changed=changed)
    found = []
    while len(found) < seen:
        found += texts(next(batches))
    batches.close()
    return found


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_after_mending_each_record_is_trained_once_an_epoch(tmp_path, steps):
    lines = [chat(k) for k in range(N)]
    file = write(tmp_path / "a.jsonl", lines)
    config = make_config(tmp_path, file)
    begin(config, tmp_path)
    before = data.fingerprint(config)
    taken, state = take(data.train_batches(config), steps)
    seen = [question(t) for batch in taken for t in batch]
    whole = epoch(config, json.loads(json.dumps(state)), changed=False, seen=N - len(seen))

    late = next(question(t) for t in reversed(whole[: N - len(seen)]))  # not seen so far
    lines[late] = chat(late, "mended, and longer than it was before")
    lines[seen[0]] = chat(seen[0], "mended too late")
    gone = next(question(t) for t in whole if question(t) not in (late, seen[0]))
    lines[gone] = "{"
    lines.insert(10, chat(1000, "new"))
    write(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: not JSON .*data.on_bad_record=skip"):
        data.train_batches(config)
    config = make_config(tmp_path, file, on_bad_record="skip")
    assert data.changes(config, before, data.fingerprint(config)) == []
    left = N - len(seen) - 1
    after = epoch(config, state, changed=True, seen=left)[:left]
    assert collections.Counter(map(question, after)) == collections.Counter(
        set(range(N)) - set(seen) - {gone}
    )
    assert any("mended, and longer" in t for t in after)
    assert not any("mended too late" in t for t in after)
    text = data.describe(config)
    counts = "2 changed, 1 left out now, 1 new, which this run does not train"
    assert f"records since the run began: {counts}" in text
    assert f"{N - 1} records in 1 file" in text


def test_a_second_checkpoint_in_the_mended_window_goes_on_too(tmp_path):
    lines = [chat(k) for k in range(N)]
    file = write(tmp_path / "a.jsonl", lines)
    config = make_config(tmp_path, file, pack_window=N)
    begin(config, tmp_path)
    first, state = take(data.train_batches(config), 2)
    lines[7] = chat(7, "mended")
    write(tmp_path / "a.jsonl", lines)
    batches = data.train_batches(config)
    batches.set_state(state, changed=True)
    second, state = take(batches, 2)
    assert "without" in state and "seen" in state
    seen = [question(t) for batch in first + second for t in batch]
    same = epoch(config, state, changed=False, seen=N - len(seen))[: N - len(seen)]
    assert sorted(seen + list(map(question, same))) == list(range(N))
    lines[8] = chat(8, "mended again")
    write(tmp_path / "a.jsonl", lines)
    third = epoch(config, state, changed=True, seen=N - len(seen))[: N - len(seen)]
    assert sorted(seen + list(map(question, third))) == list(range(N))


def test_a_checkpoint_of_before_without_what_was_seen(tmp_path):
    lines = [chat(k) for k in range(N)]
    file = write(tmp_path / "a.jsonl", lines)
    config = make_config(tmp_path, file, pack_window=N)
    begin(config, tmp_path)
    first, state = take(data.train_batches(config), 2)
    del state["seen"]
    batches = data.train_batches(config)
    batches.set_state(state)
    second, state = take(batches, 1)
    seen = [question(t) for batch in first + second for t in batch]
    left = N - len(seen)
    lines[7] = chat(7, "mended")
    write(tmp_path / "a.jsonl", lines)
    rest = epoch(config, state, changed=True, seen=left)[:left]
    assert sorted(seen + list(map(question, rest))) == list(range(N))


def test_a_text_that_is_read_otherwise_is_another_record(tmp_path):
    rendered = (
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>"
    )
    file = write(tmp_path / "a.jsonl", [json.dumps({"text": rendered})] * 3)
    config = make_config(tmp_path, file)
    begin(config, tmp_path)
    before = data.fingerprint(config)
    plain = make_config(tmp_path, file, plain_special_tokens=True)
    assert "data.plain_special_tokens" in data.changes(plain, before, data.fingerprint(plain))[0]


def test_records_are_known_in_another_file_and_order(tmp_path):
    lines = [chat(k) for k in range(N)]
    config = make_config(tmp_path, write(tmp_path / "a.jsonl", lines))
    begin(config, tmp_path)
    before = data.fingerprint(config)
    taken, _ = take(data.train_batches(config), 4)
    random.Random(0).shuffle(lines)
    (tmp_path / "a.jsonl").unlink()
    files = [write(tmp_path / "b.jsonl", lines[:20]), write(tmp_path / "c.jsonl", lines[20:])]
    config = make_config(tmp_path, *files)
    assert data.changes(config, before, data.fingerprint(config)) == []
    assert take(data.train_batches(config), 4)[0] == taken
    assert "since the run began" not in data.describe(config)


def test_sources_of_a_mixture_are_mended_one_by_one(tmp_path):
    lines = [chat(k) for k in range(N)]
    files = [write(tmp_path / "a.jsonl", lines[:9]), write(tmp_path / "b.jsonl", lines[9:])]
    config = make_config(tmp_path, *files, weights=(1.0, 2.0), turns="split")
    begin(config, tmp_path)
    before = data.fingerprint(config)
    _, state = take(data.train_batches(config), 2)
    write(tmp_path / "a.jsonl", [chat(0, "mended"), *lines[1:5]])
    write(tmp_path / "a2.jsonl", lines[5:9])
    config = make_config(
        tmp_path, f"a={tmp_path}/a*.jsonl", files[1], weights=(1.0, 2.0), turns="split"
    )
    assert data.changes(config, before, data.fingerprint(config)) == []
    batches = data.train_batches(config)
    batches.set_state(state, changed=True)
    found, _ = take(batches, 8)
    assert any("mended" in t for batch in found for t in batch)
    assert [s.examples.mended.changed for s in open_sources(config)] == [1, 0]


def test_other_data_and_other_settings_stay_another_run(tmp_path):
    file = write(tmp_path / "a.jsonl", [chat(k) for k in range(N)])
    config = make_config(tmp_path, file)
    begin(config, tmp_path)
    before = data.fingerprint(config)
    other = make_config(tmp_path, file, reasoning="high")
    assert data.changes(other, before, data.fingerprint(other)) == [
        "data.reasoning was medium, is high"
    ]
    write(tmp_path / "a.jsonl", [chat(k) if k < 29 else chat(k, "other") for k in range(N)])
    assert "data file a.jsonl" in data.changes(config, before, data.fingerprint(config))[0]
    assert not open_examples(config).follows


def test_a_text_file_must_stay_as_it_is(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one line\n" * 4_000)
    config = make_config(tmp_path, str(file))
    begin(config, tmp_path)
    before = data.fingerprint(config)
    file.write_text("one line\n" * 4_000 + "more\n")
    assert "data file a.txt was" in data.changes(config, before, data.fingerprint(config))[0]


def test_a_folder_without_a_checkpoint_holds_no_run(tmp_path):
    file = write(tmp_path / "a.jsonl", [chat(k) for k in range(N)])
    config = make_config(tmp_path, file)
    run = tmp_path / "run"
    run.mkdir()
    data.keep_records(config, run)
    (run / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)  # it was cut off
    assert mended.read(run) is None and not open_examples(config).follows
    write(tmp_path / "a.jsonl", [chat(k) for k in range(N + 5)])
    data.keep_records(config, run)  # the run begins anew, with these records
    (run / "checkpoints" / "1").mkdir()
    kept = mended.read(run)
    assert kept is not None and [len(source) for source in kept] == [N + 5]
    data.keep_records(make_config(tmp_path, file, on_long="refuse"), run)
    assert mended.read(run) == kept


@pytest.mark.parametrize(
    ("then", "now", "places", "changed", "new"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3], 0, 0),
        ([1, 2, 3, 4], [4, 3, 2, 1], [3, 2, 1, 0], 0, 0),
        ([1, 2, 3, 4], [1, 9, 3, 4], [0, 1, 2, 3], 1, 0),
        ([1, 2, 3, 4], [9, 2, 3, 4], [0, 1, 2, 3], 1, 0),
        ([1, 2, 3, 4], [1, 3, 4], [0, -1, 1, 2], 0, 0),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3], 0, 2),
        ([5, 5, 5, 6], [5, 6, 5], [0, 2, -1, 1], 0, 0),
        ([1, 2, 3, 4, 5, 6], [1, 8, 9, 4, 5, 6], [0, 1, 2, 3, 4, 5], 2, 0),
        ([1, 2, 3, 4, 5, 6], [1, 9, 4, 5, 6], [0, 1, -1, 2, 3, 4], 1, 0),
    ],
)
def test_places_are_aligned(then, now, places, changed, new):
    found = mended.align(then, now)
    assert found is not None
    assert found.places.tolist() == places
    assert (found.changed, found.new, found.gone) == (changed, new, places.count(-1))
    used = found.places[found.places >= 0]
    assert len(np.unique(used)) == len(used)


def test_other_records_are_not_aligned():
    assert mended.align([1, 2, 3], [1, 8, 9]) is None
    assert mended.align([1, 2], [1, 9]) is not None
