"""Numerical Pruning in plain torch: a relaxed mask by Newton's method, one ranking, least-squares compensation.

Shen et al., `Numerical Pruning <https://arxiv.org/abs/2412.12441>`_, 2024, algorithm 1, equations 6 to 8 and theorem 3. The
problem is quadratic: the first Newton step is the last. Compensation goes layer by layer, on inputs that the pruned layers
before compute.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import _torch_llama as llama
import torch
from _torch_budget import Scores, over_all_layers
from _torch_llama import Goal, Kept

DAMP = 1e-2  # of the mean diagonal


def _damped(matrix: torch.Tensor) -> torch.Tensor:
    return matrix + DAMP * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def _mask(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The relaxed mask of the inputs, up to what all have in common, as the penalty on its sum grows without bound."""
    w = weight.double()
    factor = torch.linalg.cholesky(_damped((w.T @ w) * gram.double()))
    a = torch.cholesky_solve(torch.ones(len(gram), 1, dtype=torch.float64), factor)[:, 0]
    return -len(a) * a / a.sum()


def _refit(output: torch.nn.Linear, gram: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The weights on the kept inputs that change the output least."""
    rows, w = gram.double()[keep], output.weight.double().T
    kept = rows[:, keep]
    ridge = DAMP * kept.diagonal().mean()  # towards the dense weights
    return torch.cholesky_solve(rows @ w + ridge * w[keep], torch.linalg.cholesky(_damped(kept))).T.float()


@contextlib.contextmanager
def _grams(modules: list[torch.nn.Linear]) -> Iterator[list[torch.Tensor]]:
    """Sums over tokens of x x^T of what the modules read in this context."""
    sums = [torch.zeros(m.in_features, m.in_features) for m in modules]
    with llama.reading(modules, lambda i, x: sums[i].addmm_(x.T, x)):
        yield sums


@torch.no_grad()
def numerical(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Scores on the dense model, then compensates and cuts layer by layer."""
    outputs, heads = llama.outputs(model), model.config.num_key_value_heads
    with _grams(outputs) as grams:
        for batch in llama.batches(tokens):
            model.model(batch, use_cache=False)
    masks = [_mask(o.weight, gram) for o, gram in zip(outputs, grams, strict=True)]
    del grams
    kept = over_all_layers(model, [Scores(mlp, kv.view(heads, -1).mean(1)) for kv, mlp in llama.pairs(masks)], goal)
    rotary, head_dim = llama.positions(model, tokens.shape[1]), model.config.head_dim
    stream = [model.model.embed_tokens(batch) for batch in llama.batches(tokens)]
    for layer, k in zip(model.model.layers, kept, strict=True):
        columns = llama.inputs_of(k, layer.self_attn, head_dim)
        attention = functools.partial(llama.after_attention, layer, rotary=rotary)
        cut_attention = functools.partial(llama.cut_attention, layer, k, head_dim)
        stream = _compensated(stream, attention, layer.self_attn.o_proj, columns, cut_attention)
        mlp, cut_mlp = functools.partial(llama.after_mlp, layer), functools.partial(llama.cut_mlp, layer, k)
        stream = _compensated(stream, mlp, layer.mlp.down_proj, k.mlp, cut_mlp)
    return kept


def _compensated(
    stream: list[torch.Tensor], sublayer: Callable, output: torch.nn.Linear, keep: torch.Tensor, cut: Callable[[], None]
) -> list[torch.Tensor]:
    """Cuts a sublayer, refits what is left, and returns the stream after it."""
    if len(keep) < output.in_features:
        with _grams([output]) as grams:
            for x in stream:
                sublayer(x)
        new = _refit(output, grams[0], keep)
        cut()
        output.weight.copy_(new)
    return [sublayer(x) for x in stream]
