"""The words that every folder shares, in terms of the axis letters of `jaxprune.models.axes`.

==========  ==========================================================================
`Config`    of a model: `LlamaConfig` or `MambaConfig`
`PerLayer`  one dict per decoder layer, keyed by axis letter: the shape that flows
`Params`    a pytree of arrays; for our model the tree that `Llama(cfg).init` makes
`Tokens`    int32[b, t]
`Probes`    small float32 pytrees that a loss can be differentiated by, keyed by kind
`LossFn`    (params, probes, tokens) -> float32[b]: one mean token loss per sequence
==========  ==========================================================================

Kinds of probes (a loss ignores the kinds that are absent from the dict):

- `gates`: `PerLayer` of float32[units]. Multiplies the output of each unit: 1 keeps it, 0 removes it.
- `abs`, `sum`, `square`, `mix`, `energy`, `energy_of_sum`: taps, `PerLayer` of {tensor: float32[unit, ..., channel]}, passed
  as zeros. They do not change the loss. Its derivative by a tap is an element-wise statistic of the weights `w` of that
  tensor and their gradient, summed over all axes that the tap lacks; with `g_j` the gradient of the loss of sequence j:

  ===============  =====================================================
  `abs`            sum of abs(w * sum_j g_j)
  `sum`            sum of w * sum_j g_j
  `square`         sum of w^2 * sum_j g_j^2
  `mix`            sum of abs(w * sum_j g_j - w^2 / 2 * sum_j g_j^2)
  `energy`         sum of sum_j g_j^2
  `energy_of_sum`  sum of (sum_j g_j)^2
  ===============  =====================================================
- `output`: `PerLayer` of float32[d, d], axis letter `k` for the attention and `f` for the MLP, passed as zeros. They do not
  change the loss. Its derivative by one is the sum over tokens of g g^T, with g the gradient of the loss by what the module
  adds to the residual stream at that token.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax

from jaxprune.models.config import LlamaConfig
from jaxprune.models.mamba_config import MambaConfig

T = TypeVar("T")
Config: TypeAlias = LlamaConfig | MambaConfig
Axis: TypeAlias = str
Params: TypeAlias = Any
Tokens: TypeAlias = jax.Array
PerLayer: TypeAlias = tuple[dict[Axis, T], ...]
Probes: TypeAlias = dict[str, Any]
LossFn: TypeAlias = Callable[[Params, Probes, Any], jax.Array]  # tokens, or what stands for them

TAP_KINDS = ("abs", "sum", "square", "mix", "energy", "energy_of_sum")
