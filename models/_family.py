"""In what models of LLaMA's shape may differ from LLaMA, and how a family of transformers says it."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxprune.models.config import LayerDims, LlamaConfig

# Settings of `LlamaConfig` as LLaMA has them, and the keys of `config.json` that set them.
TRAITS: dict[str, Any] = dict(
    sliding_window=None,
    partial_rotary=1.0,
    qk_norm=False,
    post_norms=False,
    norm_offset=False,
    embed_scale=None,
    activation="silu",
    windowed=(),
    local_rope_theta=None,
    score_width=None,
    score_cap=None,
    logit_cap=None,
)
KEYS = {trait: f"jaxprune_{trait}" for trait in TRAITS} | dict(
    sliding_window="sliding_window",
    partial_rotary="partial_rotary_factor",
    activation="hidden_act",
    windowed="layer_types",
    local_rope_theta="rope_local_base_freq",
    score_width="query_pre_attn_scalar",
    score_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
)
NONE: Any = MappingProxyType({})


class Family(NamedTuple):
    """How the checkpoints of a family say what their models are.

    Attributes:
      architecture: its class in transformers.
      defaults: of transformers, for keys that a `config.json` leaves out.
      constants: keys of `config.json` that are the same for all its models.
      fixed: the `TRAITS` in which all its models differ from LLaMA; a function gives the value from the width of the stream.
      free: the `TRAITS` that `config.json` sets, by their `KEYS`.
      keys: trait -> the key that it has in this family instead.
      biases: key of `config.json` -> the matrices that have a bias if it is true.
      always: the matrices that always have a bias.
      says: does the class of transformers take a model whose layers have these widths, as far as the rest does not decide it?
      layers: what the tensors of layers are below.
      names: array -> tensor, below the layer if it is in one, where it is not called as in LLaMA.
      fused: tensor below the layer -> the arrays that it holds, one below the other.
      interleaved: the two dimensions of a rotary pair are neighbours in the file; here they are half of `rotary_dim` apart.
    """

    architecture: str
    defaults: dict[str, Any] = NONE
    constants: dict[str, Any] = NONE
    fixed: dict[str, Any] = NONE
    free: tuple[str, ...] = ()
    keys: dict[str, str] = NONE
    biases: dict[str, tuple[str, ...]] = NONE
    always: tuple[str, ...] = ()
    says: Callable[[LlamaConfig, LayerDims], bool] = lambda cfg, dims: True
    layers: str = "model.layers"
    names: dict[str, str] = NONE
    fused: dict[str, tuple[str, ...]] = NONE
    interleaved: bool = False

    def key(self, trait: str) -> str:
        """The key of `config.json` that sets a trait."""
        return self.keys.get(trait, KEYS[trait])


def beyond_llama(cfg: LlamaConfig) -> list[str]:
    """In words, what a model of LLaMA's or Mistral's shape does not have and this one has.

    >>> from jaxprune.models import LayerDims, LlamaConfig, _family
    >>> _family.beyond_llama(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),), qk_norm=True))
    ['norms of queries and keys']
    """
    what = dict(
        qk_norm="norms of queries and keys",
        partial_rotary="heads that rotate in part",
        post_norms="norms behind sublayers",
        norm_offset="norms whose gain is one more than their tensor",
        embed_scale="scaled embeddings",
        activation="an MLP gate other than SiLU",
        windowed="layers with a window and layers without",
        local_rope_theta="rotary embeddings of two kinds",
        score_width="a scale of attention scores that is not the heads'",
        score_cap="capped attention scores",
        logit_cap="capped logits",
    )
    return [words for trait, words in what.items() if getattr(cfg, trait) != TRAITS[trait]]
