"""A copy of `gptoss_jax/model/`, in which attention's logits have a softcap: see softcapped.py.

`attention.py` calls another op. What imports it had to be copied too, and differs from the
package's files by its imports alone; `layers.py` is the package's own.
"""

from experiments.softcap.model.transformer import Transformer as Transformer
