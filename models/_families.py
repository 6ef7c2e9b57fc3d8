"""What differs between the families of transformers that share LLaMA's shape: a family is one entry of this table."""

from types import MappingProxyType
from typing import Any, NamedTuple

OURS = "jaxprune_llama"  # what no family can say, see `jaxprune.models.to_hf_config`
TRAITS: dict[str, Any] = dict(sliding_window=None, partial_rotary=1.0, qk_norm=False)  # of `LlamaConfig`, as LLaMA has them
KEYS = dict(sliding_window="sliding_window", partial_rotary="partial_rotary_factor", qk_norm="jaxprune_qk_norm")
NONE: Any = MappingProxyType({})


class Family(NamedTuple):
    """How the checkpoints of a family say what their models are.

    Attributes:
      architecture: its class in transformers.
      defaults: of transformers, for keys that a `config.json` leaves out.
      constants: keys of `config.json` that are the same for all its models.
      fixed: the `TRAITS` in which all its models differ from LLaMA.
      free: the `TRAITS` that `config.json` sets, by their `KEYS`.
      biases: key of `config.json` -> the matrices that have a bias if it is true.
      always: the matrices that always have a bias.
      divisible: `hidden_size` has to be a multiple of the number of heads.
    """

    architecture: str
    defaults: dict[str, Any] = NONE
    constants: dict[str, Any] = NONE
    fixed: dict[str, Any] = NONE
    free: tuple[str, ...] = ()
    biases: dict[str, tuple[str, ...]] = NONE
    always: tuple[str, ...] = ()
    divisible: bool = False


FAMILIES = dict(
    llama=Family(
        "LlamaForCausalLM",
        defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        biases=dict(attention_bias=("q", "k", "v", "o"), mlp_bias=("gate", "up", "down")),
        divisible=True,
    ),
    mistral=Family(
        "MistralForCausalLM",
        defaults=dict(
            max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8, sliding_window=4096
        ),
        free=("sliding_window",),
    ),
    qwen2=Family(
        "Qwen2ForCausalLM",
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=32),
        constants=dict(use_sliding_window=False),
        always=("q", "k", "v"),
    ),
    qwen3=Family(
        "Qwen3ForCausalLM",
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
        constants=dict(use_sliding_window=False),
        fixed=dict(qk_norm=True),
        biases=dict(attention_bias=("q", "k", "v", "o")),
    ),
    jaxprune_llama=Family("JaxpruneLlamaForCausalLM", free=tuple(TRAITS)),
)
