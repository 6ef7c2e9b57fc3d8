"""Methods that score by gradients of the weights, in plain torch: LLM-Pruner, NIRVANA and HyWIA.

Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023: element-wise first-order importance (equation 5, first term;
`param_first` in the released code), summed over the tensors of a group; local ranking. Query heads are counted for the
key/value head that they go with (the released code counts others). There is no tracing of dependencies, which the released
code does besides: this is the least that the algorithm takes in torch.

Ai et al., `NIRVANA <https://arxiv.org/abs/2509.14230>`_, 2025: the same of a function of the logits, heads and channels ranked
apart. Liu et al., `HyWIA <https://arxiv.org/abs/2403.10799>`_, 2024: fine and coarse Taylor importance, fused by attention.
"""

from collections.abc import Callable

import torch
from _torch_budget import Scores, by_type, uniform
from _torch_llama import Goal, Kept, cut

Statistic = Callable[[torch.Tensor], torch.Tensor]  # weight -> an importance of each of its elements


def _by_units(layer, head_dim: int, statistic: Statistic, magnitude: bool = False) -> Scores:
    """Sums an element-wise statistic over the tensors of each unit; `magnitude`: of each row or column its absolute sum."""
    mlp, attention = layer.mlp, layer.self_attn

    def by(linear, axis: int) -> torch.Tensor:
        rows = statistic(linear.weight).sum(1 - axis)
        return rows.abs() if magnitude else rows

    channels = by(mlp.gate_proj, 0) + by(mlp.up_proj, 0) + by(mlp.down_proj, 1)
    keys_and_values = by(attention.k_proj, 0) + by(attention.v_proj, 0)
    groups = len(keys_and_values) // head_dim
    queries = by(attention.q_proj, 0) + by(attention.o_proj, 1)
    return Scores(channels, keys_and_values.view(groups, -1).sum(1) + queries.view(groups, -1).sum(1))


def _first_order(weight: torch.Tensor) -> torch.Tensor:
    return (weight * weight.grad).abs()


def _scored(model, statistic: Statistic, magnitude: bool = False) -> list[Scores]:
    with torch.no_grad():
        return [_by_units(layer, model.config.head_dim, statistic, magnitude) for layer in model.model.layers]


def _cut(model, kept: list[Kept]) -> list[Kept]:
    model.zero_grad()
    cut(model, kept)
    return kept


def llm_pruner(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """sum |w * gradient| of the loss, layer by layer."""
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return _cut(model, uniform(model, _scored(model, _first_order), goal))


def nirvana(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """sum |w * gradient| of the mean over sequences and vocabulary of the largest logit of a sequence."""
    model(tokens, use_cache=False).logits.max(dim=1)[0].mean().backward()
    return _cut(model, by_type(model, _scored(model, _first_order), goal))


def hywia(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Coarse |sum w g| and fine sum |w g - w^2 A / 2|, each divided by its mean and weighed by softmax attention."""
    weights = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    squares = {w: torch.zeros_like(w) for w in weights}
    total = {w: torch.zeros_like(w) for w in weights}
    for sequence in tokens:
        model.zero_grad()
        model(sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        for w in weights:
            total[w] += w.grad
            squares[w].addcmul_(w.grad, w.grad)
    n = len(tokens)
    coarse = _scored(model, lambda w: w * total[w] / n, magnitude=True)
    fine = _scored(model, lambda w: (w * total[w] / n - w.square() * squares[w] / (2 * n)).abs())
    fused = [Scores(*map(_fused, c, f)) for c, f in zip(coarse, fine, strict=True)]
    return _cut(model, uniform(model, fused, goal))


def _fused(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    x = torch.stack([coarse / coarse.mean(), fine / fine.mean()])
    return torch.softmax(x @ x.T / x.shape[1], -1).mean(0) @ x
