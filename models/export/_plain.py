"""What keeps a model from being one of transformers' own classes, and the uniform shape that all its layers fit in."""

from jaxprune.models import _hf
from jaxprune.models._families import LIKE_LLAMA, OURS
from jaxprune.models.config import LayerDims, LlamaConfig

NONE = LayerDims(0, 0, 0)


def kept(cfg: LlamaConfig) -> dict[int, LayerDims]:
    """Layer number -> widths, of the layers of which anything is left."""
    return {i: dims for i, dims in enumerate(cfg.layers) if cfg.layer_arrays(dims)}


def is_plain(cfg: LlamaConfig) -> bool:
    """Does `to_hf_config` say it as a class of transformers?"""
    return _hf.to_hf_config(cfg)["model_type"] != OURS


def sayable(cfg: LlamaConfig, dims: LayerDims) -> bool:
    """Is there a family whose layers can all have widths `dims`?"""
    return any(_hf.can_say(family, cfg, dims) for family in (cfg.family, *LIKE_LLAMA))


def widest(cfg: LlamaConfig) -> LayerDims:
    """The largest of each width, over all layers; at least 1 where some layer is left at all."""
    return LayerDims(*(max(1, *sizes) for sizes in zip(*(dims.widths for dims in cfg.layers), strict=True)))


def uniform(cfg: LlamaConfig) -> LayerDims | None:
    """The smallest widths that hold every layer and that a family can say; None if there are none.

    LLaMA, which alone has biases of o and of the MLP, wants the stream's width to be a multiple of the number of heads: then
    heads are added.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export._plain import uniform
    >>> layers = (LayerDims(3, 1, 48), LayerDims(1, 1, 40))
    >>> uniform(LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers))
    LayerDims(kv_heads=3, q_per_kv=1, ff=48)
    >>> uniform(LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers, biases=("o",)))
    LayerDims(kv_heads=4, q_per_kv=1, ff=48)
    """
    k, g, f, _ = least = widest(cfg)
    if sayable(cfg, least):
        return least
    heads = [(x, y) for x in range(k, cfg.d + 1) for y in range(g, cfg.d // x + 1)]
    larger = (LayerDims(*shape, f) for shape in sorted(heads, key=lambda shape: shape[0] * shape[1]))
    return next((dims for dims in larger if sayable(cfg, dims)), None)


def words(dims: LayerDims) -> str:
    """Widths in words.

    >>> from jaxprune.models import LayerDims
    >>> from jaxprune.models.export._plain import words
    >>> words(LayerDims(3, 2, 48)), words(LayerDims(0, 0, 48)), words(LayerDims(1, 1, 0))
    ('3 KV heads x 2 query heads, 48 channels', 'no attention, 48 channels', '1 KV head x 1 query head, no MLP')
    """

    def count(n: int, noun: str) -> str:
        return f"{n} {noun}{'' if n == 1 else 's'}"

    attention = f"{count(dims.kv_heads, 'KV head')} x {count(dims.q_per_kv, 'query head')}" if dims.kv_heads else "no attention"
    pairs = "" if dims.pairs is None else f" of {count(len(dims.pairs), 'rotary pair')}"
    return f"{attention}{pairs}, {count(dims.ff, 'channel') if dims.ff else 'no MLP'}"


def numbers(layers: list[int]) -> str:
    """`layer 3`, or `layers 1, 2, 5 ...` with at most four of them."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:4]))}{' ...' if len(layers) > 4 else ''}"


def cut_heads(cfg: LlamaConfig) -> list[str]:
    """What a file of heads of one size has no place for, in a sentence, or nothing."""
    layers = [i for i, dims in enumerate(cfg.layers) if dims.pairs is not None]
    return [f"heads of {numbers(layers)} have lost rotary pairs; export as hf-padded or hf-custom"] if layers else []


def shapes_of(cfg: LlamaConfig) -> tuple[dict[LayerDims, list[int]], str]:
    """Widths -> the layers that have them, of layers of which anything is left, and the first three of these in words."""
    layers: dict[LayerDims, list[int]] = {}
    for i, dims in kept(cfg).items():
        layers.setdefault(dims, []).append(i)
    shown = "; ".join(f"{numbers(where)}: {words(dims)}" for dims, where in list(layers.items())[:3])
    return layers, shown + ("; ..." if len(layers) > 3 else "")


def beyond_padding(cfg: LlamaConfig) -> list[str]:
    """Why no widths make this model one of transformers' own; empty if some do."""
    why = []
    if cfg.shortcuts:
        why.append(
            "the residual stream is rotated: every layer has shortcut matrices, for which LlamaForCausalLM, MistralForCausalLM "
            "and Qwen2ForCausalLM have no place; export as hf-custom, or prune without SliceGPT"
        )
    if cfg.norm_width is not None:
        why.append(
            f"norm_width: RMSNorm divides by {cfg.norm_width} instead of the width {cfg.d} of the stream, which no class of "
            f"transformers does; export as hf-custom, or prune without SliceGPT"
        )
    if dict(cfg.rope_scaling).get("rope_type") == "grid":
        why.append("rope scaling 'grid' is unknown to transformers; only this library runs such a model")
    if cfg.sliding_window is not None and cfg.biases:
        why.append(
            f"sliding_window {cfg.sliding_window} and biases of {', '.join(cfg.biases)}: MistralForCausalLM alone has a window "
            f"and has no biases; export as hf-custom, or recover without biases"
        )
    if not kept(cfg):
        why.append("nothing is left of any layer; a model of transformers needs one layer")
    if not why and uniform(cfg) is None:
        k, g, *_ = widest(cfg)
        why.append(
            f"biases of {', '.join(cfg.biases)} need LlamaForCausalLM, which wants the hidden size {cfg.d} to be a multiple of "
            f"the number of heads, and no number of heads that holds {k} x {g} is; export as hf-custom"
        )
    return why
