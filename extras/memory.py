"""Memory that a run needs on a GPU."""

from model import PolychromaticLM
from train import TrainConfig, pick_dtype


def estimate_memory(model: PolychromaticLM, cfg: TrainConfig) -> int:
    """Bytes of GPU memory that a compiled run needs: an estimate, as in docs/performance.md."""
    c, tokens = model.config, cfg.micro_batch_size * model.config.block_size
    size = pick_dtype(cfg.dtype, model.device).itemsize  # of what a matmul reads
    # Kept for the backward pass, per token and block: the residual stream twice, both norms, the heads before and after
    # QK-norm and RoPE, attention's output, and gate, up and their product.
    heads = (3 * c.n_head + 4 * c.n_kv_head) * c.head_dim
    block = 2 * 4 * c.n_embd + size * (2 * c.n_embd + heads + 3 * c.d_ff)
    kept = tokens * (4 * c.n_embd * c.n_layer + block if cfg.recompute else block * c.n_layer)
    head = (4 + size) * (min(2**28, tokens * c.vocab_size) + c.n_embd * c.vocab_size)  # a chunk of logits, the gradient
    # A trained parameter takes 16 bytes: itself, its gradient and AdamW's two moments.
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) + kept + head
