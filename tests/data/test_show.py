"""Tokens of packed batches, marked as the loss counts them."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_jax.data import show
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.harmony import tokenizer

VOCAB = 700


@pytest.mark.parametrize("plain", [True, False])
def test_each_token_is_marked_as_the_loss_counts_it(plain):
    encoding = tokenizer.get_tokenizer(VOCAB)
    end = tokenizer.special_id(encoding, "<|end|>")
    ids = [97 - 33, 98 - 33, end, *encoding.encode_ordinary("xyz"), end]
    assert encoding.decode(ids[:2]) == "ab"
    weights = np.array([1, 1, 0, 0, 1, 1, 1], np.float32)
    assert len(ids) == 7
    segments = [Segment(np.array(ids, np.int32), weights), Segment(np.array(ids[:2]), weights[:2])]
    batch = fill([segments], 12)
    _, head, row, *shown = show.describe([batch], encoding, plain=plain)
    assert head.plain == "\n=== batch 0: 1 row of 12; 9 tokens, 5 trained, 3 padding"
    assert row.plain == "\n--- row 0: 2 segments, 9 tokens, 5 trained, 3 padding"
    assert shown[0].plain == "- segment 1: 7 tokens, 4 trained"
    assert shown[2].plain == "- segment 2: 2 tokens, 1 trained"
    text = shown[1]
    marked = "a[[b]]<|end|>x[[yz<|end|>]]"
    if plain:
        assert text.plain == marked and shown[3].plain == "a[[b]]"
        return
    assert text.plain == "ab<|end|>xyz<|end|>"
    said = "".join(
        f"[[{text.plain[s.start : s.end]}]]"
        if s.style in (show.TRAINED, show.TRAINED_SPECIAL)
        else text.plain[s.start : s.end]
        for s in text.spans
    )
    assert said.replace("]][[", "") == marked
    assert {s.style for s in text.spans if "<|" in text.plain[s.start : s.end]} == {
        show.SPECIAL,
        show.TRAINED_SPECIAL,
    }


@pytest.mark.parametrize("plain", [True, False])
def test_a_weight_other_than_1_is_said(plain):
    encoding = tokenizer.get_tokenizer(VOCAB)
    ids = np.array([ord(c) - 33 for c in "abxyz"], np.int32)
    assert encoding.decode(ids.tolist()) == "abxyz"
    weights = np.array([1, 0.3, 0.3, 0, 1], np.float32)
    batch = fill([[Segment(ids, weights)]], 8)
    *_, head, text = show.describe([batch], encoding, plain=plain)
    assert head.plain == "- segment 1: 5 tokens, 3 trained"
    assert text.plain == ("a[0.3[bx]]y[[z]]" if plain else "a0.3bxyz")
    assert plain or [text.plain[s.start : s.end] for s in text.spans if s.style == show.FACTOR]


@pytest.mark.parametrize("plain", [True, False])
def test_a_text_that_spells_a_special_token_looks_unlike_it(plain):
    encoding = tokenizer.get_tokenizer()
    end = tokenizer.special_id(encoding, "<|end|>")
    ids = np.array([*encoding.encode_ordinary("a <|end|> <|b"), end], np.int32)
    batch = fill([[Segment(ids, np.zeros(len(ids), np.float32))]], 32)
    *_, text = show.describe([batch], encoding, plain=plain)
    assert text.plain == "a \u2039|end|\u203a <|b<|end|>"
