"""LLM-Pruner's algorithm in plain torch, on a LlamaForCausalLM of transformers.

Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023: element-wise first-order importance (equation 5, first term;
`param_first` in the released code), summed over the tensors of a group; local ranking; groups are deleted. Query heads are
counted for the key/value head that they go with (the released code counts others). There is no tracing of dependencies, which
the released code does besides: this is the least that the algorithm takes in torch.
"""

from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """Sorted positions that stay in one layer: MLP channels and key/value heads."""

    mlp: torch.Tensor
    kv: torch.Tensor


def importance(layer, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sum |w * gradient| of each MLP channel and of each key/value head with its query heads."""
    mlp, attention = layer.mlp, layer.self_attn

    def by(linear, axis: int) -> torch.Tensor:
        return (linear.weight * linear.weight.grad).abs().sum(1 - axis)

    channels = by(mlp.gate_proj, 0) + by(mlp.up_proj, 0) + by(mlp.down_proj, 1)
    keys_and_values = by(attention.k_proj, 0) + by(attention.v_proj, 0)
    groups = len(keys_and_values) // head_dim
    queries = by(attention.q_proj, 0) + by(attention.o_proj, 1)
    return channels, keys_and_values.view(groups, -1).sum(1) + queries.view(groups, -1).sum(1)


def highest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Sorted positions of the n highest scores."""
    return torch.sort(torch.topk(scores, n).indices).values


def narrow(linear, axis: int, keep: torch.Tensor) -> None:
    """Deletes rows (axis 0) or columns (axis 1) of a weight."""
    linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(axis, keep))
    linear.out_features, linear.in_features = linear.weight.shape


def prune(model, tokens: torch.Tensor, layers: range, keep_mlp: int, keep_kv: int) -> dict[int, Kept]:
    """Scores and cuts a model in place.

    Args:
      model: LlamaForCausalLM in float32.
      tokens: int64[samples, length].
      layers: the layers to prune.
      keep_mlp, keep_kv: MLP channels and key/value heads that each of them keeps.

    Returns:
      What stays, by layer.
    """
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    head_dim, kept = model.config.head_dim, {}
    with torch.no_grad():
        for i in layers:
            layer = model.model.layers[i]
            channels, groups = importance(layer, head_dim)
            kept[i] = Kept(highest(channels, keep_mlp), highest(groups, keep_kv))
            narrow(layer.mlp.gate_proj, 0, kept[i].mlp)
            narrow(layer.mlp.up_proj, 0, kept[i].mlp)
            narrow(layer.mlp.down_proj, 1, kept[i].mlp)
            if keep_kv < len(groups):
                attention = layer.self_attn
                per_group = attention.q_proj.weight.shape[0] // len(groups)
                rows = (kept[i].kv[:, None] * head_dim + torch.arange(head_dim)).flatten()
                query_rows = (kept[i].kv[:, None] * per_group + torch.arange(per_group)).flatten()
                narrow(attention.k_proj, 0, rows)
                narrow(attention.v_proj, 0, rows)
                narrow(attention.q_proj, 0, query_rows)
                narrow(attention.o_proj, 1, query_rows)
    model.zero_grad()
    return kept
