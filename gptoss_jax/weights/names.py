"""The one name table: which tensor of which layout holds which leaf of our tree, and how.

Both layouts name the same numbers. `original/` joins q, k and v into one tensor and, like the
Hugging Face one, interleaves the rows of gate and up (0::2 gate, 1::2 up); the Hugging Face form
of dense experts is transposed on top. All transforms here are permutations: nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.types import MXFP4_BLOCK

Layout = Literal["hf", "openai"]
Form = Literal["dense", "mxfp4"]  # of the experts' projections
Field = Literal["value", "blocks", "scales"]
Order = Literal["plain", "interleaved", "transposed", "transposed_interleaved"]

# Leaf of our tree, tensor of `original/`, tensor of the Hugging Face layout. Neighbours that share
# a tensor lie in it one after another.
_TABLE = (
    ("embedding/weight", "embedding.weight", "model.embed_tokens.weight"),
    ("layers/attention_norm/scale", "block.{n}.attn.norm.scale", "{hf}.input_layernorm.weight"),
    ("layers/attention/q_weight", "block.{n}.attn.qkv.weight", "{hf}.self_attn.q_proj.weight"),
    ("layers/attention/k_weight", "block.{n}.attn.qkv.weight", "{hf}.self_attn.k_proj.weight"),
    ("layers/attention/v_weight", "block.{n}.attn.qkv.weight", "{hf}.self_attn.v_proj.weight"),
    ("layers/attention/q_bias", "block.{n}.attn.qkv.bias", "{hf}.self_attn.q_proj.bias"),
    ("layers/attention/k_bias", "block.{n}.attn.qkv.bias", "{hf}.self_attn.k_proj.bias"),
    ("layers/attention/v_bias", "block.{n}.attn.qkv.bias", "{hf}.self_attn.v_proj.bias"),
    ("layers/attention/sinks", "block.{n}.attn.sinks", "{hf}.self_attn.sinks"),
    ("layers/attention/o_weight", "block.{n}.attn.out.weight", "{hf}.self_attn.o_proj.weight"),
    ("layers/attention/o_bias", "block.{n}.attn.out.bias", "{hf}.self_attn.o_proj.bias"),
    ("layers/moe_norm/scale", "block.{n}.mlp.norm.scale", "{hf}.post_attention_layernorm.weight"),
    ("layers/router/weight", "block.{n}.mlp.gate.weight", "{hf}.mlp.router.weight"),
    ("layers/router/bias", "block.{n}.mlp.gate.bias", "{hf}.mlp.router.bias"),
    (
        "layers/experts/gate_up_weight",
        "block.{n}.mlp.mlp1_weight",
        "{hf}.mlp.experts.gate_up_proj",
    ),
    (
        "layers/experts/gate_up_bias",
        "block.{n}.mlp.mlp1_bias",
        "{hf}.mlp.experts.gate_up_proj_bias",
    ),
    ("layers/experts/down_weight", "block.{n}.mlp.mlp2_weight", "{hf}.mlp.experts.down_proj"),
    ("layers/experts/down_bias", "block.{n}.mlp.mlp2_bias", "{hf}.mlp.experts.down_proj_bias"),
    ("final_norm/scale", "norm.scale", "model.norm.weight"),
    ("unembedding/weight", "unembedding.weight", "lm_head.weight"),
)
PACKABLE = ("layers/experts/gate_up_weight", "layers/experts/down_weight")
_SUFFIX = {"hf": {"blocks": "_blocks", "scales": "_scales", "value": ""}} | {
    "openai": {"blocks": ".blocks", "scales": ".scales", "value": ""}
}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each leaf that a file holds, of one layer (no L) under `layers/`."""
    d, n, k, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    e, f, v = config.num_experts, config.d_expert, config.vocab_size
    return {
        "embedding/weight": (v, d),
        "layers/attention_norm/scale": (d,),
        "layers/attention/q_weight": (n, h, d),
        "layers/attention/k_weight": (k, h, d),
        "layers/attention/v_weight": (k, h, d),
        "layers/attention/o_weight": (d, n, h),
        "layers/attention/q_bias": (n, h),
        "layers/attention/k_bias": (k, h),
        "layers/attention/v_bias": (k, h),
        "layers/attention/o_bias": (d,),
        "layers/attention/sinks": (n,),
        "layers/moe_norm/scale": (d,),
        "layers/router/weight": (e, d),
        "layers/router/bias": (e,),
        "layers/experts/gate_up_weight": (e, 2, f, d),
        "layers/experts/gate_up_bias": (e, 2, f),
        "layers/experts/down_weight": (e, d, f),
        "layers/experts/down_bias": (e, d),
        "final_norm/scale": (d,),
        "unembedding/weight": (v, d),
    }


def packed_shape(shape: tuple[int, ...], field: Field) -> tuple[int, ...]:
    """Return the shape of an MXFP4 weight's blocks or scales; of "value", the weight's own."""
    if field == "value":
        return shape
    scales = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
    return scales if field == "scales" else (*scales, MXFP4_BLOCK // 2)


@dataclass(frozen=True)
class Part:
    """One leaf (or its blocks or scales) of one layer, as a run of rows of a file's tensor."""

    path: str
    layer: int | None  # None outside `layers/`
    field: Field
    shape: tuple[int, ...]  # in memory, without L
    order: Order

    @property
    def key(self) -> tuple[str, int | None, Field]:
        """What names the part in any layout."""
        return self.path, self.layer, self.field

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the part in the file."""
        s = self.shape
        if self.order == "interleaved":
            return (s[0], 2 * s[2], *s[3:])
        if self.order == "transposed":
            return (s[0], s[2], s[1])
        if self.order == "transposed_interleaved":
            return (s[0], s[3], 2 * s[2])
        if self.path == "layers/attention/o_weight":
            return (s[0], s[1] * s[2])
        if self.path.startswith("layers/attention/"):
            return (math.prod(s[:2]), *s[2:])  # [N, H, D] is [N*H, D]; a vector stays one
        return s

    @property
    def file_rows(self) -> int:
        """Rows of the file's tensor that one row of ours takes."""
        return self.file_shape[0] // self.shape[0]

    def to_memory(self, rows: np.ndarray) -> np.ndarray:
        """Reorder whole rows as read from the file [rows, ...] into rows of ours."""
        if self.order == "interleaved":
            rows = rows.reshape(len(rows), self.shape[2], 2, *self.shape[3:])
            return rows.swapaxes(1, 2)
        if self.order == "transposed":
            return rows.swapaxes(1, 2)
        if self.order == "transposed_interleaved":
            return rows.reshape(*rows.shape[:2], self.shape[2], 2).transpose(0, 3, 2, 1)
        return rows.reshape(-1, *self.shape[1:])

    def to_file(self, rows: np.ndarray) -> np.ndarray:
        """Reorder rows of ours into the file's order: the inverse of `to_memory`."""
        if self.order in ("interleaved", "transposed"):
            rows = rows.swapaxes(1, 2)
        elif self.order == "transposed_interleaved":
            rows = rows.transpose(0, 3, 2, 1)
        return rows.reshape(-1, *self.file_shape[1:])


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint's files: its parts lie one after another along the first axis."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        rows = sum(part.file_shape[0] for part in self.parts)
        return (rows, *self.parts[0].file_shape[1:])

    @property
    def packed(self) -> bool:
        """Whether its bytes are MXFP4 blocks or scales."""
        return self.parts[0].field != "value"


def _order(path: str, layout: Layout, form: Form) -> Order:
    if path == "layers/experts/gate_up_bias":
        return "interleaved"
    if path not in PACKABLE:
        return "plain"
    gate_up = path == "layers/experts/gate_up_weight"
    if layout == "hf" and form == "dense":
        return "transposed_interleaved" if gate_up else "transposed"
    return "interleaved" if gate_up else "plain"


def _rows(config: ModelConfig, layout: Layout, form: Form) -> Iterator[tuple[str, Part]]:
    """Yield (tensor name, part) in the order of the table, layer by layer."""
    shape_of = shapes(config)

    def row(path: str, name: str, layer: int | None) -> Iterator[tuple[str, Part]]:
        packed = form == "mxfp4" and path in PACKABLE
        fields: tuple[Field, ...] = ("blocks", "scales") if packed else ("value",)
        for field in fields:
            shape = packed_shape(shape_of[path], field)
            part = Part(path, layer, field, shape, _order(path, layout, form))
            yield name + _SUFFIX[layout][field], part

    column = {"openai": 1, "hf": 2}[layout]
    in_layers = [entry for entry in _TABLE if entry[0].startswith("layers/")]
    first, last = _TABLE[:1], _TABLE[-2:]
    for entry in first:
        yield from row(entry[0], entry[column], None)
    for n in range(config.num_layers):
        for entry in in_layers:
            name = entry[column].format(n=n, hf=f"model.layers.{n}")
            yield from row(entry[0], name, n)
    for entry in last:
        yield from row(entry[0], entry[column], None)


def tensors(config: ModelConfig, layout: Layout, form: Form) -> list[Tensor]:
    """Return the tensors of a whole checkpoint in `layout`, its experts stored in `form`."""
    by_name: dict[str, list[Part]] = {}
    for name, part in _rows(config, layout, form):
        by_name.setdefault(name, []).append(part)
    return [Tensor(name, tuple(parts)) for name, parts in by_name.items()]
