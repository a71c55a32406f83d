"""Reference cross entropy: all logits at once, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Form the logits [M, V]; autodiff gives the gradients."""
    logits = jnp.einsum(
        "MD,VD->MV", hidden.astype(jnp.float32), weight.astype(jnp.float32), precision="highest"
    )
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(logits, axis=1) - picked
    return jnp.sum(weights * nll), jax.lax.stop_gradient(nll)
