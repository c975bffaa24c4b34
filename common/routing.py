"""Five measures of what the routing does; docs/routing.md explains them."""

import math

import torch
from torch import Tensor

from model import PolychromaticLM, make_layout

COLLAPSED = 0.9  # a layer has collapsed if it gives more than this share of its weight to one activation


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the first dimension, in nats: [K, ...] -> [...]."""
    return torch.special.entr(p.clamp_max(1)).sum(0)  # rounding can leave a probability a little above 1


@torch.no_grad()
def routing_stats(
    model: PolychromaticLM, tokens: Tensor, doc_ids: Tensor | None = None, is_text: Tensor | None = None
) -> dict[str, list]:
    """Measures of the routing on tokens [B, T], without noise: {measure: list over layers}; empty for a plain GLU.

    is_text [B, T] bool: the tokens to average over; None: all.
    - static_entropy: of softmax(alpha), mean over neurons, in nats. Independent of the input and of tau.
    - dynamic_entropy: of g, mean over neurons and tokens, in nats
    - usage: share of each activation [K], the mean of g
    - input_dependence: mutual information between choice and token, mean over neurons, in nats: H(mean g) - mean H(g)
    - agreement: largest share of the layer's neurons that favour the same activation, mean over tokens
    - static_entropy_share, dynamic_entropy_share: the entropies as shares of ln K
    """
    if len(model.config.activations) == 1:
        return {}
    max_entropy = math.log(len(model.config.activations))
    layers = []
    was_training = model.training
    model.eval()
    layout = make_layout(model, tokens, doc_ids)
    x = model.embedding(tokens)
    is_text = torch.ones_like(tokens, dtype=torch.bool) if is_text is None else is_text
    n_tokens = is_text.sum()
    for block in model.blocks:  # as Block.forward(), but it keeps h, the input of PolyGLU
        x = x + block.attn(block.norm_1(x), layout)
        h = block.norm_2(x)
        x = x + block.ffn(h, layout.doc_start)
        dynamic, agreement, mean_g = 0.0, 0.0, 0.0
        for i in range(len(tokens)):  # a row at a time: g has K * T * d_ff numbers
            doc_start = None if layout.doc_start is None else layout.doc_start[i : i + 1]
            e = torch.stack(block.ffn.unnormalized_weights(h[i : i + 1], doc_start))[:, 0, is_text[i]]
            g = e / e.sum(0)  # [K, tokens, d_ff]
            votes = (g == g.amax(0)).float()  # a tie splits the neuron's vote
            agreement += (votes / votes.sum(0)).mean(-1).amax(0).sum() / n_tokens
            dynamic += entropy(g).mean(-1).sum() / n_tokens
            mean_g += g.sum(1) / n_tokens  # [K, d_ff]
        static = entropy(block.ffn.alpha.t().softmax(0)).mean().item()
        stats = {"static_entropy": static, "static_entropy_share": static / max_entropy}
        stats |= {"dynamic_entropy": dynamic.item(), "dynamic_entropy_share": dynamic.item() / max_entropy}
        stats |= {"usage": mean_g.mean(-1).tolist(), "agreement": agreement.item()}
        stats["input_dependence"] = (entropy(mean_g).mean() - dynamic).clamp_min(0).item()
        layers.append(stats)
    model.train(was_training)
    return {name: [stats[name] for stats in layers] for name in layers[0]}
