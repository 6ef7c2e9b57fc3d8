"""A LlamaForCausalLM of transformers taken apart: token batches, streams between layers, inputs of modules, deleted units."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

BATCH_TOKENS = 2048


class Goal(NamedTuple):
    """What to prune: the fraction of the decoder's matrices that goes, and the layers that it may go from."""

    ratio: float
    layers: range


class Kept(NamedTuple):
    """Sorted positions that stay in one layer: MLP channels and key/value heads. None of either: the layer is gone."""

    mlp: torch.Tensor
    kv: torch.Tensor


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[samples, length] in pieces of about `BATCH_TOKENS` tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


@contextlib.contextmanager
def reading(modules: Iterable[torch.nn.Module], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see` with a module's position and its input, [tokens, features], each time that one of them runs."""

    def hook(i: int, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(i, inputs[0].flatten(0, -2))

    handles = [module.register_forward_pre_hook(functools.partial(hook, i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(model) -> list[torch.nn.Linear]:
    """The output projections, of attention and MLP in turn."""
    return [m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]


def pairs(values: list) -> list[tuple]:
    """Of what belongs to `outputs`: what belongs to the attention and to the MLP of each layer."""
    return list(zip(values[::2], values[1::2], strict=True))


def positions(model, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, which layers that run by themselves have to be given."""
    return model.model.rotary_emb(model.model.embed_tokens.weight, torch.arange(length)[None])


def after_attention(layer, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The residual stream after the attention of a layer."""
    return x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]


def after_mlp(layer, x: torch.Tensor) -> torch.Tensor:
    """The residual stream after the MLP of a layer."""
    return x + layer.mlp(layer.post_attention_layernorm(x))


def full(model) -> list[Kept]:
    """Everything stays."""
    kv, mlp = model.config.num_key_value_heads, model.config.intermediate_size
    return [Kept(torch.arange(mlp), torch.arange(kv)) for _ in model.model.layers]


def inputs_of(kept: Kept, attention, head_dim: int) -> torch.Tensor:
    """The columns of the attention's output projection that the kept key/value heads go with."""
    size = attention.num_key_value_groups * head_dim
    return (kept.kv[:, None] * size + torch.arange(size)).flatten()


def cut_mlp(layer, kept: Kept) -> None:
    """Deletes MLP channels."""
    _narrow(layer.mlp.gate_proj, 0, kept.mlp)
    _narrow(layer.mlp.up_proj, 0, kept.mlp)
    _narrow(layer.mlp.down_proj, 1, kept.mlp)


def cut_attention(layer, kept: Kept, head_dim: int) -> None:
    """Deletes key/value heads with their query heads."""
    attention = layer.self_attn
    rows = (kept.kv[:, None] * head_dim + torch.arange(head_dim)).flatten()
    queries = inputs_of(kept, attention, head_dim)
    _narrow(attention.k_proj, 0, rows)
    _narrow(attention.v_proj, 0, rows)
    _narrow(attention.q_proj, 0, queries)
    _narrow(attention.o_proj, 1, queries)


def cut(model, kept: list[Kept]) -> None:
    """Deletes units in all layers, in place; what is whole is left alone."""
    for layer, k, everything in zip(model.model.layers, kept, full(model), strict=True):
        if len(k.mlp) < len(everything.mlp):
            cut_mlp(layer, k)
        if len(k.kv) < len(everything.kv):
            cut_attention(layer, k, model.config.head_dim)


def _narrow(linear, axis: int, keep: torch.Tensor) -> None:
    """Deletes rows (axis 0) or columns (axis 1) of a weight."""
    linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(axis, keep))
    linear.out_features, linear.in_features = linear.weight.shape
