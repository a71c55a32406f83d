"""The table of parameters: each row describes one parameter.

A parameter needs a row here and a line in `model/` that declares it (docs/add_a_parameter.md). Its
row decides its shape, initial values, sharding, tensors in files, padding, LoRA adapter and the
matrices that optimizers see. Each of these raises ValueError for a path without a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from gptoss_jax.config import ModelConfig

# Mesh axes that an axis of an array is split over: none, one, or several.
Axis = str | tuple[str, ...] | None
# The mesh axes that FSDP splits parameters over, in addition to the split by their op: EXPERT for
# experts' matrices, which are already split over "expert", and DENSE for all others.
EXPERT = ("fsdp", "context")
DENSE = ("fsdp", "expert", "context")


@dataclass(frozen=True)
class Parameter:
    """One row. Only `path` and `axes` are required.

    `axes` are dimension letters (see `types.py`; `C` is the axis of gate and up, of size 2) in
    three groups: "stack rows|columns". Optimizers see a stack of matrices, or, as in "L NH", a
    stack of vectors. Under `layers/`, the stack begins with L. The order in memory is the same.
    """

    path: str
    axes: str
    split: tuple[Axis, ...] = ()  # mesh axes of each axis after L; those left out are not split
    # Its tensors in OpenAI's and in the Hugging Face layout, without the layer's prefix. Neighbours
    # in the table with the same tensor follow one another in it. None: the layout can't hold it.
    files: tuple[str | None, str | None] = (None, None)
    init: Literal["normal", "zeros", "ones"] = "normal"  # "normal": times `ModelConfig.init_std`
    target: str | None = None  # its name in `LoRAConfig.targets`; None: it takes no adapter
    lookup: bool = False  # the op looks up rows, so rows, not columns, are the inputs
    muon: bool = False  # Muon orthogonalises it; else Adam updates it
    packable: bool = False  # may be MXFP4, in blocks along its last axis
    exists: Callable[[ModelConfig], bool] = field(default=lambda _: True, compare=False)
    sizes: Mapping[str, int] = field(default_factory=dict)  # of letters that ModelConfig lacks

    def __post_init__(self) -> None:
        """Refuse axes that contradict the path or the split."""
        if self.in_layers != self.axes.startswith("L"):
            raise ValueError(f"{self.path}: L is the first axis under layers/, and only there")
        if len(self.split) > len(self.letters) - self.in_layers:
            raise ValueError(f"{self.path}: split has more axes than {self.axes!r} after L")

    @property
    def in_layers(self) -> bool:
        """Whether each layer has this parameter."""
        return self.path.startswith("layers/")

    @property
    def name(self) -> str:
        """The name in its module."""
        return self.path.rpartition("/")[2]

    @cached_property
    def groups(self) -> tuple[str, str, str]:
        """The letters of stack, rows and columns; a vector has no columns."""
        stack, _, matrix = self.axes.rpartition(" ")
        rows, _, columns = matrix.partition("|")
        return stack, rows, columns

    @property
    def letters(self) -> str:
        """The letters of all axes."""
        return "".join(self.groups)

    @property
    def mesh_axes(self) -> tuple[Axis, ...]:
        """The mesh axes that each axis after L is split over."""
        whole = len(self.letters) - self.in_layers - len(self.split)
        return (*self.split, *(None,) * whole)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape; under `layers/` that of one layer, without L."""
        size = self.all_sizes(config)
        return tuple(size[x] for x in self.letters[self.in_layers :])

    def all_sizes(self, config: ModelConfig) -> dict[str, int]:
        """Return the size of each letter: the model's letters and the row's own."""
        return {**sizes(config), **self.sizes}

    def tensor(self, layout: Literal["openai", "hf"]) -> str | None:
        """Return the name of its tensor in a layout, with {n} for the layer."""
        name = self.files[0 if layout == "openai" else 1]
        prefix = {"openai": "block.{n}.", "hf": "model.layers.{n}."}[layout]
        return prefix + name if name and self.in_layers else name

    @property
    def lead(self) -> str:
        """The first axes of a weight and of its adapter's A and B: layers, experts."""
        return self.groups[0].replace("C", "")

    @property
    def inputs(self) -> str:
        """The axes of the weight's inputs."""
        return self.groups[1 if self.lookup else 2]

    @property
    def outputs(self) -> str:
        """The axes of the weight's outputs."""
        gate_and_up = self.groups[0][len(self.lead) :]
        return gate_and_up + self.groups[2 if self.lookup else 1]

    def adapter(self, part: str) -> tuple[str, tuple[Axis, ...]]:
        """Return letters and mesh axes (L included) of its adapter's A (`part` "a") or B ("b").

        Both are split as the op is. Axes of kv heads, which may be fewer than the shards, and of
        the vocabulary stay whole. For storage, FSDP splits adapters of experts too, along the last
        axis of their inputs or outputs: at rank 8 of 120b they are 2.1 of 2.2 GB. The others stay
        whole, because gathering 40 MB in many small pieces costs more than it saves.
        """
        after_l = zip(self.letters[self.in_layers :], self.mesh_axes, strict=True)
        own = [*(None,) * self.in_layers, *(_of_op(x, axis) for x, axis in after_l)]
        lead, columns = len(self.lead), len(self.letters) - len(self.groups[2])
        sides: list[list[Axis]] = [[*own[lead:columns]], [*own[columns:]]]
        if "E" in self.lead:
            for side in sides:
                side[-1] = ("tensor", *EXPERT) if side[-1] == "tensor" else EXPERT
        outputs, inputs = sides[::-1] if self.lookup else sides
        if part == "a":
            return f"{self.lead}{self.inputs}r", (*own[:lead], *inputs, None)
        return f"{self.lead}r{self.outputs}", (*own[:lead], None, *outputs)


class Place(NamedTuple):
    """What a path in a tree refers to: a parameter or its adapter, and which part of it."""

    row: Parameter
    part: str  # "a" or "b" of an adapter; "" for the parameter itself
    rest: str  # the end of the path: "blocks", "v_row", "3" in a tuple of layers

    @property
    def path(self) -> str:
        """The path among the parameters."""
        return f"lora/{self.row.path}/{self.part}" if self.part else self.row.path

    @property
    def letters(self) -> str:
        """The letters of its axes; r is an adapter's rank."""
        return self.row.adapter(self.part)[0] if self.part else self.row.letters

    @property
    def mesh_axes(self) -> tuple[Axis, ...]:
        """The mesh axes that each axis, L included, is split over."""
        if self.part:
            return self.row.adapter(self.part)[1]
        return (*(None,) * self.row.in_layers, *self.row.mesh_axes)


def row(path: str) -> Parameter:
    """Return the row of a parameter. Raises ValueError if there is none."""
    if path not in _ROWS:
        raise _unknown(path)
    return _ROWS[path]


def rows(config: ModelConfig | None = None) -> list[Parameter]:
    """Return the rows in the order of the table; with a config, only those of its model."""
    return [x for x in _ROWS.values() if config is None or x.exists(config)]


def add(parameter: Parameter) -> None:
    """Add a row in this process, for an experiment with its own model.

    Raises:
        ValueError: the table has another row for that path.
    """
    if _ROWS.setdefault(parameter.path, parameter) != parameter:
        raise ValueError(f"{_NAME} has another row for {parameter.path}")


def place(path: str) -> Place:
    """Return what an array's path refers to, in a tree of parameters or in a train state.

    The path may be longer than the parameter's path at both ends: the path of a moment begins with
    the optimizer's own names, and the path of a packed weight ends in `blocks`.

    Raises:
        ValueError: the path contains no parameter of the table.
    """
    inside = [name for name in _ROWS if f"/{name}/" in f"/{path}/"]
    name = max(inside, key=len, default="")
    before, _, rest = f"/{path}/".partition(f"/{name}/")
    in_lora = f"{before}/".endswith("/lora/")
    part, _, rest = rest.strip("/").partition("/") if in_lora else ("", "", rest.strip("/"))
    if name not in _ROWS or (in_lora and part not in ("a", "b")):
        raise _unknown(path)
    return Place(_ROWS[name], part, rest)


def place_in_state(path: str, ndim: int) -> Place | None:
    """Return `place(path)`; None for a state's scalar or vector that belongs to no parameter."""
    try:
        return place(path)
    except ValueError:
        if ndim > 1 or path.startswith(("params/", "layers/", "lora/")):
            raise
        return None


def sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of each letter; F includes the padding for a mesh."""
    c = config
    return {
        "V": c.vocab_size, "L": c.num_layers, "D": c.d_model, "N": c.num_heads,
        "K": c.num_kv_heads, "H": c.head_dim, "E": c.num_experts, "C": 2,
        "F": c.d_expert + c.expert_padding,
    }  # fmt: skip


def _of_op(letter: str, axis: Axis) -> str | None:
    """Return the mesh axis that the op splits an axis over, without FSDP: see `adapter`."""
    first = axis[0] if isinstance(axis, tuple) else axis
    return first if first in ("tensor", "expert") and letter not in "VK" else None


def _unknown(path: str) -> ValueError:
    return ValueError(f"{_NAME} has no {path}: add a row (docs/add_a_parameter.md)")


_NAME = "the table of parameters (gptoss_jax/parameters/table.py)"
# In the order in which files hold them.
_TABLE = (
    Parameter("embedding/weight", "V|D", ("tensor", DENSE),
              ("embedding.weight", "model.embed_tokens.weight"), target="embedding", lookup=True),
    Parameter("layers/attention_norm/scale", "L D",
              files=("attn.norm.scale", "input_layernorm.weight"), init="ones"),
    Parameter("layers/attention/q_weight", "L NH|D", ("tensor", None, DENSE),
              ("attn.qkv.weight", "self_attn.q_proj.weight"), target="q", muon=True),
    Parameter("layers/attention/k_weight", "L KH|D", ("tensor", None, DENSE),
              ("attn.qkv.weight", "self_attn.k_proj.weight"), target="k", muon=True),
    Parameter("layers/attention/v_weight", "L KH|D", ("tensor", None, DENSE),
              ("attn.qkv.weight", "self_attn.v_proj.weight"), target="v", muon=True),
    Parameter("layers/attention/q_bias", "L NH", ("tensor",),
              ("attn.qkv.bias", "self_attn.q_proj.bias"), init="zeros"),
    Parameter("layers/attention/k_bias", "L KH", ("tensor",),
              ("attn.qkv.bias", "self_attn.k_proj.bias"), init="zeros"),
    Parameter("layers/attention/v_bias", "L KH", ("tensor",),
              ("attn.qkv.bias", "self_attn.v_proj.bias"), init="zeros"),
    Parameter("layers/attention/q_norm", "L H", init="ones", exists=lambda c: c.qk_norm),
    Parameter("layers/attention/k_norm", "L H", init="ones", exists=lambda c: c.qk_norm),
    Parameter("layers/attention/sinks", "L N", ("tensor",), ("attn.sinks", "self_attn.sinks"),
              init="zeros", exists=lambda c: c.sinks == "learned"),
    Parameter("layers/attention/o_weight", "L D|NH", (DENSE, "tensor"),
              ("attn.out.weight", "self_attn.o_proj.weight"), target="o", muon=True),
    Parameter("layers/attention/o_bias", "L D",
              files=("attn.out.bias", "self_attn.o_proj.bias"), init="zeros"),
    Parameter("layers/moe_norm/scale", "L D",
              files=("mlp.norm.scale", "post_attention_layernorm.weight"), init="ones"),
    # The router is the head that chooses experts: like the unembedding, it is not for Muon.
    Parameter("layers/router/weight", "L E|D", (None, DENSE),
              ("mlp.gate.weight", "mlp.router.weight"), target="router"),
    Parameter("layers/router/bias", "L E",
              files=("mlp.gate.bias", "mlp.router.bias"), init="zeros"),
    Parameter("layers/experts/gate_up_weight", "LEC F|D", ("expert", None, ("tensor", *EXPERT)),
              ("mlp.mlp1_weight", "mlp.experts.gate_up_proj"),
              target="gate_up", muon=True, packable=True),
    Parameter("layers/experts/gate_up_bias", "LEC F", ("expert", None, "tensor"),
              ("mlp.mlp1_bias", "mlp.experts.gate_up_proj_bias"), init="zeros"),
    Parameter("layers/experts/down_weight", "LE D|F", ("expert", EXPERT, "tensor"),
              ("mlp.mlp2_weight", "mlp.experts.down_proj"),
              target="down", muon=True, packable=True),
    Parameter("layers/experts/down_bias", "LE D", ("expert",),
              ("mlp.mlp2_bias", "mlp.experts.down_proj_bias"), init="zeros"),
    Parameter("final_norm/scale", "D", files=("norm.scale", "model.norm.weight"), init="ones"),
    Parameter("unembedding/weight", "V|D", (("tensor", *DENSE),),
              ("unembedding.weight", "lm_head.weight"), target="unembedding"),
)  # fmt: skip
_ROWS = {parameter.path: parameter for parameter in _TABLE}
