"""Methods that score by activations of one forward pass, in plain torch: FLAP, Wanda-sp, LLM-BIP and ShortGPT.

An et al., `FLAP <https://arxiv.org/abs/2312.11983>`_, 2024, equations 4 to 8, and its baseline Wanda-sp; Wu, `LLM-BIP
<https://arxiv.org/abs/2412.06419>`_, 2024; Men et al., `ShortGPT <https://arxiv.org/abs/2403.03853>`_, 2024, equation 1.
"""

from typing import NamedTuple

import _torch_llama as llama
import torch
from _torch_budget import Scores, highest, over_all_layers, uniform, uniform_widths, whole_layers
from _torch_llama import Goal, Kept


class Moments(NamedTuple):
    """Of the features: tokens seen, mean, sum of squared deviations from it."""

    count: int
    mean: torch.Tensor
    deviations: torch.Tensor


def merged(old: Moments, x: torch.Tensor) -> Moments:
    """The moments with one more batch, [tokens, features]."""
    n, mean = len(x), x.mean(0)
    total, step = old.count + n, mean - old.mean
    deviations = old.deviations + (x - mean).square().sum(0) + step.square() * (old.count * n / total)
    return Moments(total, old.mean + step * (n / total), deviations)


@torch.no_grad()
def flap(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Fluctuation times square norm, standardised by layer and sublayer, one ranking; biases stand for what goes."""
    outputs, heads = llama.outputs(model), model.config.num_key_value_heads
    moments = [Moments(0, *torch.zeros(2, o.in_features)) for o in outputs]

    def see(i: int, x: torch.Tensor) -> None:
        moments[i] = merged(moments[i], x)

    with llama.reading(outputs, see):
        for batch in llama.batches(tokens):
            model.model(batch, use_cache=False)

    def standard(s: torch.Tensor) -> torch.Tensor:
        return (s - s.mean()) / s.std()

    raw = [m.deviations / (m.count - 1) * o.weight.square().sum(0) for m, o in zip(moments, outputs, strict=True)]
    scores = [Scores(standard(mlp), standard(kv.square()).view(heads, -1).mean(1)) for kv, mlp in llama.pairs(raw)]
    kept = over_all_layers(model, scores, goal)
    for layer, k, (kv, mlp) in zip(model.model.layers, kept, llama.pairs(moments), strict=True):
        columns = llama.inputs_of(k, layer.self_attn, model.config.head_dim)
        for output, stay, m in ((layer.self_attn.o_proj, columns, kv), (layer.mlp.down_proj, k.mlp, mlp)):
            gone = torch.ones_like(m.mean).index_fill(0, stay, 0)
            output.bias = torch.nn.Parameter(output.weight @ (m.mean * gone))
    llama.cut(model, kept)
    return kept


@torch.no_grad()
def wanda_sp(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Weight magnitude times input norm, layer by layer, each on what the layers pruned before it compute."""
    heads, (mlp, kv), kept = model.config.num_key_value_heads, uniform_widths(model, goal), llama.full(model)
    rotary = llama.positions(model, tokens.shape[1])
    stream = [model.model.embed_tokens(batch) for batch in llama.batches(tokens)]
    for i in range(goal.layers.stop):
        layer = model.model.layers[i]
        squares = [0.0, 0.0]

        def add(which: int, x: torch.Tensor, squares=squares) -> None:
            squares[which] = squares[which] + x.square().sum(0)

        outputs = (layer.self_attn.o_proj, layer.mlp.down_proj)
        if i in goal.layers:
            with llama.reading(outputs, add):
                for x in stream:
                    layer(x, position_embeddings=rotary)
            by_input = [o.weight.abs().mean(0) * s.div(tokens.numel()).sqrt() for o, s in zip(outputs, squares, strict=True)]
            kept[i] = Kept(highest(by_input[1], mlp), highest(by_input[0].view(heads, -1).sum(1), kv))
            llama.cut_attention(layer, kept[i], model.config.head_dim)
            llama.cut_mlp(layer, kept[i])
        stream = [layer(x, position_embeddings=rotary) for x in stream]
    return kept


@torch.no_grad()
def llm_bip(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Sum over tokens of the norm of what a unit adds to the residual stream."""
    outputs, heads = llama.outputs(model), model.config.num_key_value_heads
    sums = [0.0] * len(outputs)

    def add(i: int, x: torch.Tensor) -> None:
        weight = outputs[i].weight
        if i % 2:  # the MLP: one weight column a channel
            sums[i] = sums[i] + x.abs().sum(0) * weight.norm(dim=0)
        else:
            parts = torch.einsum("nui,dui->nud", x.unflatten(1, (heads, -1)), weight.unflatten(1, (heads, -1)))
            sums[i] = sums[i] + parts.norm(dim=2).sum(0)

    with llama.reading(outputs, add):
        for batch in llama.batches(tokens):
            model.model(batch, use_cache=False)
    kept = uniform(model, [Scores(mlp, kv) for kv, mlp in llama.pairs(sums)], goal)
    llama.cut(model, kept)
    return kept


@torch.no_grad()
def shortgpt(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """One minus the cosine between a layer's input and output; the layers that turn the stream least go."""
    layers = model.model.layers
    influence, rotary = torch.zeros(len(layers)), llama.positions(model, tokens.shape[1])
    for batch in llama.batches(tokens):
        x = model.model.embed_tokens(batch)
        for i, layer in enumerate(layers):
            before, x = x, llama.after_mlp(layer, llama.after_attention(layer, x, rotary))
            influence[i] += (1 - torch.nn.functional.cosine_similarity(before, x, dim=-1)).sum()
    kept = whole_layers(model, influence, goal)
    model.model.layers = torch.nn.ModuleList(layer for layer, k in zip(layers, kept, strict=True) if len(k.mlp))
    model.config.num_hidden_layers = len(model.model.layers)
    return kept
