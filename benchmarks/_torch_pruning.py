"""Torch-Pruning (Fang et al., `DepGraph <https://arxiv.org/abs/2301.12900>`_, 2023) on a LlamaForCausalLM: Taylor scores.

It prunes MLP channels alone here: tracing the groups of grouped-query attention (`repeat_kv`) does not come to an end in 1.6.1.
"""

import torch


def taylor(model, tokens: torch.Tensor, ratio: float, layers: range) -> None:
    """Removes channels of these layers, as many as hold the fraction `ratio` of each layer's matrices, in place."""
    import torch_pruning

    model.config._attn_implementation = "eager"  # which it can trace
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    decoder = model.model.layers
    mlp, attention = decoder[0].mlp, decoder[0].self_attn
    of_layer = sum(p.numel() for part in (mlp, attention) for p in part.parameters())
    channels = ratio * of_layer / sum(p.numel() for p in mlp.parameters())
    whole = [p for layer in decoder for p in (*layer.self_attn.children(), layer.mlp.down_proj)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=tokens[:1],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict={decoder[i].mlp.up_proj: channels for i in layers},
        ignored_layers=[model.lm_head, model.model.embed_tokens, *whole],
        output_transform=lambda out: out.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
