"""The two torch references, and a random model in both: for development only."""

from __future__ import annotations

import numpy as np
import torch
from gpt_oss.torch.model import ModelConfig as OpenAIConfig
from gpt_oss.torch.model import Transformer as OpenAITransformer
from mapping import SIZES
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_jax.config import ModelConfig


def transformers_model(config: ModelConfig = SIZES, seed: int = 0) -> GptOssForCausalLM:
    """Make a random float32 model, every tensor of it of a size that matters."""
    c = config
    torch.manual_seed(seed)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=c.vocab_size,
            num_hidden_layers=c.num_layers,
            hidden_size=c.d_model,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_local_experts=c.num_experts,
            num_experts_per_tok=c.active_experts,
            intermediate_size=c.d_expert,
            sliding_window=c.window,
            layer_types=[
                "full_attention" if w is None else "sliding_attention" for w in c.layer_windows
            ],
            attn_implementation="eager",
        )
    ).float()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif "sinks" in name:
            parameter.data = noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:
            parameter.data = noise * 1.5 * parameter.shape[-1] ** -0.5
    return model


def state(model: GptOssForCausalLM) -> dict[str, np.ndarray]:
    """Return the parameters under Hugging Face names."""
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def gradients(model: GptOssForCausalLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients of the mean next-token loss over one row of tokens."""
    model.zero_grad()
    ids = torch.as_tensor(tokens[None], dtype=torch.long)
    logits = model(ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def openai_logits(model: GptOssForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of openai/gpt-oss's own torch model with the same weights, in float32."""
    c, hf = SIZES, state(model)
    theirs = OpenAITransformer(
        OpenAIConfig(
            num_hidden_layers=c.num_layers,
            num_experts=c.num_experts,
            experts_per_token=c.active_experts,
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_expert,
            head_dim=c.head_dim,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
        ),
        device=torch.device("cpu"),
    ).float()
    tensors = {
        "embedding.weight": hf["model.embed_tokens.weight"],
        "norm.scale": hf["model.norm.weight"],
        "unembedding.weight": hf["lm_head.weight"],
    }
    for i in range(c.num_layers):
        ours, layer = f"block.{i}", f"model.layers.{i}"
        qkv = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        tensors |= {
            f"{ours}.attn.norm.scale": hf[f"{layer}.input_layernorm.weight"],
            f"{ours}.attn.sinks": hf[f"{layer}.self_attn.sinks"],
            f"{ours}.attn.qkv.weight": np.concatenate([hf[f"{n}.weight"] for n in qkv]),
            f"{ours}.attn.qkv.bias": np.concatenate([hf[f"{n}.bias"] for n in qkv]),
            f"{ours}.attn.out.weight": hf[f"{layer}.self_attn.o_proj.weight"],
            f"{ours}.attn.out.bias": hf[f"{layer}.self_attn.o_proj.bias"],
            f"{ours}.mlp.norm.scale": hf[f"{layer}.post_attention_layernorm.weight"],
            f"{ours}.mlp.gate.weight": hf[f"{layer}.mlp.router.weight"],
            f"{ours}.mlp.gate.bias": hf[f"{layer}.mlp.router.bias"],
            f"{ours}.mlp.mlp1_weight": hf[f"{layer}.mlp.experts.gate_up_proj"].swapaxes(1, 2),
            f"{ours}.mlp.mlp1_bias": hf[f"{layer}.mlp.experts.gate_up_proj_bias"],
            f"{ours}.mlp.mlp2_weight": hf[f"{layer}.mlp.experts.down_proj"].swapaxes(1, 2),
            f"{ours}.mlp.mlp2_bias": hf[f"{layer}.mlp.experts.down_proj_bias"],
        }
    theirs.load_state_dict(
        {k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in tensors.items()}
    )
    with torch.no_grad():
        return theirs(torch.as_tensor(tokens, dtype=torch.long)).numpy()
