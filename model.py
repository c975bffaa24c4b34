"""PolychromaticLM: a decoder-only transformer with PolyGLU feed-forward layers (arXiv 2603.13347).

An ordinary feed-forward neuron has one fixed activation. A PolyGLU neuron mixes K of them, weighted by its own learned
preference and a router that reads the context. In reading order: PolyGLU and what its router reads, configuration,
attention with its masks and cache, loss, model. Other differences from a plain GPT:

- grouped-query attention, QK-norm (RMSNorm on every query and key head), RoPE, no biases outside the router, tied head
- documents packed into one row do not see each other (except through a "sequence" router); padding is one more document
- the loss is computed in chunks, so the logits are never all in memory
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# A new activation is one line here: an elementwise function, or an nn.Module class if it has parameters to learn.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # exact, by erf
}

# ------------------------------------------------------------------------------------------------------------- PolyGLU
# B rows, T tokens, K activations sigma_k, R = router_hidden. Symbols as in the paper:
#   alpha  [d_ff, K]   static preference of each neuron, learned, starts at 0
#   f      [B, T, K]   router output, shared by all neurons of the layer
#   beta   [K]         scale of the router, learned, starts at 1
#   tau    []          temperature: at 1 the activations mix, at 0.1 one dominates; training lowers it with set_tau()
#   g      [B, T, d_ff, K], held as K tensors [B, T, d_ff]: weight of each activation in each neuron at each token
#   u      [B, T, R]   W1 x + b1, input of the router's hidden layer
#   doc_start  [B, T]  index, in this call, of the first token of its document; -1: it began before; None: all -1
#   cache  [B, 1, (R + 1) + (K + 1)]   decoding only: sum of u and its token count | sum of f and its token count


class PolyGLU(nn.Module):
    """A gated linear unit whose neurons mix K activations (paper, section 3).

        PolyGLU(x) = W_down( [ sum_k g_k * sigma_k(x W_gate) ] * (x W_up) )
        g          = softmax( (alpha + beta * f + Gumbel noise) / tau )     over the K activations
        f          = W2 relu( context(W1 x + b1) ) + b2                     context: the mean of the document so far
                     with router_centred: f minus its own mean over the document so far

    It can be used on its own: PolyGLU(n_embd, d_ff)(x) maps [B, T, n_embd] to the same shape. The noise is drawn in
    training only. With one activation there is no g: a plain GLU (SwiGLU, GEGLU, ...). router_hidden=0 leaves out f.
    Raises ValueError for an unknown activation or router_context.
    """

    def __init__(
        self, n_embd: int, d_ff: int, activations: Sequence[str] = ("relu", "tanh", "silu", "gelu"),
        router_hidden: int = 32, router_context: str = "prefix", gumbel: bool = True, router_centred: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_routing(activations, router_context, router_centred)
        self.sigma = [s() if isinstance(s, type) else s for s in map(ACTIVATIONS.get, activations)]
        self.learned_sigma = nn.ModuleList(s for s in self.sigma if isinstance(s, nn.Module))  # registers parameters
        self.router_context, self.router_centred, self.gumbel = router_context, router_centred, gumbel
        self.w_gate = nn.Linear(n_embd, d_ff, bias=False)
        self.w_up = nn.Linear(n_embd, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, n_embd, bias=False)
        K = len(activations)
        self.is_mixed, self.has_router = K > 1, K > 1 and router_hidden > 0
        if self.is_mixed:
            self.alpha = nn.Parameter(torch.zeros(d_ff, K))
        if self.has_router:
            self.router_in = nn.Linear(n_embd, router_hidden)  # W1, b1
            self.router_out = nn.Linear(router_hidden, K)  # W2, b2
            self.beta = nn.Parameter(torch.ones(K))
        self.register_buffer("tau", torch.tensor(1.0))  # a tensor: torch.compile would recompile for every new float
        for module in self.children():
            init_linear(module)  # a layer by itself; PolychromaticLM initializes its layers again

    def forward(self, x: Tensor, doc_start: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        """x [B, T, n_embd] -> the same shape. doc_start and cache: see the symbols above."""
        gate, up = self.w_gate(x), self.w_up(x)  # [B, T, d_ff]
        if self.is_mixed:
            g = self.mixture(x, doc_start, cache)
            mixed = sum(g_k * sigma_k(gate) for g_k, sigma_k in zip(g, self.sigma))
        else:
            mixed = self.sigma[0](gate)
        return self.w_down((mixed * up).to(up.dtype))

    def mixture(self, x: Tensor, doc_start: Tensor | None = None, cache: Tensor | None = None) -> list[Tensor]:
        """The weights g = softmax(logits / tau): K tensors [B, T, d_ff], at least float32. Arguments as forward()'s.

        K separate tensors, not one stacked: the compiler fuses the whole mixture. extras/routing.py measures them.
        """
        per_neuron = at_least_fp32(self.alpha.t()).contiguous().expand(x.size(0), -1, -1)  # [B, K, d_ff]
        if self.training and self.gumbel:
            per_neuron = per_neuron + gumbel_noise(per_neuron)  # one draw a row, for all its tokens and documents
        per_token = self.dynamic_logits(x, doc_start, cache)  # [B, T, K]
        logits = [per_neuron[:, k, None, :] + per_token[:, :, k, None] for k in range(len(self.sigma))]  # [B, T, d_ff]
        # Subtracting the maximum keeps exp from overflowing. Softmax ignores the shift, so it needs no gradient.
        top = functools.reduce(torch.maximum, logits).detach()
        e = [((logit - top) / self.tau).exp() for logit in logits]
        total = sum(e)
        return [e_k / total for e_k in e]

    def dynamic_logits(self, x: Tensor, doc_start: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        """beta * f: x [B, T, n_embd] -> [B, T, K]; zeros without a router."""
        if not self.has_router:
            return self.alpha.new_zeros(*x.shape[:2], len(self.sigma))
        u = at_least_fp32(self.router_in(x))
        doc_start = torch.full(u.shape[:2], -1, device=u.device) if doc_start is None else doc_start
        with torch.autocast(x.device.type, enabled=False):  # sums in float32 or better; the rest of the router is cheap
            R = u.size(2)
            u_cache, f_cache = (None, None) if cache is None else (cache[..., : R + 1], cache[..., R + 1 :])
            context = ROUTER_CONTEXTS[self.router_context](u, doc_start, u_cache)
            f = self.router_out(F.relu(context).to(self.beta.dtype))
            if self.router_centred:
                f = f - prefix_mean(f, doc_start, f_cache)
            return self.beta * f


def set_tau(module: nn.Module, tau: float):
    """Set the temperature of every PolyGLU in this module. Raises ValueError unless it is above 0."""
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    for layer in module.modules():
        if isinstance(layer, PolyGLU):
            layer.tau.fill_(tau)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log(U)), of the shape, device and dtype of `like`."""
    uniform = torch.rand(like.shape, device=like.device, dtype=like.dtype)
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(like.dtype).tiny)))


def prefix_mean(u: Tensor, doc_start: Tensor, cache: Tensor | None) -> Tensor:
    """Mean of u over the document, up to and including each token: causal, and exact with a cache."""
    # float64: subtracting two large float32 sums would lose a short document's digits.
    terms = F.pad(u.to(sum_dtype(u)), (0, 1), value=1.0)  # [B, T, R + 1]; the last column counts tokens
    before = terms.new_zeros(u.size(0), 1, terms.size(2)) if cache is None else cache
    # sums:  0 | cache | cache + u_0 | cache + u_0 + u_1 | ...   The sum of a document that started at token s is what
    # stands at t + 2 less what stands at s + 1: 0 for s = -1, so that the cache counts; the cache for s = 0.
    sums = torch.cat((torch.zeros_like(before), before, terms), dim=1).cumsum(1)  # [B, T + 2, R + 1]
    in_document = sums[:, 2:] - sums.gather(1, (doc_start + 1)[:, :, None].expand_as(terms))
    if cache is not None:
        cache.copy_(in_document[:, -1:])
    return (in_document[..., :-1] / in_document[..., -1:]).to(u.dtype)


# What the router reads: functions (u, doc_start, cache) -> context, of the shape and dtype of u. W1 is linear, so to
# average u, R numbers a token, is to average x. u is at least float32; doc_start is never None.
#   cache  None, or [B, 1, R + 1] of sum_dtype(), zeros at first: state carried between calls, updated in place
# A context that reads later tokens belongs in ModelConfig.sees_future as well.
ROUTER_CONTEXTS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "prefix": prefix_mean,
    "token": lambda u, doc_start, cache: u,  # this token only, as Mixture of Activations does (arXiv 2605.26647)
    # The whole row, as in the paper's code: a token sees its future and other documents, and no cache can be exact.
    "sequence": lambda u, doc_start, cache: u.mean(dim=1, keepdim=True).expand_as(u),
}


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of long sums: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_routing(activations: Sequence[str], router_context: str, router_centred: bool):
    """Raise ValueError for routing that cannot be built."""
    if unknown := [name for name in activations if name not in ACTIVATIONS]:
        raise ValueError(f"unknown activation {unknown[0]!r}; there are {', '.join(ACTIVATIONS)}")
    if not activations or len(set(activations)) < len(activations):
        raise ValueError(f"activations are {activations}; name at least one, each once")
    if router_context not in ROUTER_CONTEXTS:
        raise ValueError(f"unknown router_context {router_context!r}; there are {', '.join(ROUTER_CONTEXTS)}")
    if router_centred and router_context == "sequence":
        raise ValueError("router_centred cancels a sequence router: it is the same at every token; use prefix or token")


def init_linear(module: nn.Module, std: float = 0.02):
    """Weights N(0, std) and biases 0 of an nn.Linear or nn.Embedding; other modules stay as they are."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass
class ModelConfig:
    """The shape of a model, by default the 597M-parameter PolychromaticLM. Raises ValueError if it cannot be built."""

    block_size: int = 4096  # context, in tokens
    vocab_size: int = 151_669  # rows of the embedding
    n_layer: int = 28  # transformer blocks
    n_head: int = 16  # query heads
    n_kv_head: int = 8  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 1024  # width of the residual stream
    head_dim: int = 64  # width of one attention head
    d_ff: int = 4096  # feed-forward neurons in a layer
    rope_theta: float = 10_000.0  # base of the RoPE frequencies
    norm_eps: float = 1e-6  # epsilon of every RMSNorm
    tied_head: bool = True  # whether the output head shares the embedding's weight
    tokenizer: str = "qwen3"  # tokenizer of the training data
    # routing
    activations: tuple[str, ...] = ("relu", "tanh", "silu", "gelu")  # mixed by every neuron; one: a plain GLU
    router_hidden: int = 32  # width of the router's hidden layer; 0: static preferences only
    router_context: str = "prefix"  # what the router reads: prefix, token, or sequence (as in the paper; not causal)
    router_centred: bool = False  # subtract from the router's output its mean over the document so far
    gumbel: bool = True  # Gumbel noise on the routing logits in training

    def __post_init__(self):
        self.activations = tuple(self.activations.split(",") if isinstance(self.activations, str) else self.activations)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_routing(self.activations, self.router_context, self.router_centred)
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta}, norm_eps {self.norm_eps}; they must be above 0")
        if self.router_hidden < 0:
            raise ValueError(f"router_hidden is {self.router_hidden}; it must be 0 (static preferences only) or more")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head is {self.n_head}; it must be a multiple of n_kv_head, which is {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    @property
    def sees_future(self) -> bool:
        """Whether the routing of a token depends on later tokens. A KV cache cannot be exact then."""
        return self.router_context == "sequence" and self.router_hidden > 0 and len(self.activations) > 1


# ----------------------------------------------------------------------------------------------------------- attention


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv 1910.07467); keeps shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(at_least_fp32(x), self.normalized_shape, at_least_fp32(self.weight), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): rotate the pairs (i, i + head_dim / 2) of x [B, T, H, head_dim] by angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layout(NamedTuple):
    """Positions, documents and attention mask of a batch, made once by PolychromaticLM.layout() for every layer."""

    cos: Tensor  # [T, 1, head_dim / 2], of each token's rotary angles
    sin: Tensor
    mask: Tensor | BlockMask | None  # attention mask, [B, 1, T, keys] bool or a block mask; None: causal
    doc_start: Tensor | None  # [B, T] int64, for the router, see ROUTER_CONTEXTS; None: one document a row
    positions: Tensor  # [T] int64: where the tokens go in the cache


class LayerCache(NamedTuple):
    """Decoding state of one layer, updated in place."""

    k: Tensor  # k and v: [B, n_kv_head, max_length, head_dim]
    v: Tensor
    router: Tensor  # [B, 1, router_hidden + K + 2]: the cache of PolyGLU


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245), RMSNorm on every query and key head before RoPE (QK-norm)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.w_q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.w_k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.w_v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.w_o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, n_embd] -> the same shape. Writes to the cache and, under a mask, attends to all of it."""
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.w_q, self.w_k, self.w_v))
        q = rotate(self.norm_q(q), layout.cos, layout.sin)
        k = rotate(self.norm_k(k), layout.cos, layout.sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, head_dim]
        if cache is not None:
            cache.k[:, :, layout.positions] = k.to(cache.k.dtype)
            cache.v[:, :, layout.positions] = v.to(cache.v.dtype)
            if layout.mask is not None:  # layout() makes one once the cache holds tokens
                k, v = cache.k, cache.v
        if isinstance(layout.mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
            y = attend(q, k, v, block_mask=layout.mask, enable_gqa=True)
        elif T == 1:  # fold each key head's queries into rows: CUDA has no fast kernel for enable_gqa with a mask
            rows = q.reshape(B, k.size(1), -1, self.head_dim)  # [B, n_kv_head, n_head / n_kv_head, head_dim]
            y = F.scaled_dot_product_attention(rows, k, v, layout.mask).reshape(q.shape)
        else:
            y = F.scaled_dot_product_attention(q, k, v, layout.mask, is_causal=layout.mask is None, enable_gqa=True)
        return self.w_o(y.transpose(1, 2).reshape(B, T, -1))


class KVCache:
    """Decoding state, so that each step runs only the new token: keys, values and router sums of `length` tokens.

    forward() fills it. Decoding attends to all max_length positions under a mask: shapes are static, so one compiled
    graph serves every token. It cannot be rewound: the router keeps only sums. ValueError for a "sequence" router.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device=None, dtype=torch.float32):
        if config.sees_future:
            raise ValueError('router_context="sequence" reads later tokens too, so no cache is exact; run without one')
        self.length, self.max_length = 0, max_length
        self.doc_ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        kv = torch.zeros(batch_size, config.n_kv_head, max_length, config.head_dim, dtype=dtype, device=device)
        router = kv.new_zeros(batch_size, 1, config.router_hidden + len(config.activations) + 2, dtype=sum_dtype(kv))
        self.layers = [LayerCache(kv.clone(), kv.clone(), router.clone()) for _ in range(config.n_layer)]


def document_mask(doc_ids: Tensor, positions: Tensor, flex: bool = False) -> Tensor | BlockMask:
    """Attention mask: a token attends to itself and to earlier tokens of its document.

    doc_ids [B, S] of all keys, positions [T] of the queries -> [B, 1, T, S] bool; with flex=True, which needs T = S, a
    block mask of FlexAttention.
    """
    (B, S), device = doc_ids.shape, doc_ids.device

    def is_visible(b, h, q, kv):
        return (q >= kv) & (doc_ids[b, q] == doc_ids[b, kv])

    if flex:
        return create_block_mask(is_visible, B, None, S, S, device=device)
    b = torch.arange(B, device=device)[:, None, None, None]
    return is_visible(b, None, positions[:, None], torch.arange(S, device=device))


@functools.cache
def compiled_flex_attention() -> Callable:
    """FlexAttention for an eager model: uncompiled, it would hold the [T, T] scores."""
    return torch.compile(flex_attention)  # not at import: loading the compiler takes seconds


class Block(nn.Module):
    """Pre-norm residual block: attention, then PolyGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffn = PolyGLU(
            config.n_embd, config.d_ff, config.activations,
            config.router_hidden, config.router_context, config.gumbel, config.router_centred,
        )  # fmt: skip

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, n_embd] -> [B, T, n_embd]."""
        x = x + self.attn(self.norm_1(x), layout, cache)
        return x + self.ffn(self.norm_2(x), layout.doc_start, None if cache is None else cache.router)


# ---------------------------------------------------------------------------------------------------------------- loss


def chunk_loss(h: Tensor, w: Tensor, target: Tensor, share: Tensor, V: int, needs_grad: bool = True):
    """Sum of share * cross-entropy of the first V logits h @ w.T, and its gradient with respect to the logits.

    h [C, d]; w [>= V, d], padded; target [C] int64; share [C], each token's weight in the mean, 0 if ignored. The
    gradient has h's dtype. Compiled, it is about one pass over the logits.
    """
    logits = at_least_fp32(h @ w.t())
    logits[:, V:] = -torch.inf
    log_p = logits.log_softmax(-1)
    loss = -(log_p.gather(1, target[:, None])[:, 0] * share).sum()
    if not needs_grad:
        return loss, None
    is_target = torch.arange(len(w), device=h.device) == target[:, None]
    return loss, log_p.exp_().add_(is_target, alpha=-1).mul_(share[:, None]).to(h.dtype)  # (softmax - one-hot) * share


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None = None, body: Callable = chunk_loss
) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight.T, in nats, without materializing all of them.

    hidden [N, d], weight [V, d], targets [N] int64 (-1: ignored) -> [], at least float32. chunk_size is in tokens
    (None: about 2**25 logits a chunk, 2**28 on a GPU). body: chunk_loss, compiled or not.
    """
    chunk_size = chunk_size or max(128, (2**28 if hidden.is_cuda else 2**25) // weight.size(0) // 128 * 128)
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_size, body, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """chunked_cross_entropy(): the forward pass computes each chunk's gradient too, while its logits are there."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, body, needs_grad: bool):
        dtype, (N, _), V = compute_dtype(hidden), hidden.shape, weight.size(0)
        n_chunks = -(-N // chunk_size)
        padding = -N % n_chunks  # rows with ignored targets: equal chunks need one compiled graph
        hidden_padded, targets = F.pad(hidden.to(dtype), (0, 0, 0, padding)), F.pad(targets, (0, padding), value=-1)
        w = F.pad(weight.to(dtype), (0, 0, 0, -V % 128))  # tensor cores are slow on an unpadded 151,669
        mask = (targets >= 0).to(at_least_fp32(hidden).dtype)
        share = mask / mask.sum().clamp_min(1)  # weight of each token in the mean
        loss, d_hidden = mask.new_zeros(()), []
        d_weight = torch.zeros_like(w, dtype=mask.dtype) if needs_grad else None
        for h, target, s in zip(*(x.chunk(n_chunks) for x in (hidden_padded, targets.clamp_min(0), share))):
            chunk_sum, grad = body(h, w, target, s, V, needs_grad)
            loss = loss + chunk_sum
            if needs_grad:
                d_hidden.append(grad @ w)
                if dtype == d_weight.dtype:
                    d_weight.addmm_(grad.t(), h)  # in place: no temporary [V, d]
                else:
                    d_weight += grad.t() @ h
        if needs_grad:
            ctx.save_for_backward(torch.cat(d_hidden)[:N], d_weight[:V])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight * d_loss, None, None, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product on x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --------------------------------------------------------------------------------------------------------------- model


class PolychromaticLM(nn.Module):
    """The whole model: embedding, blocks, norm, and the output head, which by default shares the embedding's weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # restores the RNG: how much is drawn here depends on the routing
            self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = RMSNorm(config.n_embd, config.norm_eps)
            if not config.tied_head:
                self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # recompute each block in the backward pass: less memory, more time
        self.chunk_loss = chunk_loss  # compile() replaces it
        self.flex: bool | None = None  # use FlexAttention for packed documents; None: on CUDA only
        self.init_weights()

    def compile(self, **options):
        """Compile in place, part by part: the blocks, which share one graph, and the loss of a chunk."""
        for block in self.blocks:
            block.compile(**options)
        self.chunk_loss = torch.compile(chunk_loss, dynamic=False, **options)

    def init_weights(self):
        """Initialize as the paper does. The routers come last, so that models that differ in routing share the rest.

        embedding, w_q, w_k, w_v, w_gate, w_up, router_in, router_out   N(0, 0.02)
        w_o, w_down    N(0, 0.02 / sqrt(2 n_layer)), because 2 n_layer of them add to the residual stream
        biases         0; the constructors have set alpha to 0, beta and the norms to 1
        """
        for name, module in sorted(self.named_modules(), key=lambda item: ".router_" in item[0]):  # False before True
            adds_to_residual = name.endswith((".w_o", ".w_down"))
            if ".learned_sigma." not in name:
                init_linear(module, std=0.02 / math.sqrt(2 * self.config.n_layer) if adds_to_residual else 0.02)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tied_head else self.head.weight  # [vocab_size, n_embd]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the next token, or their loss.

        tokens [B, T] int64. With targets [B, T] (-1: ignored): the mean cross-entropy in nats per token, [] float32.
        Else logits [B, T, vocab_size]; with a cache, those of the last position only, [B, 1, vocab_size].
        doc_ids [B, T] int64, in contiguous runs: attention and a causal router stay inside each document. With a cache
        the tokens continue the cached rows; without doc_ids, their last documents. Raises ValueError for a long row.
        """
        x = self.hidden(tokens, doc_ids, cache)
        if targets is None:
            return F.linear(x, self.head_weight)
        return chunked_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten(), body=self.chunk_loss)

    def hidden(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Input of the output head, [B, T, n_embd]; with a cache, of the last position. Arguments as forward()'s."""
        layout = self.layout(tokens, doc_ids, cache)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if cache is not None:  # a prompt runs uncompiled, by block.forward: every new length would recompile
                run = block if tokens.size(1) == 1 else block.forward
                x = run(x, layout, cache.layers[i])
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        if cache is not None:
            cache.length += tokens.size(1)
            x = x[:, -1:]
        return self.norm(x)

    def layout(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None) -> Layout:
        """Positions, documents and attention mask of a batch; the cache keeps the doc_ids. Arguments as forward()'s."""
        (B, T), device, c = tokens.shape, tokens.device, self.config
        past = 0 if cache is None else cache.length
        room = c.block_size if cache is None else min(c.block_size, cache.max_length)
        if past + T > room:
            raise ValueError(f"{past + T} tokens in a row, but there is room for {room}")
        positions, mask, doc_start = torch.arange(past, past + T, device=device), None, None
        last_doc_id = cache.doc_ids[:, past - 1 : past] if past else None  # of each row's last cached token, [B, 1]
        doc_ids = last_doc_id.expand(B, T) if doc_ids is None and past else doc_ids  # continue the current document
        if cache is not None:
            cache.doc_ids[:, past : past + T] = 0 if doc_ids is None else doc_ids
        if doc_ids is not None:
            previous = torch.cat((doc_ids[:, :1] if last_doc_id is None else last_doc_id, doc_ids[:, :-1]), dim=1)
            doc_start = torch.where(doc_ids != previous, torch.arange(T, device=device), -1).cummax(1).values
            flex = cache is None and (tokens.is_cuda if self.flex is None else self.flex)
            mask = document_mask(doc_ids if cache is None else cache.doc_ids, positions, flex)
        tokens_per_radian = c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
        angles = positions[:, None, None] / tokens_per_radian  # [T, 1, head_dim / 2]
        return Layout(angles.cos(), angles.sin(), mask, doc_start, positions)

    def configure_optimizer(
        self, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8,
        routing_lr: float = 1.0, alpha_lr: float = 1.0,
    ) -> torch.optim.AdamW:  # fmt: skip
        """Fused AdamW. Only weight matrices and the embedding decay: never alpha, beta, norms or biases.

        Parameters that need no gradient are left out. The caller multiplies the learning rate by each group's
        "lr_scale": routing_lr for routing parameters, routing_lr * alpha_lr for alpha, 1 for the rest.
        """
        groups = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                is_alpha = name.endswith(".ffn.alpha")
                is_routing = is_alpha or name.endswith(".ffn.beta") or ".ffn.router_" in name
                decays = p.dim() == 2 and not is_alpha
                scale = (routing_lr if is_routing else 1.0) * (alpha_lr if is_alpha else 1.0)
                decay = weight_decay * decays / (scale or 1)  # AdamW decays by lr * wd: a higher lr must not decay more
                group = {"params": [], "weight_decay": decay, "lr_scale": scale}
                groups.setdefault((decays, is_routing, is_alpha), group)["params"].append(p)
        groups = [group for _, group in sorted(groups.items(), reverse=True)]  # in a fixed order, for checkpoints
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
