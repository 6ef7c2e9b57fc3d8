"""SliceGPT in plain torch: the residual stream in its principal components, of which the last are deleted.

Ashkboos et al., `SliceGPT <https://arxiv.org/abs/2401.15024>`_, 2024, section 3: components of the embedding's output and of
the stream after each sublayer, each of what the layers sliced before compute; second moments in float64 with the damping of
the released code. As an RMSNorm model needs it, the mean of the embeddings stays and the norm keeps its epsilon; the head reads
the principal components. The width is the multiple of 8 at which the decoder, shortcuts counted, has the parameters asked for.
"""

import torch
from _torch_budget import costs
from _torch_llama import Goal, Kept, batches, full, positions

DAMP = 0.01  # of the mean diagonal
STEP = 8


class Norm(torch.nn.Module):
    """RMSNorm without gain that divides by the width before slicing."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms the last axis."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)


class Layer(torch.nn.Module):
    """A decoder layer in components that change at both sublayers: the stream passes through a matrix at each."""

    def __init__(self, layer, norm: Norm):
        super().__init__()
        self.norm, self.self_attn, self.mlp = norm, layer.self_attn, layer.mlp
        self.attn_shortcut = self.mlp_shortcut = torch.empty(0)

    def forward(self, x: torch.Tensor, position_embeddings=None, **unused) -> torch.Tensor:
        """The stream after the layer."""
        x = (
            x @ self.attn_shortcut
            + self.self_attn(self.norm(x), position_embeddings=position_embeddings, attention_mask=None)[0]
        )
        return x @ self.mlp_shortcut + self.mlp(self.norm(x))


def width_for(model, goal: Goal) -> int:
    """Components to keep."""
    d, dense, n = model.config.hidden_size, costs(model).decoder, len(model.model.layers)
    wanted = (1 - goal.ratio) * dense
    return min(range(STEP, d + 1, STEP), key=lambda w: abs(dense * w / d + 2 * n * w * w - wanted))


def _components(stream: list[torch.Tensor], width: int) -> torch.Tensor:
    """The first principal components of the tokens, as columns."""
    d = stream[0].shape[-1]
    moment = torch.zeros(d, d, dtype=torch.float64)
    for x in stream:
        rows = x.double().flatten(0, -2)
        moment += rows.T @ rows
    moment += DAMP * moment.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    return torch.linalg.eigh(moment)[1].flip(1)[:, :width]


def _read(linear, gain: torch.Tensor, q: torch.Tensor) -> None:
    """Lets a matrix read the components, the gain of the norm before it included."""
    linear.weight = torch.nn.Parameter((linear.weight.double() * gain.double() @ q).float())
    linear.in_features = q.shape[1]


def _write(linear, q: torch.Tensor) -> None:
    """Lets a matrix write the components."""
    linear.weight = torch.nn.Parameter((q.T @ linear.weight.double()).float())
    linear.out_features = q.shape[1]


@torch.no_grad()
def slicegpt(model, tokens: torch.Tensor, goal: Goal) -> list[Kept]:
    """Rotates and slices a model in place; all units stay."""
    width, rotary = width_for(model, goal), positions(model, tokens.shape[1])
    embed, norm = model.model.embed_tokens, Norm(model.config.hidden_size, model.config.rms_norm_eps)
    head = model.lm_head.weight.detach()
    stream = [embed(batch) for batch in batches(tokens)]
    q = _components(stream, width)
    embed.weight = torch.nn.Parameter((embed.weight.double() @ q).float())
    stream = [x @ q.float() for x in stream]
    for i, layer in enumerate(model.model.layers):
        new = Layer(layer, norm)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            _read(linear, layer.input_layernorm.weight, q)

        def attend(x: torch.Tensor, new=new) -> torch.Tensor:
            return new.self_attn(norm(x), position_embeddings=rotary, attention_mask=None)[0]

        stream, q, new.attn_shortcut = _turn(stream, attend, new.self_attn.o_proj, q, width)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            _read(linear, layer.post_attention_layernorm.weight, q)
        stream, q, new.mlp_shortcut = _turn(stream, lambda x, new=new: new.mlp(norm(x)), new.mlp.down_proj, q, width)
        model.model.layers[i] = new
    model.lm_head.weight = torch.nn.Parameter((head.double() * model.model.norm.weight.double() @ q).float())
    model.model.norm = norm
    return full(model)


def _turn(stream, sublayer, output: torch.nn.Linear, q: torch.Tensor, width: int):
    """The sliced stream after a sublayer, its components, and the shortcut to them; `output` writes them from now on."""
    back = q.T.float()
    dense = [x @ back + sublayer(x) for x in stream]
    after = _components(dense, width)
    _write(output, after)
    return [x @ after.float() for x in dense], after, (q.T @ after).float()
