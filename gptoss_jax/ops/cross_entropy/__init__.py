"""Cross entropy of an unembedding, without the logits of all rows ever existing."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import reference, xla


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
    differentiable in `hidden`, `weight` and `weights`; no gradient flows through nll, which is for
    reports. `d weight` accumulates in float32 and is returned in the weight's dtype. Rows of weight
    zero cost as much as others: gather first. Targets must be in [0, V).

    `chunk` rows at a time ("xla"; by default as many as keep the logits of a chunk near 32 MiB, at
    least 256); "reference" forms all logits. None picks "xla".
    """
    if implementation == "reference":
        return reference.cross_entropy(hidden, weight, targets, weights)
    if implementation in (None, "xla"):
        return xla.cross_entropy(hidden, weight, targets, weights, chunk=chunk)
    raise ValueError(f"implementation={implementation!r}: use 'xla', 'reference' or None")
