"""Mixtures: shares of the tokens, whole epochs of each source, resumed to the byte."""

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptoss_jax.data import examples as examples_module
from gptoss_jax.data.examples import open_sources
from gptoss_jax.data.mixture import Mixture, plan
from gptoss_jax.data.packing import Segment
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions", "sources")
VOCAB = 700


def make_config(train, weights, *, seed=0, steps=1_000, **options):
    options = {"sequence_length": 48, "batch_size": 4, "pack_window": 16, **options}
    data_config = DataConfig(train=tuple(map(str, train)), weights=tuple(weights), **options)
    return Config(
        model=ModelConfig(vocab_size=VOCAB, context=512),
        data=data_config,
        train=TrainConfig(seed=seed, steps=steps),
    )


def write(path, lengths, *, mark, seed=3):
    """Write a text for each length in words, each of which starts with the source's mark."""
    rng = random.Random(seed)
    rows = [
        {"text": mark + " ".join(rng.choice("abc") for _ in range(n)) + f" {i}"}
        for i, n in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Three sources: of short records, of a few long ones, and of very few."""
    rng = random.Random(7)
    return (
        write(tmp_path / "short.jsonl", [rng.randint(1, 9) for _ in range(60)], mark="S"),
        write(tmp_path / "long.jsonl", [rng.randint(20, 40) for _ in range(25)], mark="L"),
        write(tmp_path / "few.jsonl", [5, 11, 2], mark="F"),
    )


def take(batches, n):
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(x, field), getattr(y, field))
            assert getattr(x, field).dtype == getattr(y, field).dtype


def rows_of(batches):
    """List (source, tokens that are no padding, text) of each row."""
    encoding = tokenizer.get_tokenizer(VOCAB)
    found = []
    for batch in batches:
        for source, ids, tokens in zip(batch.sources, batch.segment_ids, batch.tokens, strict=True):
            text = encoding.decode(tokens[ids > 0].tolist())
            found.append((int(source), int((ids > 0).sum()), text))
    return found


@pytest.mark.parametrize(
    "length, weights", [(256, (1, 1, 1)), (512, (0.7, 0.2, 0.1)), (256, (2, 60, 9))]
)
def test_tokens_are_shared_out_within_a_percent(tmp_path, length, weights):
    rng = random.Random(1)
    sources = (
        write(tmp_path / "short.jsonl", [rng.randint(1, 8) for _ in range(900)], mark="S"),
        write(tmp_path / "long.jsonl", [rng.randint(100, 400) for _ in range(60)], mark="L"),
        write(tmp_path / "mixed.jsonl", [rng.choice((3, 250)) for _ in range(40)], mark="M"),
    )
    config = make_config(sources, weights, sequence_length=length, batch_size=8)
    batches = data.train_batches(config)
    assert batches.source_names == ("short", "long", "mixed")
    given, total, text = [0, 0, 0], 0, ["", "", ""]
    while total < 100_000:
        batch = next(batches)
        assert batch.sources.shape == (8,) and batch.sources.dtype == np.int32
        for source, tokens, said in rows_of([batch]):
            given[source] += tokens
            total += tokens
            text[source] = said
            for n, weight in zip(given, weights, strict=True):  # every prefix, within some rows
                assert abs(n - weight / sum(weights) * total) <= 2 * length
    batches.close()
    for n, weight in zip(given, weights, strict=True):
        assert abs(n / total - weight / sum(weights)) < 0.01
    assert [said[0] for said in text] == ["S", "L", "M"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.lists(st.integers(1, 100), min_size=1, max_size=300),
)
def test_no_source_gets_ahead_by_more_than_a_row(weights, sizes):
    mixture, share = Mixture(weights), [w / sum(weights) for w in weights]
    for n in sizes:
        mixture.count(mixture.pick(), [Segment(np.zeros(n, np.int32), np.zeros(n, np.float32))])
        total = sum(mixture.tokens)
        ahead = [g - w * total for g, w in zip(mixture.tokens, share, strict=True)]
        assert max(ahead) <= 100 + 1e-6 and min(ahead) >= -100 * (len(weights) - 1) - 1e-6
    assert sum(mixture.tokens) == sum(sizes)


def test_each_source_goes_through_its_own_epochs(files):
    config = make_config(files, (1, 2, 1))
    sources = open_sources(config)
    windows = [plan(source, config) for source in sources]
    assert [w.epochs for w in windows] == [1, 1, 5]  # 3 records are packed with themselves
    orders = []
    for w, n in zip(windows, (60, 25, 3), strict=True):
        rows = [row for k in range(2 * w.per_round) for row in w[k]]
        found = [tuple(s.tokens.tolist()) for row in rows for s in row]
        assert len(found) == 2 * w.epochs * n and len(set(found)) == n
        assert {found.count(segment) for segment in set(found)} == {2 * w.epochs}
        orders.append([w.record(k) for k in range(3)])
    twice = make_config((files[0], files[0]), (1, 1))
    a, b = (plan(source, twice) for source in open_sources(twice))
    assert [a.record(k) for k in range(9)] != [b.record(k) for k in range(9)]


def test_a_seed_gives_the_same_bytes_interrupted_or_not(files):
    config = make_config(files, (5, 3, 1))
    whole, states = [], []
    batches = data.train_batches(config)
    for _ in range(40):
        states.append(json.loads(json.dumps(batches.get_state())))
        whole.append(next(batches))
    batches.close()
    assert min(s["window"] for s in states[-1]["sources"]) > 1
    examples_module._open.cache_clear()
    assert_same(take(data.train_batches(config), 40), whole)
    other = take(data.train_batches(make_config(files, (5, 3, 1), seed=1)), 3)
    assert other[0].tokens.tobytes() != whole[0].tokens.tobytes()
    for step in (0, 1, 17, 38):
        resumed = data.train_batches(config)
        resumed.set_state(states[step])
        assert resumed.get_state() == states[step]
        assert_same(take(resumed, 2), whole[step : step + 2])
    # The state is where the tokens given stand, too.
    given = [0, 0, 0]
    for source, tokens, _ in rows_of(whole[:39]):
        given[source] += tokens
    assert [s["tokens"] for s in states[39]["sources"]] == given


def test_hosts_share_the_rows(files):
    config = make_config(files, (1, 1, 1))
    whole = take(data.train_batches(config), 12)

    def host(i):
        return data.train_batches(config, rows=(2 * i, 2 * i + 2))

    parts = [take(host(i), 12) for i in range(2)]
    assert parts[0][0].sources.shape == (2,)
    for step, batch in enumerate(whole):
        for field in FIELDS:
            joined = np.concatenate([getattr(part[step], field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(batch, field))


def test_without_weights_there_are_no_sources(files):
    batches = data.train_batches(make_config(files, ()))
    assert batches.source_names == ()
    assert set(batches.get_state()) == {"step", "window", "row"}
    assert take(batches, 1)[0].sources is None
    # A mixture of one has one.
    batches = data.train_batches(make_config((f"x={files[0]}",), (3,)))
    assert batches.source_names == ("x",)
    assert not take(batches, 1)[0].sources.any()


def test_describe_says_what_each_source_gives(files):
    config = make_config((files[0], f"bulk={files[1]}"), (1, 3), steps=50)
    lines = data.describe(config).splitlines()
    batches = take(data.train_batches(config), 50)
    tokens = [sum(n for s, n, _ in rows_of(batches) if s == i) for i in range(2)]
    head, *parts = lines
    assert head.startswith("data.train: a mixture of 2 sources, about ")
    assert head.endswith(" tokens in 50 steps")
    said = int(head.split("about ")[1].split(" ")[0].replace(",", ""))
    assert abs(said / sum(tokens) - 1) < 0.03
    for part, n, source, name, share in zip(
        parts, tokens, open_sources(config), ("short", "bulk"), ("25.0%", "75.0%"), strict=True
    ):
        count = len(source.examples)
        assert part.startswith(f"  {name}: {share} of the tokens, ")
        epochs = float(part.split("tokens, ")[1].split(" epochs")[0])
        assert abs(epochs / (n / source.examples.stats.tokens) - 1) < 0.03
        assert (
            f" epochs; {count} records in 1 file; {source.examples.stats.tokens:,} tokens" in part
        )


def test_fingerprints_cover_the_mixture(files, tmp_path):
    config = make_config(files, (1, 2, 1))
    plain = make_config(files, ())
    then = json.loads(json.dumps(data.fingerprint(config)))

    def changes(then, config):
        return data.differences(then, data.fingerprint(config))

    assert changes(then, config) == changes(then, make_config(files, (0.5, 1, 0.5))) == []
    named = make_config((f"x={files[0]}", *files[1:]), (1, 2, 1))
    assert changes(then, named) == []
    assert changes(then, make_config(files, (2, 1, 1))) == [
        "data.weights was [0.25, 0.5, 0.25], is [0.5, 0.25, 0.25]"
    ]
    assert changes(then, plain) == [
        "data.weights was [0.25, 0.5, 0.25], is not given",
        "files a source was [1, 1, 1], is not given",
    ]
    assert changes(data.fingerprint(plain), config)[0] == (
        "data.weights was not given, is [0.25, 0.5, 0.25]"
    )
    assert "data.weights" not in data.fingerprint(plain)["settings"]
    assert changes(then, make_config(files[::-1], (1, 2, 1))) == [
        "the data files come in another order"
    ]
    both = tmp_path / "both"
    both.mkdir()
    for file in files[:2]:
        (both / file.name).write_bytes(file.read_bytes())
    grouped = make_config((both, files[2]), (1, 1))
    split = make_config((sorted(both.iterdir())[0], sorted(both.iterdir())[1], files[2]), (1, 1, 1))
    assert "files a source was [2, 1], is [1, 1, 1]" in changes(data.fingerprint(grouped), split)


def test_a_source_that_is_bad_is_named(files, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [], mark="")
    with pytest.raises(UserError) as error:
        data.train_batches(make_config((files[0], f"none={empty}"), (1, 1)))
    assert str(error.value) == f"data.train (none) holds no record: {empty}"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(UserError) as error:
        data.train_batches(make_config((files[0], f"none={empty}"), (1, 1)))
    assert str(error.value).startswith("data.train (none): no token of its 1 records is trained")
    for weights, problem in {
        (1,): "data.weights has 1 numbers for the 3 entries of data.train: give one for each",
        (1, 0, 1): "data.weights is 1, 0, 1: each must be positive",
        (1, -2, 1): "data.weights is 1, -2, 1: each must be positive",
        (1, float("nan"), 1): "data.weights is 1, nan, 1: each must be positive",
        (1, float("inf"), 1): "data.weights is 1, inf, 1: each must be positive",
    }.items():
        with pytest.raises(UserError) as error:
            make_config(files, weights)
        assert str(error.value) == problem


def test_a_file_that_changes_stops_the_run_even_if_it_is_not_read_again(files):
    for weights in ((1, 1, 1), ()):
        config = make_config(files, weights)
        batches = data.train_batches(config)
        next(batches)
        content = files[1].read_bytes()
        other = files[1].with_suffix(".new")
        other.write_bytes(content + b'{"text": "new"}\n')
        other.replace(files[1])  # at once
        with pytest.raises(UserError) as error:
            for _ in range(200):
                next(batches)
        batches.close()
        assert str(error.value) == (
            f"{files[1]}: changed while it was in use (it was {len(content):,} bytes, is "
            f"{len(content) + 16:,}); put it back as it was and start again, which goes on from "
            "the last checkpoint"
        )
        files[1].write_bytes(content)
        assert data.differences(data.fingerprint(config), data.fingerprint(config)) == []


def test_held_out_data_are_not_mixed(files):
    config = make_config(files[:2], (1, 9))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, held_out=(f"x={files[2]}",))
    )
    (batch,) = data.eval_batches(config)
    assert batch.sources is None and batch.segment_ids.max() == 3
    assert data.describe(config, held_out=True).startswith("data.held_out: 3 records in 1 file; ")
