"""Cached decoding against the full forward pass, and what a caller may ask of a Sampler."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import get_tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters.tree import is_weight
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import MXFP4

# A banded layer and a full one; sizes pairwise distinct.
CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=2,
    d_model=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    num_experts=5,
    active_experts=3,
    d_expert=64,
    window=6,
    context=32,
    dtype="float32",
    param_dtype="float32",
)
# Shorter than the window, on its edge, and past it. With TOKENS they fill the context, and all
# tests share the few shapes that this compiles to.
PROMPTS = [
    [int(i) for i in np.random.default_rng(n).integers(0, CONFIG.vocab_size, n)]
    for n in (1, 5, 6, 7, 12)
]
TOKENS = 20
WARM = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01}


@cache
def make(**changes):
    """A model with random parameters, made by numpy: compiling an init would cost seconds."""
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    random = np.random.default_rng(1)

    def leaf(path, x):
        values = random.normal(size=x.shape) * 0.15
        return jnp.asarray(values + ("norm" in str(path)), x.dtype)

    return model, jax.tree_util.tree_map_with_path(leaf, model.abstract_params())


def make_packed():
    """The same with random packed experts, and the tree with their values in place of them."""
    model, dense = make(experts="dense")
    random = np.random.default_rng(2)
    experts = dict(dense["layers"]["experts"])
    decoded = dict(experts)
    for name in ("gate_up_weight", "down_weight"):
        *lead, size = experts[name].shape
        experts[name] = MXFP4(
            jnp.asarray(random.integers(0, 256, (*lead, size // 32, 16)), jnp.uint8),
            jnp.asarray(random.integers(121, 125, (*lead, size // 32)), jnp.uint8),
        )
        decoded[name] = mxfp4.decode(experts[name], jnp.float32)

    def put(experts):
        return {**dense, "layers": {**dense["layers"], "experts": experts}}

    packed_model = Transformer(dataclasses.replace(CONFIG, experts="mxfp4"))
    return (packed_model, put(experts)), (model, put(decoded))


@partial(jax.jit, static_argnums=0)
def _full(model: Transformer, params, tokens):
    return model.apply({"params": params}, tokens)


def full_logprobs(model: Transformer, params, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """log_softmax of the training forward at each position that sampled a token, [len(tokens), V].

    All are padded to one length, so that the forward compiles once.
    """
    row = np.zeros((1, CONFIG.context), np.int32)
    row[0, : len(prompt) + len(tokens)] = prompt + tokens
    logits = _full(model, params, row)
    rows = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
    return rows[len(prompt) - 1 : len(prompt) + len(tokens) - 1]


@pytest.fixture(scope="module")
def greedy():
    return Sampler(*make()).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_pattern": "full", "sinks": "off", "num_layers": 1},
        {"layer_pattern": "banded", "qk_norm": True, "norm": "post", "num_layers": 1},
    ],
    ids=["1:1", "full", "banded"],
)
def test_cached_decoding_equals_the_full_forward(changes: dict):
    model, params = make(**changes)
    out = Sampler(model, params).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        rows = full_logprobs(model, params, prompt, tokens)
        assert len(tokens) == len(logprobs) == TOKENS
        assert rows.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(logprobs, rows.max(-1), atol=1e-5)


def test_a_sampler_never_drops():
    model, params = make(capacity_factor=1.25)
    assert Sampler(model, params).model == make()[0]


def test_sampled_logprobs_are_those_of_the_training_forward():
    model, params = make()
    out = Sampler(model, params).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[], seed=3, **WARM)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        rows = full_logprobs(model, params, prompt, tokens)
        np.testing.assert_allclose(logprobs, rows[np.arange(TOKENS), tokens], atol=1e-5)
        assert rows.argmax(-1).tolist() != tokens  # it did sample


def test_a_ragged_batch_equals_one_by_one(greedy):
    sampler = Sampler(*make())
    seeds = [11, 12, 13, 14, 15]
    warm = sampler.generate(PROMPTS, max_tokens=TOKENS, stop_ids=[], seed=seeds, **WARM)
    for i, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], max_tokens=TOKENS, stop_ids=[])
        assert alone.tokens == [greedy.tokens[i]]
        np.testing.assert_allclose(alone.logprobs[0], greedy.logprobs[i], atol=1e-5)
        drawn = sampler.generate([prompt], max_tokens=TOKENS, stop_ids=[], seed=seeds[i], **WARM)
        assert drawn.tokens == [warm.tokens[i]]


def test_seeds_repeat_and_rows_of_one_seed_differ():
    sampler = Sampler(*make())

    def draw(seed) -> list[list[int]]:
        prompts = [PROMPTS[1]] * 5
        return sampler.generate(prompts, max_tokens=TOKENS, stop_ids=[], seed=seed, **WARM).tokens

    first = draw(4)
    assert draw(4) == first
    assert len({tuple(row) for row in first}) == 5
    other = draw(5)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert draw([4] * 5) == [first[0]] * 5


def test_stop_ids_end_a_row_and_are_kept(greedy):
    stop = greedy.tokens[1][4]
    out = Sampler(*make()).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[7_000, stop])
    for tokens, logprobs, whole in zip(out.tokens, out.logprobs, greedy.tokens, strict=True):
        end = whole.index(stop) + 1 if stop in whole else TOKENS
        assert tokens == whole[:end]
        assert len(logprobs) == end
    assert len(out.tokens[1]) <= 5


def test_the_ends_of_answers_calls_and_texts_stop_by_default():
    model, params = make()
    encoding = get_tokenizer(CONFIG.vocab_size)
    answer, text, call = (
        encoding.encode_single_token(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")
    )
    # One of two opposite rows wins whatever the hidden state, and the other one when they swap.
    sampled, sampler = set(), Sampler(model, params)
    for ends in ([answer, text], [text, answer], [call, text]):
        weight = np.zeros((CONFIG.vocab_size, CONFIG.d_model), np.float32)
        weight[ends] = np.array([[1.0], [-1.0]])
        sampler.renew({**params, "unembedding": {"weight": jnp.asarray(weight)}})
        out = sampler.generate(PROMPTS, max_tokens=TOKENS)
        assert all(len(row) == 1 and row[0] in ends for row in out.tokens)
        assert out.tokens_per_second == 0
        sampled |= {row[0] for row in out.tokens}
    assert {answer, text} <= sampled
    on = sampler.generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    assert all(len(row) == TOKENS for row in on.tokens)


def test_max_tokens_is_obeyed_up_to_the_context(greedy):
    sampler = Sampler(*make())
    for count in (1, 2, 17):
        out = sampler.generate(PROMPTS, max_tokens=count, stop_ids=[])
        assert out.tokens == [row[:count] for row in greedy.tokens]
    out = sampler.generate(PROMPTS[:1], max_tokens=CONFIG.context - 1, stop_ids=[])
    assert len(out.tokens[0]) == CONFIG.context - 1
    assert out.tokens[0][:TOKENS] == greedy.tokens[0]
    assert out.decode_seconds > 0
    assert out.tokens_per_second > 0


def test_a_stream_is_what_generate_returns():
    sampler = Sampler(*make())
    out = sampler.generate([PROMPTS[3]], max_tokens=TOKENS, stop_ids=[], seed=6, **WARM)
    stop = out.tokens[0][13]
    out = sampler.generate([PROMPTS[3]], max_tokens=TOKENS, stop_ids=[stop], seed=6, **WARM)
    stream = list(sampler.stream(PROMPTS[3], max_tokens=TOKENS, stop_ids=[stop], seed=6, **WARM))
    assert [item.token for item in stream] == out.tokens[0]
    assert [item.logprob for item in stream] == out.logprobs[0]


def test_other_values_compile_nothing():
    compiled = []

    def listen(event: str, *args, **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(config: ModelConfig, params, shift: int) -> None:
        sampler = Sampler(Transformer(config), params)
        prompts = [[shift, *row[shift:]] for row in PROMPTS]
        cold, warm = {}, {"temperature": shift / 2, "top_p": 0.2 * shift, "top_k": 5 * shift}
        for rules in (cold, warm, {**warm, "min_p": 0.1 * shift}):
            sampler.generate(
                prompts,
                max_tokens=15 + shift,
                seed=shift,
                stop_ids=list(range(shift)),
                **rules,
            )

    _, params = make()
    others = jax.block_until_ready(jax.tree.map(lambda x: x * 0.9, params))
    run(CONFIG, params, 1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(dataclasses.replace(CONFIG), others, 3)
        assert not compiled
        jax.jit(lambda x: x + 41)(1)  # the counter counts
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_packed_experts_sample_as_their_decoded_values():
    packed, dense = make_packed()
    one = Sampler(*packed).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    other = Sampler(*dense).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    assert one.tokens == other.tokens
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_sampler_takes_new_parameters_and_keeps_what_it_made_of_packed_ones():
    (model, params), _ = make_packed()
    sampler = Sampler(model, params)
    experts = sampler.params["layers"]["experts"]

    def train(x):  # all but the packed bytes, which nothing trains
        return x if x.dtype == jnp.uint8 else x * 1.1

    new = jax.tree.map(train, params)
    sampler.renew(new)
    want = Sampler(model, new)
    chex.assert_trees_all_equal(sampler.params, want.params)
    renewed = sampler.params["layers"]["experts"]
    assert renewed["down_weight"] is experts["down_weight"]
    assert renewed["down_bias"] is not experts["down_bias"]
    found, expected = (s.generate(PROMPTS, max_tokens=TOKENS, stop_ids=[]) for s in (sampler, want))
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_stacks_become_tuples_on_a_cpu_and_tuples_stay():
    model, params = make()
    first = Sampler(model, params)
    leaves = jax.tree.leaves(first.params["layers"], is_leaf=is_weight)
    assert all(isinstance(leaf, tuple) and len(leaf) == 2 for leaf in leaves)
    assert Sampler(model, first.params).params is first.params
    assert isinstance(params["layers"]["moe_norm"]["scale"], jax.Array)  # the caller's stay


def test_no_prompts_give_nothing():
    out = Sampler(*make()).generate([], max_tokens=3)
    assert out.tokens == out.logprobs == []
    assert out.tokens_per_second == 0


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 2], {}, "prompt 0 is no list of ids"),
        ([[3, 320]], {}, "prompt 0: id 320 .*vocabulary"),
        ([[4], [3, -1]], {}, "prompt 1: id -1 .*vocabulary"),
        ([[0.5]], {}, "prompt 0: .*integers"),
        ([[3]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[3] * 30], {"max_tokens": 3}, "30 tokens and max_tokens .3. .*model.context .32."),
        ([[3]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[3]], {"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ([[3]], {"seed": -1}, "seed is -1"),
        ([[3]], {"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
    ],
)
def test_bad_input_is_one_line_that_names_it(prompts, options: dict, named: str):
    options = {"max_tokens": 4, "stop_ids": [], **options}
    with pytest.raises(UserError, match=named) as refused:
        Sampler(*make()).generate(prompts, **options)
    assert "\n" not in str(refused.value)


def test_id_201088_is_refused_by_a_real_vocabulary():
    """o200k_harmony names that id, and gpt-oss has no embedding for it."""
    config = dataclasses.replace(CONFIG, vocab_size=201_088, d_model=2, num_layers=1)
    model = Transformer(config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.abstract_params())
    with pytest.raises(UserError, match=r"id 201088 .*vocabulary"):
        Sampler(model, params).generate([[201_088]], max_tokens=1, stop_ids=[])


def test_a_stream_checks_before_it_starts():
    with pytest.raises(UserError, match="prompt 0 is empty"):
        Sampler(*make()).stream([], max_tokens=3)


@pytest.mark.parametrize("piece", [4, 7])
def test_a_prompt_read_in_pieces_gives_what_it_gives_at_once(
    monkeypatch: pytest.MonkeyPatch, piece: int
):
    """Pieces shorter and longer than the window; prompts end in each, and at the end of one."""
    from gptoss_jax.sampler import sampler as module

    model, params = make()
    want = Sampler(model, params).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    monkeypatch.setattr(module, "prefill_piece", lambda: piece)
    got = Sampler(model, params).generate(PROMPTS, max_tokens=TOKENS, stop_ids=[])
    assert got.tokens == want.tokens
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
