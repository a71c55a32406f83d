"""Cross entropy of an unembedding, without forming the logits of all rows at once."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import reference, vocabulary, xla
from gptoss_jax.ops.cross_entropy.vocabulary import sharded
from gptoss_jax.ops.dispatch import choose

__all__ = ["cross_entropy", "sharded"]

ORDER = {
    "tpu": ("vocabulary", "xla"),
    "gpu": ("vocabulary", "xla"),
    "cpu": ("xla",),
    "named": ("reference",),
}


def cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Return (sum of weights * nll, nll), both float32, nll = logsumexp(logits) - logits[target].

    The logits are hidden @ weight.T in the dtype of `hidden`, accumulated in float32. The sum is
    differentiable in `hidden`, `weight` and `weights`. nll has no gradient; it is for reports.
    `d weight` is summed over the rows in float32 and returned in the weight's dtype. Rows of weight
    zero cost as much as others, so gather the other rows first. Targets must be in [0, V).

    `implementation`:
    - "xla" takes `chunk` rows at a time and forms both gradients with the loss. It needs the fewest
      matrix products, but a float32 copy of `d weight`. Default: logits near 32 MiB, at least 256
      rows.
    - "vocabulary" takes `chunk` entries of the vocabulary at a time. It needs one more product and
      no such copy; an unwanted gradient costs nothing. Default: logits near 256 MiB.
    - "reference" forms all logits.
    - None picks "vocabulary" on TPU and GPU, and "xla" on a CPU.

    `sharded` is for a vocabulary that is sharded over devices.
    """
    name = choose("cross entropy", implementation, order=ORDER, refuse=lambda _: None)
    if name == "reference":
        return reference.cross_entropy(hidden, weight, targets, weights)
    run = vocabulary.cross_entropy if name == "vocabulary" else xla.cross_entropy
    return run(hidden, weight, targets, weights, chunk=chunk)
