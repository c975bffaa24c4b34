"""PolychromaticLM: a decoder-only transformer with PolyGLU feed-forward layers (arXiv 2603.13347).

An ordinary feed-forward neuron has one fixed activation. A PolyGLU neuron mixes K of them, weighted
by its own learned preference and by a router that reads the context. Read downward: PolyGLU, the
transformer around it, and then what makes it fast and exact: masks, key/value cache, chunked loss.
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

# A new activation is one line here: a function, or an nn.Module class if it has parameters.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # exact, by erf
}

# ----------------------------------------------------------------------------------------- PolyGLU
# B rows, T tokens, F = d_ff neurons, K activations sigma_k, R = router_hidden
#   alpha [F, K]     static preference of each neuron; learned, starts at 0
#   u     [B, T, R]  W1 x + b1, which the router averages over the document so far
#   f     [B, T, K]  output of the router, the same for all neurons of the layer
#   beta  [K]        scale of f; learned, starts at 1
#   tau   []         temperature: at 1 the activations mix, at 0.1 one dominates; see set_tau()
#   g     K x [B, T, F]  weight of each activation in each neuron at each token
# For packed documents and decoding:
#   doc_start [B, T] index, in this call, of the first token of each token's document; -1 if the
#                    document opens the row or began in an earlier call; None: all -1
#   router_sums      [B, 1, R + 1], [B, 1, K + 1] float64 (on Apple GPUs float32): sums of u and of f
#                    over the document in earlier calls; the last column is the number of tokens


class PolyGLU(nn.Module):
    """A gated linear unit whose neurons mix K activations (paper, section 3).

        PolyGLU(x) = W_down( [ sum_k g_k * sigma_k(x W_gate) ] * (x W_up) )
        g          = softmax( (alpha + Gumbel noise + beta * f) / tau )    over the K activations
        f          = W2 relu( context(W1 x + b1) ) + b2                    context: a running mean

    It stands alone: PolyGLU(n_embd, d_ff)(x) maps [B, T, n_embd] to the same shape. The noise is
    for training only: one draw per row, neuron and activation, the same for all tokens of the row.
    One activation alone makes a plain GLU, without g. router_hidden=0 leaves out f; router_centred
    subtracts from f its running mean, and so cancels b2.
    """

    def __init__(
        self, n_embd: int, d_ff: int, activations: Sequence[str] = ("relu", "tanh", "silu", "gelu"),
        router_hidden: int = 32, router_context: str = "prefix", gumbel: bool = True,
        router_centred: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_routing(activations, router_context, router_centred)
        self.sigma = [s() if isinstance(s, type) else s for s in map(ACTIVATIONS.get, activations)]
        self.learned_sigma = nn.ModuleList(s for s in self.sigma if isinstance(s, nn.Module))
        self.router_context = router_context
        self.router_centred = router_centred
        self.gumbel = gumbel
        K = len(activations)
        self.w_gate = nn.Linear(n_embd, d_ff, bias=False)
        self.w_up = nn.Linear(n_embd, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, n_embd, bias=False)
        self.is_mixed = K > 1
        self.has_router = K > 1 and router_hidden > 0
        if self.is_mixed:
            self.alpha = nn.Parameter(torch.zeros(d_ff, K))
        if self.has_router:
            self.router_in = nn.Linear(n_embd, router_hidden)  # W1, b1
            self.router_out = nn.Linear(router_hidden, K)  # W2, b2
            self.router_out.bias.requires_grad_(not router_centred)  # or rounding would train it
            self.beta = nn.Parameter(torch.ones(K))
        self.register_buffer("tau", torch.tensor(1.0))
        for module in self.children():
            init_linear(module)

    def forward(self, x, doc_start=None, router_sums=None) -> Tensor:
        """x [B, T, n_embd] -> the same shape. doc_start and router_sums: see above the class."""
        if x.dim() != 3:
            raise ValueError(f"x has shape {list(x.shape)}; PolyGLU takes [B, T, n_embd]")
        gate, up = self.w_gate(x), self.w_up(x)  # [B, T, F]
        if self.is_mixed:
            e = self.unnormalized_weights(x, doc_start, router_sums)  # g = e / sum(e)
            mixed = add([e_k * sigma_k(gate) for e_k, sigma_k in zip(e, self.sigma)]) / add(e)
        else:
            mixed = self.sigma[0](gate)
        return self.w_down((mixed * up).to(up.dtype))  # if K > 1, mixed is at least float32

    def unnormalized_weights(self, x, doc_start=None, router_sums=None) -> list[Tensor]:
        """The weights g before they are divided by their sum: K x [B, T, F], at least float32."""
        static = at_least_fp32(self.alpha.t())  # [K, F]
        if self.training and self.gumbel:
            noise = gumbel_noise(static.expand(x.size(0), -1, -1))  # [B, K, F]
            static = noise + static  # noise first: the sum takes its layout, contiguous along F
        dynamic = self.dynamic_logits(x, doc_start, router_sums)  # [B, T, K]
        ones = [1] * len(self.sigma)  # split(ones) makes 2 K fewer calls than split(1)
        static = (static / self.tau).split(ones, dim=-2)  # K x [B, 1, F], or [1, F] for all rows
        dynamic = (dynamic / self.tau).split(ones, dim=-1)  # K x [B, T, 1]
        # F.softmax of the stacked logits gives the same, but the compiler could not fuse it.
        logits = [a + b for a, b in zip(static, dynamic)]
        with torch.no_grad():  # subtracting the maximum keeps exp finite; it cancels in e / sum(e)
            top = functools.reduce(torch.maximum, logits)
        return [logit.sub_(top).exp_() for logit in logits]  # in place: less memory to move

    def dynamic_logits(self, x, doc_start=None, router_sums=None) -> Tensor:
        """Router logits beta * f: [B, T, K]; zeros without a router."""
        if not self.has_router:
            return self.alpha.new_zeros(*x.shape[:2], len(self.sigma))
        u = at_least_fp32(self.router_in(x))  # averaging x first gives the same f, but slower
        u_sums, f_sums = router_sums or (None, None)
        with torch.autocast(x.device.type, enabled=False):  # the rest in float32: it is cheap
            context = ROUTER_CONTEXTS[self.router_context](u, doc_start, u_sums)
            bias = None if self.router_centred else at_least_fp32(self.router_out.bias)
            f = F.linear(F.relu(context), at_least_fp32(self.router_out.weight), bias)
            if self.router_centred:
                f = f - running_mean(f, doc_start, f_sums)
            return self.beta * f


def running_mean(u: Tensor, doc_start: Tensor | None, sums: Tensor | None) -> Tensor:
    """Mean of u [B, T, R] over the document so far, this token included.

    sums [B, 1, R + 1], see router_sums above, are updated in place.
    """

    def sum_so_far(terms: Tensor) -> Tensor:
        total = terms.cumsum(1)
        if doc_start is not None:  # subtract the tokens before the document
            start = doc_start.clamp_min(0)[:, :, None].expand_as(terms)
            total = total - (total - terms).gather(1, start)
        return total

    # float64: subtracting two large float32 sums would lose a short document's digits.
    terms = u.to(sum_dtype(u))
    total, count = sum_so_far(terms), sum_so_far(torch.ones_like(terms[..., :1]))
    if sums is not None:  # add its tokens of earlier calls
        earlier = sums if doc_start is None else sums * (doc_start < 0)[:, :, None]
        total, count = total + earlier[..., :-1], count + earlier[..., -1:]
        sums.copy_(torch.cat((total[:, -1:], count[:, -1:]), dim=-1))
    return (total / count).to(u.dtype)


# What the router reads. Each maps u, doc_start (or None) and sums (None, or updated in place) to a
# tensor like u. The paper's code averages the whole row, so a token sees the future; the default is
# a causal mean. If yours reads later tokens, add it to sees_future.
ROUTER_CONTEXTS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "prefix": running_mean,
    "token": lambda u, doc_start, sums: u,  # close to Mixture of Activations (arXiv 2605.26647)
    "sequence": lambda u, doc_start, sums: u.mean(dim=1, keepdim=True).expand_as(u),
}


def add(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of two or more tensors, in place after the first addition: less memory to move."""
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total += tensor
    return total


def set_tau(module: nn.Module, tau: float):
    """Set the temperature of every PolyGLU in this module. Raises ValueError unless it is above 0."""
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    for layer in module.modules():
        if isinstance(layer, PolyGLU):
            layer.tau = torch.full_like(layer.tau, tau)  # new: a backward pass may need the old one


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log(U)), of the shape, device and dtype of `like`."""
    uniform = torch.rand(like.shape, device=like.device, dtype=like.dtype)
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(like.dtype).tiny)))


def init_linear(module: nn.Module, std: float = 0.02):
    """Weights N(0, std) and biases 0 of an nn.Linear or nn.Embedding; others stay as they are."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------- configuration

# must be above 0; a checkpoint must name them, because the defaults are PolychromaticLM's
REQUIRED = "block_size vocab_size n_layer n_head n_kv_head n_embd head_dim d_ff rope_theta norm_eps".split()


@dataclass
class ModelConfig:
    """The shape of a model, by default PolychromaticLM's. Raises ValueError if it cannot be built."""

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
    activations: tuple[str, ...] = ("relu", "tanh", "silu", "gelu")  # one alone: a plain GLU
    router_hidden: int = 32  # width of the router's hidden layer; 0: static preferences only
    router_context: str = "prefix"  # what the router reads: prefix, token, or sequence (not causal)
    router_centred: bool = False  # subtract the mean of the router's output over the document so far
    gumbel: bool = True  # Gumbel noise on the routing logits in training

    def __post_init__(self):
        self.activations = tuple(self.activations)
        for name in REQUIRED:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.router_hidden < 0:
            raise ValueError(f"router_hidden is {self.router_hidden}; it must be 0 or more")
        check_routing(self.activations, self.router_context, self.router_centred)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head is {self.n_head}; it must be a multiple of n_kv_head, {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    @property
    def sees_future(self) -> bool:
        """Whether routing depends on later tokens. A key/value cache cannot be exact then."""
        is_routed = self.router_hidden > 0 and len(self.activations) > 1
        return is_routed and self.router_context == "sequence"


# ------------------------------------------------------------------------------------- transformer


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (arXiv 1910.07467), computed in float32 and returned in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), self.normalized_shape, weight, self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): rotate the pairs (i, i + head_dim / 2) of x [B, T, H, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layout(NamedTuple):
    """Positions and documents of a batch. When decoding, it also carries one block's cache."""

    positions: Tensor  # [T] int64, of each token in its row
    cos: Tensor  # of rotary_angles()
    sin: Tensor
    doc_start: Tensor | None = None  # [B, T] int64, see PolyGLU; None: one document a row
    mask: Tensor | BlockMask | None = None  # see document_mask(); None: causal
    keys: Tensor | None = None  # [B, n_kv_head, S, head_dim]: S places of the cache
    values: Tensor | None = None  # as keys
    router_sums: tuple[Tensor, Tensor] | None = None  # see PolyGLU


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with QK-norm: RMSNorm on every q and k head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.w_q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.w_k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.w_v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.w_o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B, T, n_embd] -> the same shape."""
        B, T, _ = x.shape
        # queries, keys, values: [B, T, heads, head_dim]
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.w_q, self.w_k, self.w_v))
        # QK-norm, then RoPE
        q = rotate(self.norm_q(q), layout.cos, layout.sin)
        k = rotate(self.norm_k(k), layout.cos, layout.sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, T, head_dim]
        if layout.keys is not None:  # with a cache: write k and v to it, and attend to all of it
            k = layout.keys.index_copy_(2, layout.positions, k.to(layout.keys.dtype))
            v = layout.values.index_copy_(2, layout.positions, v.to(layout.values.dtype))
        # each token attends to itself and to the earlier tokens of its document
        if layout.mask is None and T > 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = attend_with_mask(q, k, v, layout.mask)  # packed documents, one token, or a part-filled cache
        return self.w_o(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    """Pre-norm residual block: attention, then PolyGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffn = PolyGLU(
            config.n_embd, config.d_ff, config.activations, config.router_hidden,
            config.router_context, config.gumbel, config.router_centred,
        )  # fmt: skip

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B, T, n_embd] -> the same shape."""
        x = x + self.attn(self.norm_1(x), layout)
        return x + self.ffn(self.norm_2(x), layout.doc_start, layout.router_sums)


class PolychromaticLM(nn.Module):
    """The whole model: embedding, blocks, norm, and the output head."""

    is_compiled = False  # whether compile() was called

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # leave the random state alone: init_weights() draws all weights again, in its own order
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = RMSNorm(config.n_embd, config.norm_eps)
            if not config.tied_head:
                self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # recompute blocks in the backward pass: less memory
        self.flex: bool | None = None  # FlexAttention for packed documents; None: see uses_flex()
        self.chunk_loss = chunk_loss  # compile() replaces it
        self.isolates_documents = True  # trained with doc_ids; common/generate.py reads it
        self.init_weights()

    def init_weights(self):
        """Initialize as the paper does; routers last, so that all variants share the other weights.

        w_o, w_down      N(0, 0.02 / sqrt(2 n_layer)): 2 n_layer of them add to the residual stream
        other matrices   N(0, 0.02); their biases 0

        The constructors have initialized alpha (0), beta and the norms (1), and learned activations.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in sorted(self.named_modules(), key=lambda item: ".router_" in item[0]):
            if ".learned_sigma." not in name:
                init_linear(module, residual_std if name.endswith((".w_o", ".w_down")) else 0.02)

    @property
    def head_weight(self) -> Tensor:  # [vocab_size, n_embd]
        return self.embedding.weight if self.config.tied_head else self.head.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, tokens, targets=None, doc_ids=None, cache: "KVCache | None" = None) -> Tensor:
        """Logits of the next token [B, T, vocab_size], or with targets their mean cross-entropy [].

        tokens, targets (-1: ignored) and doc_ids are [B, T] int64; the loss is in nats, at least
        float32. Attention and a causal router stay inside a document; its tokens must be adjacent.
        With a cache, the logits are those after the last token, and targets are not read: see
        decode(). Raises ValueError for more than block_size tokens.
        """
        if cache is not None:
            return decode(self, tokens, doc_ids, cache)
        x = self.hidden(tokens, doc_ids)
        if targets is None:
            return F.linear(x, self.head_weight)
        return chunked_cross_entropy(x, self.head_weight, targets, body=self.chunk_loss)

    def hidden(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Input of the output head, [B, T, n_embd]; arguments as forward()'s."""
        layout = make_layout(self, tokens, doc_ids)
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        return self.norm(x)

    def compile(self, **options):
        """Compile in place, part by part: the blocks, which share their graphs, and the loss."""
        self.is_compiled = True
        for block in self.blocks:
            block.compile(**options)
        self.chunk_loss = torch.compile(chunk_loss, dynamic=False, **options)


# ------------------------------------------------------------- positions, packed documents, masks


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [T, 1, head_dim / 2], for rotate()."""
    pair = torch.arange(0, head_dim, 2, device=positions.device)
    angles = positions[:, None, None] / theta ** (pair / head_dim)
    return angles.cos(), angles.sin()


def document_starts(doc_ids: Tensor, previous: Tensor) -> Tensor:
    """doc_start [B, T] int64, see PolyGLU. doc_ids [B, T]; previous [B, 1]: the id before them."""
    before = torch.cat((previous, doc_ids[:, :-1]), dim=1)
    index = torch.arange(doc_ids.size(1), device=doc_ids.device)
    return torch.where(doc_ids != before, index, -1).cummax(1).values


def document_mask(doc_ids: Tensor, positions: Tensor, flex: bool = False) -> Tensor | BlockMask:
    """Attention mask: a token attends to itself and to earlier tokens of its document.

    doc_ids [B, S] of all keys, positions [T] of the queries -> [B, 1, T, S] bool; with flex=True,
    which needs T = S, a block mask of FlexAttention.
    """
    (B, S), device = doc_ids.shape, doc_ids.device

    def is_visible(b, h, q, kv):
        return (q >= kv) & (doc_ids[b, q] == doc_ids[b, kv])

    if flex:
        return create_block_mask(is_visible, B, None, S, S, device=device)
    b = torch.arange(B, device=device)[:, None, None, None]
    return is_visible(b, None, positions[:, None], torch.arange(S, device=device))


def make_layout(model: PolychromaticLM, tokens: Tensor, doc_ids=None, cache=None) -> Layout:
    """Positions, documents and mask of a batch, which may continue a cache.

    Arguments as in forward(). Raises ValueError if the tokens do not fit.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens have shape {list(tokens.shape)}; the model takes [B, T], neither of them 0")
    c, T = model.config, tokens.size(1)
    past, room = (0, c.block_size) if cache is None else (cache.length, cache.max_length)
    if past + T > min(room, c.block_size):
        raise ValueError(f"a row of {past + T} tokens, but there is room for {min(room, c.block_size)}")
    positions = torch.arange(T, device=tokens.device)
    positions = positions if cache is None else positions + cache.position
    doc_start = mask = None  # one causal document a row
    if doc_ids is not None:
        previous = cache.doc_ids[:, past - 1 : past] if past else doc_ids[:, :1]
        doc_start = document_starts(doc_ids, previous)
    elif cache is not None and model.is_compiled:  # not None: one graph, with doc_ids or without
        doc_start = torch.full_like(tokens, -1)
    if cache is not None:
        if doc_ids is not None:
            cache.remember(doc_ids)
        mask = cache.mask(model, positions)
    elif doc_ids is not None:
        mask = document_mask(doc_ids, positions, uses_flex(model))
    return Layout(positions, *rotary_angles(positions, c.head_dim, c.rope_theta), doc_start, mask)


def uses_flex(model: PolychromaticLM) -> bool:
    """Whether packed documents use FlexAttention: only if compiled, and by default in bfloat16 on CUDA.

    Uncompiled it would hold all scores; in float32 it needs more shared memory than small GPUs have. No
    kernel takes heads narrower than 16.
    """
    weight = model.embedding.weight
    suits = weight.is_cuda and compute_dtype(weight) == torch.bfloat16 and model.config.head_dim >= 16
    return model.is_compiled and (suits if model.flex is None else model.flex)


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Scaled dot-product attention: q [B, n_head, T, head_dim], k and v [B, n_kv_head, S, head_dim].

    mask: see document_mask(); None: every query attends to all keys.
    """
    if isinstance(mask, BlockMask):
        is_compiling = torch.compiler.is_compiling()  # routing_stats() calls block.attn uncompiled
        flex = flex_attention if is_compiling else torch.compile(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    # Query heads that share a key head become its rows, [B, n_kv_head, group * T, head_dim]: with a
    # mask and grouped queries, CUDA would use the kernel that holds all scores.
    group = q.size(1) // k.size(1)
    mask = None if mask is None else mask.repeat(1, 1, group, 1)
    rows = q.reshape(q.size(0), k.size(1), group * q.size(2), q.size(3))
    return F.scaled_dot_product_attention(rows, k, v, mask).reshape(q.shape)


# --------------------------------------------------------------------------------- key/value cache


class KVCache:
    """Decoding state of `length` tokens, so that each step runs only the new tokens.

    It cannot be rewound, because the router keeps only sums.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device=None, dtype=None):
        if config.sees_future:
            raise ValueError('router_context="sequence" reads later tokens too, so no cache is exact')
        self.length = 0
        self.max_length = max_length
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # length, on the device
        self.doc_ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        self.has_documents = False  # whether doc_ids were ever given
        self.layers = []  # state of each layer, as fields of Layout
        B, shape = batch_size, (batch_size, config.n_kv_head, max_length, config.head_dim)
        widths = (config.router_hidden + 1, len(config.activations) + 1)  # of u and f, with a count
        new = functools.partial(torch.zeros, device=device)
        for _ in range(config.n_layer):
            keys, values = new(shape, dtype=dtype), new(shape, dtype=dtype)
            sums = tuple(new(B, 1, width, dtype=sum_dtype(self.doc_ids)) for width in widths)
            self.layers.append({"keys": keys, "values": values, "router_sums": sums})

    def remember(self, doc_ids: Tensor):
        """Keep the doc_ids [B, T] of new tokens. Later tokens continue the last document."""
        self.doc_ids[:, self.length :] = doc_ids[:, -1:]
        self.doc_ids[:, self.length : self.length + doc_ids.size(1)] = doc_ids
        self.has_documents = True

    def mask(self, model: PolychromaticLM, positions: Tensor) -> Tensor | None:
        """Attention mask of new tokens; None: causal."""
        T, end = len(positions), self.length + len(positions)
        if T == 1 and (model.is_compiled or positions.is_cuda):
            end = self.max_length  # static shapes: one graph serves every token
        elif not self.has_documents and (T == 1 or self.length == 0):
            return None
        return document_mask(self.doc_ids[:, :end], positions)


def decode(model: PolychromaticLM, tokens: Tensor, doc_ids: Tensor | None, cache: KVCache) -> Tensor:
    """Logits [B, 1, vocab_size] after the last token; tokens [B, T] continue the cached rows.

    Without doc_ids they continue each row's last document. Raises ValueError if the cache is full.
    """
    layout = make_layout(model, tokens, doc_ids, cache)
    cache.length += tokens.size(1)
    cache.position += tokens.size(1)
    end = cache.length if layout.mask is None else layout.mask.size(-1)
    x = model.embedding(tokens)
    for block, layer in zip(model.blocks, cache.layers):
        keys, values = (layer[name][:, :, :end] for name in ("keys", "values"))
        layer_layout = layout._replace(keys=keys, values=values, router_sums=layer["router_sums"])
        # A prompt runs uncompiled, by block.forward: every new length would recompile.
        run = block if tokens.size(1) == 1 else block.forward
        x = run(x, layer_layout)
    return F.linear(model.norm(x[:, -1:]), model.head_weight)


# ------------------------------------------------------------- loss, in chunks of [C, V] logits


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None = None,
    body: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy of the logits hidden @ weight.T, in nats, without ever holding them all.

    hidden [..., d], weight [V, d], targets [...] int64 (-1: ignored) -> [], at least float32.
    chunk_size is in tokens (None: about 2**25 logits, 2**28 on a GPU). body: chunk_loss, compiled.
    If all targets are ignored, the loss is 0. Raises ValueError for an empty batch.
    """
    if not targets.numel():
        raise ValueError("there are no targets: the batch is empty")
    logits_in_chunk = 2**28 if hidden.is_cuda else 2**25
    chunk_size = chunk_size or max(128, logits_in_chunk // weight.size(0) // 128 * 128)
    return ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), chunk_size, body or chunk_loss, torch.is_grad_enabled()
    )


def chunk_loss(h: Tensor, w: Tensor, target: Tensor, scale: Tensor, V: int, needs_grad: bool = True):
    """Sum of scale * cross-entropy of the logits h @ w.T, and its gradient with respect to them.

    h [C, d]; w [>= V, d], rows from V on are padding; target [C] int64; scale [C]: 1 / number of
    targets, 0 if ignored. The gradient has h's dtype. Compiled, it is about one pass over the logits.
    """
    logits = at_least_fp32(h @ w.t())
    logits[:, V:] = -torch.inf
    log_p = logits.log_softmax(-1)
    loss = -(log_p.gather(1, target[:, None])[:, 0] * scale).sum()
    if not needs_grad:
        return loss, None
    is_target = torch.arange(len(w), device=h.device) == target[:, None]
    d_logits = log_p.exp_().add_(is_target, alpha=-1).mul_(scale[:, None])  # (p - one-hot) * scale
    return loss, d_logits.to(h.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The forward pass computes each chunk's gradient too, while its logits are in memory."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, body, needs_grad):
        N, V = len(hidden), len(weight)
        dtype = compute_dtype(hidden)
        n_chunks = math.ceil(N / chunk_size)
        padding = -N % n_chunks  # rows with ignored targets: equal chunks share one graph
        hidden_padded = F.pad(hidden.to(dtype), (0, 0, 0, padding))
        targets = F.pad(targets, (0, padding), value=-1)
        w = F.pad(weight.to(dtype), (0, 0, 0, -V % 128))  # tensor cores are slow on 151,669 rows
        is_counted = (targets >= 0).to(at_least_fp32(hidden).dtype)
        scale = is_counted / is_counted.sum().clamp_min(1)
        loss = scale.new_zeros(())
        d_hidden = []
        d_weight = torch.zeros_like(w, dtype=scale.dtype) if needs_grad else None
        chunks = (x.chunk(n_chunks) for x in (hidden_padded, targets.clamp_min(0), scale))
        for h, target, s in zip(*chunks):
            chunk_sum, d_logits = body(h, w, target, s, V, needs_grad)
            loss = loss + chunk_sum
            if needs_grad:
                d_hidden.append(d_logits @ w)
                if dtype == d_weight.dtype:
                    d_weight.addmm_(d_logits.t(), h)  # in place: no temporary [V, d]
                else:
                    d_weight += d_logits.t() @ h
        if needs_grad:
            ctx.save_for_backward(torch.cat(d_hidden)[:N], d_weight[:V])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight * d_loss, None, None, None, None


# ------------------------------------------------------------------------------- checks and dtypes


def check_routing(activations: Sequence[str], router_context: str, router_centred: bool):
    """Raise ValueError for routing that cannot be built."""
    if unknown := [name for name in activations if name not in ACTIVATIONS]:
        raise ValueError(f"unknown activation {unknown[0]!r}; there are {', '.join(ACTIVATIONS)}")
    if not activations or len(set(activations)) < len(activations):
        raise ValueError(f"activations are {activations}; name at least one, each once")
    if router_context not in ROUTER_CONTEXTS:
        raise ValueError(f"unknown router_context {router_context!r}; there are {', '.join(ROUTER_CONTEXTS)}")
    if router_centred and router_context == "sequence":
        raise ValueError("router_centred would cancel a sequence router, whose output is the same for the whole row")


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of long sums: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64."""
    return x if x.dtype.itemsize >= 4 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product on x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
