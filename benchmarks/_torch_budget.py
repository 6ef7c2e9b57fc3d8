"""From scores to what stays: the four ways to spend a budget of parameters, in plain torch.

Costs are parameters that go with a unit; MLP widths are multiples of 8; every layer keeps a key/value head and 8 channels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from _torch_llama import Goal, Kept, full

STEP = 8


class Scores(NamedTuple):
    """Of one layer: MLP channels and key/value heads."""

    mlp: torch.Tensor
    kv: torch.Tensor


class Costs(NamedTuple):
    """Parameters of a channel, of a key/value head with its query heads, and of the matrices of all layers."""

    channel: int
    head: int
    decoder: int


def costs(model) -> Costs:
    """Of a LlamaForCausalLM."""
    c = model.config
    channel = 3 * c.hidden_size
    head = 2 * c.head_dim * c.hidden_size * (1 + c.num_attention_heads // c.num_key_value_heads)
    layer = channel * c.intermediate_size + head * c.num_key_value_heads
    return Costs(channel, head, layer * c.num_hidden_layers)


def highest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Sorted positions of the n highest scores; of equal ones the first."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:n]).values


def uniform_widths(model, goal: Goal) -> tuple[int, int]:
    """Channels and key/value heads that each layer keeps: the same fraction goes, heads rounded down, channels make up."""
    price, c = costs(model), model.config
    budget = round(goal.ratio * price.decoder)
    groups, channels = c.num_key_value_heads, c.intermediate_size
    n = len(goal.layers)
    gone = int(budget / (n * (price.head * groups + price.channel * channels)) * groups + 1e-9)
    left = budget - n * price.head * gone
    return round((channels - left / (n * price.channel)) / STEP) * STEP, groups - gone


def uniform(model, scores: list[Scores], goal: Goal) -> list[Kept]:
    """Each layer by itself: LLM-Pruner's local ranking."""
    kept, (mlp, kv) = full(model), uniform_widths(model, goal)
    for i in goal.layers:
        kept[i] = Kept(highest(scores[i].mlp, mlp), highest(scores[i].kv, kv))
    return kept


def over_all_layers(model, scores: list[Scores], goal: Goal) -> list[Kept]:
    """All heads and channels of all layers in one ranking, until the budget is spent."""
    price = costs(model)
    heads = [(s, i, 1) for i in goal.layers for s in scores[i].kv.double().sort().values[:-1].tolist()]
    ranked = sorted([(*h, 0) for h in heads] + [(*b, 1) for b in _blocks(scores, goal)])
    counts = [[len(s.kv), len(s.mlp)] for s in scores]
    spent = _spend(
        round(goal.ratio * price.decoder), ((n * (price.head, price.channel)[a], (i, a, n)) for _, i, n, a in ranked)
    )
    for i, a, n in spent:
        counts[i][a] -= n
    return _of_counts(scores, counts)


def by_type(model, scores: list[Scores], goal: Goal, gamma: float = 3.36) -> list[Kept]:
    """Heads and channels ranked apart over all layers, a channel's chance of going `gamma` times a head's: NIRVANA."""
    price = costs(model)
    budget = round(goal.ratio * price.decoder)
    counts = [[len(s.kv), len(s.mlp)] for s in scores]
    held = [p * sum(counts[i][a] for i in goal.layers) for a, p in enumerate((price.head, price.channel))]
    heads = sorted((s, i) for i in goal.layers for s in scores[i].kv.double().tolist())
    for _, i in heads[: int(budget / (held[0] + gamma * held[1]) * len(heads) + 1e-9)]:
        if counts[i][0] > 1:
            counts[i][0] -= 1
            budget -= price.head
    for i, n in _spend(budget, ((n * price.channel, (i, n)) for _, i, n in sorted(_blocks(scores, goal)))):
        counts[i][1] -= n
    return _of_counts(scores, counts)


def whole_layers(model, scores: torch.Tensor, goal: Goal) -> list[Kept]:
    """The layers with the lowest scores go."""
    price, kept = costs(model), full(model)
    nothing = Kept(*(torch.arange(0) for _ in Kept._fields))
    order = sorted(goal.layers, key=lambda i: (float(scores[i]), i))
    for i in _spend(round(goal.ratio * price.decoder), ((price.decoder // len(kept), i) for i in order)):
        kept[i] = nothing
    return kept


def _blocks(scores: list[Scores], goal: Goal) -> list[tuple[float, int, int]]:
    """Mean score, layer and size of the blocks of channels that may go, those of a layer in ascending order."""
    found = []
    for i in goal.layers:
        s = scores[i].mlp.double().sort().values
        sizes = [len(s) % STEP] * (len(s) % STEP > 0) + [STEP] * (len(s) // STEP)
        found += [(float(block.mean()), i, len(block)) for block in s.split(sizes)[:-1]]
    return found


def _spend(budget: int, priced: Iterable[tuple[int, tuple | int]]) -> list:
    """What brings the rest of the budget nearer to nothing, in the given order."""
    bought = []
    for price, thing in priced:
        if abs(budget - price) < budget:
            budget -= price
            bought.append(thing)
    return bought


def _of_counts(scores: list[Scores], counts: list[list[int]]) -> list[Kept]:
    return [Kept(highest(s.mlp, mlp), highest(s.kv, kv)) for s, (kv, mlp) in zip(scores, counts, strict=True)]
