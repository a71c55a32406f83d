"""Gradients of attention's adapters against PEFT's on transformers: pip install -e '.[parity]'."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from mapping import SIZES, to_tree  # noqa: E402

from gptoss_jax.config import LoRAConfig  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.objectives.token_loss import loss_fn  # noqa: E402
from gptoss_jax.parameters.tree import flatten  # noqa: E402
from gptoss_jax.types import Batch  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]
RANK, ALPHA, ROWS, LENGTH = 3, 5.0, 2, 140  # past the window of 128
OUR_AXES = {  # PEFT's A is [r, inputs], its B [outputs, r]; inputs and outputs as one axis
    "q": ((SIZES.d_model,), (SIZES.num_heads, SIZES.head_dim)),
    "k": ((SIZES.d_model,), (SIZES.num_kv_heads, SIZES.head_dim)),
    "v": ((SIZES.d_model,), (SIZES.num_kv_heads, SIZES.head_dim)),
    "o": ((SIZES.num_heads, SIZES.head_dim), (SIZES.d_model,)),
}


def peft_model():
    """Make a random float32 model with PEFT's adapters, none of them zero."""
    c = SIZES
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=c.vocab_size, num_hidden_layers=c.num_layers, hidden_size=c.d_model,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, num_local_experts=c.num_experts,
            num_experts_per_tok=c.active_experts, intermediate_size=c.d_expert,
            sliding_window=c.window, attn_implementation="eager",
        )
    ).float()  # fmt: skip
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = 1 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    targets = [f"{name}_proj" for name in OUR_AXES]
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False
        ),
    )  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            # larger ones make logits at which float32 itself is off by 1e-5 on both sides
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return adapted, weights


def as_ours(tensors: dict[str, np.ndarray]) -> dict:
    """Put PEFT's A and B (values or gradients) where ours are, by hand."""
    tree: dict = {}
    for name, (inputs, outputs) in OUR_AXES.items():
        of_layer = f"base_model.model.model.layers.{{}}.self_attn.{name}_proj.lora_{{}}.default"
        a, b = (
            np.stack(
                [tensors[f"{of_layer.format(i, x)}.weight"].T for i in range(SIZES.num_layers)]
            )
            for x in "AB"
        )
        tree[f"{name}_weight"] = {
            "a": a.reshape(SIZES.num_layers, *inputs, RANK),
            "b": b.reshape(SIZES.num_layers, RANK, *outputs),
        }
    return {"layers": {"attention": tree}}


def test_gradients_of_attention_adapters_are_those_of_peft() -> None:
    theirs, weights = peft_model()
    tokens = np.random.default_rng(4).integers(0, SIZES.vocab_size, (ROWS, LENGTH))
    ids = torch.as_tensor(tokens)
    expected_loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
    expected_loss.backward()
    named = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(named) == 2 * 4 * SIZES.num_layers and {
        name for name, p in theirs.named_parameters() if p.grad is not None
    } == set(named)

    lora = LoRAConfig(targets=("attention",), rank=RANK, alpha=ALPHA)
    ours = Transformer(dataclasses.replace(SIZES, lora=lora))
    base = jax.tree.map(jnp.asarray, to_tree(weights))
    own = as_ours({name: p.detach().numpy() for name, p in named.items()})
    shape = tokens.shape
    batch = Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        targets=jnp.asarray(np.roll(tokens, -1, axis=1), jnp.int32),
        weights=jnp.ones(shape, jnp.float32).at[:, -1].set(0),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(LENGTH), shape),
    )

    @jax.jit
    @jax.value_and_grad
    def objective(own):
        sums = loss_fn(ours, {**base, "lora": own}, batch)
        return sums.nll / sums.weight

    loss, gradients = objective(jax.tree.map(jnp.asarray, own))
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    expected = flatten(as_ours({name: p.grad.numpy() for name, p in named.items()}))
    found = flatten(gradients)
    assert found.keys() == expected.keys() and len(found) == 8
    for path, want in expected.items():
        largest = np.abs(want).max()
        assert largest > 1e-5, path
        np.testing.assert_allclose(found[path], want, atol=1e-5 * largest, rtol=0, err_msg=path)
