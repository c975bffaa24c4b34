"""PolychromaticLM: a decoder-only transformer whose feed-forward neurons choose their activation (arXiv 2603.13347).

In reading order: activations, configuration, norm, rotary positions, KV cache, attention, PolyGLU, block, loss, model;
then what reads other layouts of weights, which a first reading can leave out.
What is unusual here, next to a plain GPT:
- PolyGLU in place of the MLP: every neuron mixes K activations by a learned preference and an input-conditioned router
- one activation (K = 1) is the plain GLU, so SwiGLU, GEGLU, ... are settings of the same class
- grouped-query attention, RMSNorm on every query and key head (QK-norm), rotary positions, tied embedding, no biases
- documents packed into one row see nothing of each other; padding is one more document
- the loss is computed in pieces of the vocabulary projection and never holds all the logits
"""

import dataclasses
import functools
import json
import math
import re
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

Activation = Callable[[Tensor], Tensor]  # of each number by itself

# The registry of activations: a new one is one line here, and a name in ModelConfig.activations.
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one, by erf
}
ROUTER_CONTEXTS = ("prefix", "token", "sequence")
ROUTING = re.compile(r"\.(alpha|beta|router_in|router_out)\b")  # names of the parameters that routing adds


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are PolychromaticLM: 597,153,888 parameters, 1,380,960 of them routing.

    Raises ValueError, naming the value, for a shape that cannot be built.
    """

    block_size: int = 4096  # context, in tokens
    vocab_size: int = 151_669  # rows of the embedding
    n_layer: int = 28  # transformer blocks
    n_head: int = 16  # query heads
    n_kv_head: int = 8  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 1024  # width of the residual stream
    head_dim: int = 64  # width of one attention head
    d_ff: int = 4096  # feed-forward neurons in a layer
    activations: tuple[str, ...] = ("relu", "tanh", "silu", "gelu")  # what a neuron chooses from; one: a plain GLU
    router_hidden: int = 32  # width of the router's hidden layer; 0: static preferences alone
    router_context: str = "prefix"  # what the router reads: prefix, token, or sequence (as the paper; not causal)
    gumbel: bool = True  # Gumbel noise on the routing logits in training
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-6  # epsilon of every RMSNorm
    tied_head: bool = True  # whether the embedding is the output head too
    tokenizer: str = "qwen3"  # the tokenizer that the token ids belong to

    def __post_init__(self):
        self.activations = tuple(self.activations.split(",") if isinstance(self.activations, str) else self.activations)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in self.activations:
            if name not in ACTIVATIONS:
                raise ValueError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
        if not self.activations or len(set(self.activations)) < len(self.activations):
            raise ValueError(f"activations is {self.activations}; name at least one, each once")
        if self.router_context not in ROUTER_CONTEXTS:
            raise ValueError(f"unknown router_context {self.router_context!r}; there are {', '.join(ROUTER_CONTEXTS)}")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta}, norm_eps {self.norm_eps}; they must be above 0")
        if self.router_hidden < 0:
            raise ValueError(f"router_hidden is {self.router_hidden}; it must be 0 (static preferences alone) or more")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head is {self.n_head}; it must be a multiple of n_kv_head, which is {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    @property
    def sees_future(self) -> bool:
        """Whether the routing of a token depends on later ones. Then no KV cache is exact."""
        return self.router_context == "sequence" and self.router_hidden > 0 and len(self.activations) > 1


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matmul on x runs here: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv 1910.07467): [..., dim] -> the same, its dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_angles(length: int, head_dim: int, theta: float) -> Tensor:
    """Rotary angles, in radians: [length, head_dim / 2] float32 (arXiv 2104.09864, eq. 15)."""
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return torch.arange(length, dtype=torch.float32)[:, None] / wavelengths


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [B, H, T, head_dim] by angles [T, head_dim / 2], as Llama does."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class LayerCache(NamedTuple):
    """What one layer remembers of the tokens it has read; all preallocated, updated in place."""

    k: Tensor  # [B, n_kv_head, max_length, head_dim]
    v: Tensor  # the same
    router: Tensor  # [B, 1, router_hidden + 1]: sum of the router's projections over the document, and their count


class KVCache:
    """The memory that makes a decoded token cost one token. Give it to forward(); it is filled up to `length`.

    batch_size rows, room for max_length tokens each; dtype is that of keys and values. compiled: a token that comes
    alone goes through compiled blocks, which read all max_length places behind a mask: one graph, however many are
    full.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device=None, dtype=torch.float32, compiled=False
    ):
        if config.sees_future:
            raise ValueError('router_context="sequence" reads later tokens too, so no cache is exact; run without one')
        self.length, self.max_length, self.compiled = 0, max_length, compiled
        self.doc_ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        kv = (batch_size, config.n_kv_head, max_length, config.head_dim)
        self.layers = [
            LayerCache(
                torch.zeros(kv, device=device, dtype=dtype),
                torch.zeros(kv, device=device, dtype=dtype),
                torch.zeros(batch_size, 1, config.router_hidden + 1, device=device, dtype=sum_dtype(self.doc_ids)),
            )
            for _ in range(config.n_layer)
        ]


class BatchContext(NamedTuple):
    """What every layer needs to know of a batch; made once by PolychromaticLM.context()."""

    cos: Tensor  # [T, head_dim / 2] of this batch's positions
    sin: Tensor
    mask: Tensor | BlockMask | None  # who sees whom: [B, 1, T, S] bool, or a block mask; None: plain causal
    start: Tensor  # [B, T] int64: where each token's document starts, as prefix_mean counts
    tau: Tensor  # [] temperature of the routing
    positions: Tensor  # [T] int64: where the batch goes in the cache
    seen: int  # places of the cache that the batch looks at


def document_mask(q_docs: Tensor, kv_docs: Tensor, past: int = 0) -> Tensor:
    """Who sees whom, [B, 1, T, S] bool: a token sees itself and what precedes it in its document.

    q_docs [B, T]: documents of the queries, at positions past.., kv_docs [B, S]: those of the keys, at positions 0..
    """
    q = torch.arange(past, past + q_docs.size(1), device=q_docs.device)
    kv = torch.arange(kv_docs.size(1), device=q_docs.device)
    return ((q[:, None] >= kv) & (q_docs[:, :, None] == kv_docs[:, None, :]))[:, None]


def document_block_mask(doc_ids: Tensor) -> BlockMask:
    """The same for FlexAttention, of a whole row: doc_ids [B, T] -> a block mask."""
    B, T = doc_ids.shape

    def visible(b, h, q, kv):
        return (q >= kv) & (doc_ids[b, q] == doc_ids[b, kv])

    return create_block_mask(visible, B, None, T, T, device=doc_ids.device)


@functools.cache
def compiled_flex_attention() -> Callable:
    """FlexAttention that holds no [T, T] scores even where the model around it runs eagerly."""
    return torch.compile(flex_attention)  # not at import: loading the compiler takes seconds


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

    def forward(self, x: Tensor, ctx: BatchContext, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, n_embd] -> [B, T, n_embd]. With a cache, also attends to (and appends to) what it holds."""
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q, k, v = (w(x).view(heads).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))  # [B, H, T, head_dim]
        q = rotate(self.norm_q(q), ctx.cos, ctx.sin)
        k = rotate(self.norm_k(k), ctx.cos, ctx.sin)
        if cache is not None:
            cache.k[:, :, ctx.positions], cache.v[:, :, ctx.positions] = k.to(cache.k.dtype), v.to(cache.v.dtype)
            k, v = cache.k[:, :, : ctx.seen], cache.v[:, :, : ctx.seen]
        if isinstance(ctx.mask, BlockMask):
            attention = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
            y = attention(q, k, v, block_mask=ctx.mask, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, ctx.mask, is_causal=ctx.mask is None, enable_gqa=True)
        return self.w_o(y.transpose(1, 2).reshape(B, T, -1))


def sum_dtype(x: Tensor) -> torch.dtype:
    """float64: else a document of two tokens after one of 4,000 would inherit the rounding of a big sum."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have none


def prefix_mean(x: Tensor, start: Tensor, state: Tensor | None = None) -> Tensor:
    """The mean of x over a token's document, up to and including that token.

    x [B, T, R] -> [B, T, R], at least float32. start [B, T]: t0 + 1 where the token's document begins at position t0 of
    these T, 0 where it began before them. state [B, 1, R + 1] (LayerCache.router): sum and count of the document under
    way, carried from one call to the next; it is updated in place.
    """
    terms = F.pad(x.to(sum_dtype(x)), (0, 1), value=1.0)  # the last column counts tokens
    before = terms.new_zeros(x.size(0), 1, terms.size(2)) if state is None else state
    total = torch.cat((torch.zeros_like(before), before, terms), dim=1).cumsum(1)
    total = total[:, 2:] - total.gather(1, start[:, :, None].expand_as(terms))
    if state is not None:
        state.copy_(total[:, -1:])
    return (total[..., :-1] / total[..., -1:]).to(at_least_fp32(x).dtype)


def gumbel_noise(*shape: int, like: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log(U)), of the device and dtype of `like`."""
    uniform = torch.rand(shape, device=like.device, dtype=like.dtype)
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(like.dtype).tiny)))


def softmax_over_sum(static: Tensor, dynamic: Tensor, doublings: int) -> tuple[list[Tensor], Tensor]:
    """Softmax over the first dimension of static [K, B, 1, F] + dynamic [K, B, T, 1], as K tensors [B, T, F] and a sum.

    The weights are the tensors divided by their sum: what is to be weighted is divided once, after it is summed.

    exp(s + d) is a factor per neuron times a factor per token, so none of the B * T * F * K exponentials is needed. The
    largest of each must be 0: then all factors are at most 1, and the sum is at least e^-40 unless a neuron and a token
    both put more than 40 nats between two activations. For those, the factors are n-th roots, and the n-th power is
    taken once they sum to 1: with n = 2**doublings = 16 that is exact up to 1280 nats.
    """
    static, dynamic = ((x / 2**doublings).clamp_min(-80).exp() for x in (static, dynamic))
    powers = [s * d for s, d in zip(static, dynamic)]
    if not doublings and not torch.compiler.is_compiling():  # the sum is a product of matrices, one pass over memory
        by_row = dynamic.squeeze(-1).permute(1, 2, 0), static.squeeze(-2).transpose(0, 1)  # [B, T, K], [B, K, F]
        with torch.autocast("cpu", enabled=False):  # which would take this product in bfloat16
            return powers, torch.bmm(*(x.contiguous() for x in by_row))
    if doublings:
        scale = functools.reduce(torch.add, powers).reciprocal()
        powers = [x.mul_(scale) for x in powers]
        for _ in range(doublings):
            powers = [x.square_() for x in powers]
    total = functools.reduce(torch.add, powers)
    if torch.compiler.is_compiling():  # divided already: else the compiler would keep the sum for the backward pass
        scale = total.reciprocal()
        return [x.mul_(scale) for x in powers], scale.new_ones(())
    return powers, total


def softmax(static: Tensor, dynamic: Tensor) -> list[Tensor]:
    """The weights themselves: softmax over the K of static [K, B, 1, F] + dynamic [K, B, T, 1], K tensors [B, T, F]."""
    powers, total = softmax_over_sum(static - static.amax(0), dynamic - dynamic.amax(0), doublings=4)
    return [x.div_(total) for x in powers]


def weighted_sum(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """The sum of weights[k] * terms[k]."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:]):
        total.addcmul_(weight, term)
    return total


def values_and_slope(functions: Sequence[Activation], x: Tensor, weights: Sequence[Tensor]) -> tuple[list, Tensor]:
    """Pointwise functions of x, and the sum of their derivatives times the weights, all of the shape of x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = [function(x) for function in functions]
    (slope,) = torch.autograd.grad(values, x, weights)
    return [value.detach() for value in values], slope


def values_and_slopes(functions: Sequence[Activation], x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Pointwise functions of x and their derivatives, all of the shape of x, for compiled code.

    In float32, tanh, silu and gelu are written out together: two exponentials and two divisions serve all three and
    their derivatives. One by one they take five and four, which is what PolyGLU costs a CPU most. (The exponentials are
    powers of 2: a result of exp that is used twice, the compiler would write to memory.)
    """
    known = {}
    if x.dtype == torch.float32:
        e = torch.exp2(x.clamp_min(-28) * -math.log2(math.e))  # exp(-x); beyond, silu is 0 and e**4 too large
        a, b = 1 + e, 1 + e * e
        r = 1 / (a * b)
        sigmoid, tanh = b * r, 2 * a * r - 1  # 1 / a, and 2 / b - 1
        silu = x * sigmoid
        density = torch.exp2(x * x * (-0.5 * math.log2(math.e))) * (2 * math.pi) ** -0.5  # of the normal distribution
        t = 1 / (1 + 0.2316419 * x.abs())  # its tail beyond |x|, within 7.5e-8 (Abramowitz and Stegun, 26.2.17)
        series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
        tail = density * series
        known = {
            F.relu: (F.relu(x), (x > 0).to(x.dtype)),
            torch.tanh: (tanh, 1 - tanh * tanh),
            F.silu: (silu, sigmoid + silu * (1 - sigmoid)),
            F.gelu: (F.relu(x) - x.abs() * tail, torch.where(x < 0, tail, 1 - tail) + x * density),
        }
    pairs = [known[f] if f in known else torch.func.jvp(f, (x,), (torch.ones_like(x),)) for f in functions]
    values, slopes = zip(*pairs)
    return values, slopes


class MixedGLU(torch.autograd.Function):
    """up * sum_k g_k * sigma_k(gate), with g = softmax(static + dynamic).

    gate, up [B, T, F], static [K, B, 1, F], dynamic [K, B, T, 1], names of the K activations -> [B, T, F], dtype of up.

    Left to itself, autograd would keep K tensors [B, T, F] and more for the backward pass. Here that computes them
    again. Eager: for some tokens at a time, so that they stay in a CPU's cache; what is kept is the sum over k, as a
    plain GLU keeps its activated gate. Compiled: in registers, and nothing is kept but the inputs. What the compiler
    was seen to make of it (torch 2.13, C++): forward, one loop over [B, T, F]; backward, one that writes d_gate and
    d_up and sums over F, and one that sums over T; neither writes a tensor of K * B * T * F numbers.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, static: Tensor, dynamic: Tensor, names: tuple[str, ...]) -> Tensor:
        static, dynamic = (x - x.amax(0) for x in (static, dynamic))  # which changes no softmax
        near = torch.maximum(static.amin(), dynamic.amin()) >= -40  # whether softmax_over_sum needs no roots
        ctx.functions = tuple(ACTIVATIONS[name] for name in names)
        mix = mix_compiled if torch.compiler.is_compiling() else mix_in_parts
        y, *kept = MixedGLU.run(mix, ctx.functions, near, gate, up, static, dynamic)
        ctx.save_for_backward(near, gate, up, static, dynamic, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        near, *kept = ctx.saved_tensors
        d_mix = d_mix_compiled if torch.compiler.is_compiling() else d_mix_in_parts
        d_gate, d_up, *d_logits = MixedGLU.run(d_mix, ctx.functions, near, d_y, *kept)
        # The gradients of the logits sum to 0 over k, which gives the last one.
        d_static, d_dynamic = (torch.cat((d, -d.sum(0, keepdim=True))) for d in d_logits)
        return d_gate, d_up, d_static, d_dynamic, None

    @staticmethod
    def run(work: Callable, functions: Sequence[Activation], near: Tensor, *tensors: Tensor):
        """work(functions, doublings, *tensors), with the doublings of softmax_over_sum only if they are needed.

        On a GPU always: memory is what it waits for there, and to look at `near` would be to wait for it.
        """
        if near.device.type != "cpu":
            return work(functions, 4, *tensors)
        if not torch.compiler.is_compiling():
            return work(functions, 0 if near else 4, *tensors)

        def branch(doublings: int, *tensors: Tensor):
            *wide, static, dynamic = tensors
            K, (B, T, F) = len(functions), wide[0].shape
            return work(functions, doublings, *wide, static.view(K, B, 1, F), dynamic.view(K, B, T, 1))

        # The logits flat, as the compiler may give them other strides than it has told the branches.
        *wide, static, dynamic = tensors
        branches = (functools.partial(branch, doublings) for doublings in (0, 4))
        return torch.cond(near, *branches, [*wide, static.flatten(), dynamic.flatten()])


def mix_compiled(functions, doublings: int, gate: Tensor, up: Tensor, static: Tensor, dynamic: Tensor):
    """MixedGLU's forward pass, as a tuple."""
    g, _ = softmax_over_sum(static, dynamic, doublings)
    values, _ = values_and_slopes(functions, at_least_fp32(gate))
    return ((weighted_sum(g, values) * up).to(up.dtype),)


def d_mix_compiled(functions, doublings: int, d_y: Tensor, gate: Tensor, up: Tensor, static: Tensor, dynamic: Tensor):
    """Gradients of gate, up, and of all but the last of the K static and dynamic logits."""
    x, dy, u = (at_least_fp32(t) for t in (gate, d_y, up))
    g, _ = softmax_over_sum(static, dynamic, doublings)
    values, slopes = values_and_slopes(functions, x)
    du = weighted_sum(g, [value * dy for value in values])
    d_gate = weighted_sum(g, slopes) * (dy * u)
    # d_logit_k = g_k * (sigma_k - sum_j g_j * sigma_j) * dy * u, written so that the two loops share du alone.
    d_dynamic = [(weight * (value * dy - du) * u).sum(-1, keepdim=True) for weight, value in zip(g[:-1], values)]
    # To sum over T too, the compiler would write the summands to memory. From transposed inputs it computes them again,
    # in the order of that sum; of 8 tokens first, as each token is another page of memory.
    rows = 8 if x.size(1) % 8 == 0 else x.size(1)
    x, dy, u, d = (t.unflatten(1, (-1, rows)).mT for t in (x, dy, u, du))
    g, _ = softmax_over_sum(static[:, :, None].mT, dynamic.unflatten(2, (-1, rows)).mT, doublings)
    values, _ = values_and_slopes(functions[:-1], x)
    d_static = [(weight * (value * dy - d) * u).sum(-1).sum(1)[:, None] for weight, value in zip(g[:-1], values)]
    return d_gate.to(gate.dtype), du.to(up.dtype), torch.stack(d_static), torch.stack(d_dynamic)


def parts(gate: Tensor) -> list[slice]:
    """Parts of the tokens of gate [B, T, F] to work on, one after another: of 2**19 numbers, on a GPU 2**26."""
    B, T, F = gate.shape
    n = max(1, 2 ** (26 if gate.is_cuda else 19) // (B * F))
    return [slice(i, i + n) for i in range(0, T, n)]


def mix_in_parts(functions, doublings: int, gate: Tensor, up: Tensor, static: Tensor, dynamic: Tensor):
    """MixedGLU's forward pass, eager: y, and sum_k g_k * sigma_k(gate), both of the shape and dtype of up."""
    y, mixed = torch.empty_like(up), torch.empty_like(up)
    for part in parts(gate):
        x = at_least_fp32(gate[:, part])
        powers, total = softmax_over_sum(static, dynamic[:, :, part], doublings)
        torch.div(weighted_sum(powers, [function(x) for function in functions]), total, out=mixed[:, part])
        torch.mul(mixed[:, part], up[:, part], out=y[:, part])
    return y, mixed


def d_mix_in_parts(functions, doublings, d_y: Tensor, gate: Tensor, up: Tensor, static: Tensor, dynamic: Tensor, mixed):
    """d_mix_compiled(), eager."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    d_static, d_dynamic = torch.zeros_like(static[:-1]), torch.empty_like(dynamic[:-1])
    for part in parts(gate):
        x, dy, u = (at_least_fp32(t[:, part]) for t in (gate, d_y, up))
        powers, total = softmax_over_sum(static, dynamic[:, :, part], doublings)
        values, slope = values_and_slope(functions, x, powers)
        # Not as bfloat16 has rounded it: a logit that decides nothing would get the rounding as its gradient.
        mix = mixed[:, part] if mixed.dtype == x.dtype else weighted_sum(powers, values).div_(total)
        torch.mul(dy, mix, out=d_up[:, part])
        d_mix = (dy * u).div_(total)  # divided by what the powers lack
        torch.mul(slope, d_mix, out=d_gate[:, part])
        d_logit = slope  # the memory of one that is no longer needed
        for k, (weight, value) in enumerate(zip(powers[:-1], values)):
            torch.sub(value, mix, out=d_logit).mul_(weight.mul_(d_mix))
            d_static[k] += d_logit.sum(1, keepdim=True)
            torch.sum(d_logit, -1, keepdim=True, out=d_dynamic[k, :, part])
    return d_gate, d_up, d_static, d_dynamic


class PolyGLU(nn.Module):
    """A gated linear unit whose neurons mix K activations (paper, section 3).

        PolyGLU(x) = W_down( [ sum_k g_k * sigma_k(x W_gate) ] * (x W_up) )
        g          = softmax( (alpha + beta * f(h) + Gumbel noise) / tau )          over the K activations

    alpha [d_ff, K] is what each neuron prefers whatever the input. f(h) = W2 relu(W1 h + b1) + b2 is what the context
    asks of the whole layer, scaled by beta [K]. h is the mean of x over the tokens so far ("prefix"), x itself
    ("token"), or the mean over the whole row ("sequence", as in the paper's code: every token sees its future). The
    mean commutes with W1, so it is taken of the router_hidden outputs of W1. The noise is drawn in training alone, once
    per (row, neuron, activation). With K = 1 there is no g, and the layer is a plain GLU.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        K = len(config.activations)
        self.activations = config.activations
        self.context, self.gumbel = config.router_context, config.gumbel
        self.w_gate = nn.Linear(config.n_embd, config.d_ff, bias=False)
        self.w_up = nn.Linear(config.n_embd, config.d_ff, bias=False)
        self.w_down = nn.Linear(config.d_ff, config.n_embd, bias=False)
        self.routed, self.dynamic = K > 1, K > 1 and config.router_hidden > 0
        if self.routed:
            self.alpha = nn.Parameter(torch.zeros(config.d_ff, K))
        if self.dynamic:
            self.beta = nn.Parameter(torch.ones(K))
            self.router_in = nn.Linear(config.n_embd, config.router_hidden)
            self.router_out = nn.Linear(config.router_hidden, K)

    def forward(self, x: Tensor, tau: Tensor, start: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """x [B, T, n_embd] -> [B, T, n_embd]. tau [] is the temperature; start and state are prefix_mean's."""
        gate, up = self.w_gate(x), self.w_up(x)  # [B, T, d_ff]
        if self.routed:
            y = MixedGLU.apply(gate, up, *self.logits(x, tau, start, state), self.activations)
        else:
            y = ACTIVATIONS[self.activations[0]](gate) * up
        return self.w_down(y)

    def logits(self, x: Tensor, tau: Tensor, start: Tensor | None = None, state: Tensor | None = None):
        """What the softmax of the routing is taken of, in two terms: [K, B, 1, d_ff] of the neurons, [K, B, T, 1]."""
        static = self.alpha.t().contiguous().expand(x.size(0), -1, -1)  # [B, K, d_ff]
        if self.training and self.gumbel:
            static = static + gumbel_noise(*static.shape, like=static)
        dynamic = self.router(x, start, state)  # [B, T, K]
        return (static / tau).transpose(0, 1)[:, :, None], (dynamic / tau).permute(2, 0, 1)[..., None]

    def routing(self, x: Tensor, tau: Tensor, start: Tensor | None = None, state: Tensor | None = None) -> list[Tensor]:
        """The weights g of each activation in each neuron: K tensors [B, T, d_ff] float32, summing to 1."""
        return softmax(*self.logits(x, tau, start, state))

    def router(self, x: Tensor, start: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """beta * f(h), what the context asks of the layer (nothing without a router): x [B, T, n_embd] -> [B, T, K]."""
        if not self.dynamic:
            return self.alpha.new_zeros(*x.shape[:2], len(self.activations))
        h = self.router_in(x)
        with torch.autocast(x.device.type, enabled=False):
            h = at_least_fp32(h)
            if self.context == "prefix":
                start = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if start is None else start
                h = prefix_mean(h, start, state)
            elif self.context == "sequence":
                h = h.mean(dim=1, keepdim=True).expand_as(h)
            return self.beta * self.router_out(F.relu(h))


class Block(nn.Module):
    """Pre-norm residual block: attention, then PolyGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffn = PolyGLU(config)

    def forward(self, x: Tensor, ctx: BatchContext, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, n_embd] -> [B, T, n_embd]."""
        x = x + self.attn(self.norm_1(x), ctx, cache)
        return x + self.ffn(self.norm_2(x), ctx.tau, ctx.start, cache.router if cache else None)


@functools.cache
def compiled_block() -> Callable:
    """Block.forward(), compiled."""
    return torch.compile(Block.forward)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of the logits hidden @ weight.T, which never exist all at once.

    hidden [N, d], weight [V, d], targets [N] int64 (-1: ignored) -> [], at least float32. `rows` of the logits are held
    at a time (None: as many as make 2**25 numbers, on a GPU 2**28).
    """
    if rows is None:
        rows = max(128, (2**28 if hidden.is_cuda else 2**25) // weight.size(0) // 128 * 128)
    return ChunkedCrossEntropy.apply(hidden, weight, targets, rows, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """chunked_cross_entropy(): a chunk's logits are turned into their own gradient, so that no matmul is done twice."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, needs_grad: bool) -> Tensor:
        dtype, V = compute_dtype(hidden), weight.size(0)
        w = F.pad(weight, (0, 0, 0, -V % 128)).to(dtype)  # tensor cores are slow on a ragged 151,669
        mask = (targets >= 0).to(at_least_fp32(hidden).dtype)
        share = mask / mask.sum().clamp_min(1)  # of each row in the mean
        loss, d_hidden = mask.new_zeros(()), []
        d_weight = torch.zeros_like(w, dtype=mask.dtype) if needs_grad else None
        for h, target, s in zip(hidden.to(dtype).split(rows), targets.clamp_min(0).split(rows), share.split(rows)):
            target = target[:, None]
            logits = at_least_fp32(h @ w.t())
            logits[:, V:] = -torch.inf
            lse = logits.logsumexp(-1, keepdim=True)
            loss = loss + ((lse - logits.gather(1, target))[:, 0] * s).sum()
            if needs_grad:
                grad = logits.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse))
                grad = grad.mul_(s[:, None]).to(dtype)
                d_hidden.append(grad @ w)
                if dtype == d_weight.dtype:
                    d_weight.addmm_(grad.t(), h)  # without another [V, d] beside it
                else:
                    d_weight += grad.t() @ h
        if needs_grad:
            ctx.save_for_backward(torch.cat(d_hidden), d_weight[:V])
            ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * d_loss).to(ctx.dtypes[0]), (d_weight * d_loss).to(ctx.dtypes[1]), None, None, None


class PolychromaticLM(nn.Module):
    """The whole model: embedding, blocks, norm, and the output head, which is the embedding again if it is tied."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        rng = torch.get_rng_state()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # The routing temperature is a tensor: a Python float that changes every step would recompile every step.
        self.register_buffer("tau", torch.tensor(1.0))
        angles = rope_angles(config.block_size, config.head_dim, config.rope_theta)
        self.register_buffer("angles", angles, persistent=False)
        self.recompute = False  # whether the backward pass computes a block's activations again instead of keeping them
        self.flex: bool | None = None  # whether documents are kept apart by FlexAttention; None: on CUDA
        self.compile_decode = False  # whether generate() compiles what makes a token
        torch.set_rng_state(rng)  # whatever the constructors drew: their number depends on the routing
        self.init_weights()

    def init_weights(self):
        """Random matrices and biases of zero; of the routing last, so that models that differ in it share the rest."""
        matrices = {name: m for name, m in self.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        for name in sorted(matrices, key=lambda name: ".router_" in name):
            weight, bias = matrices[name].weight, getattr(matrices[name], "bias", None)
            into_residual = name.endswith((".w_o", ".w_down"))  # these start smaller, as there are 2 n_layer of them
            nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * self.config.n_layer) if into_residual else 1))
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the next token, or their loss.

        tokens [B, T] int64. With targets [B, T] (-1: ignored): the mean cross-entropy in nats per token, [] float32.
        Else logits [B, T, vocab_size]; with a cache, those of the last position only, [B, 1, vocab_size].
        doc_ids [B, T] int64, in contiguous runs: attention and the prefix mean stay inside each document. With a cache,
        the tokens continue what it holds, in the same documents if doc_ids are not given. Raises ValueError for a row
        longer than block_size or the cache's room.
        """
        x = self.hidden(tokens, doc_ids, cache)
        if targets is None:
            return F.linear(x, self.head_weight)
        return chunked_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten())

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head, [vocab_size, n_embd]."""
        return self.embedding.weight if self.config.tied_head else self.head.weight

    def hidden(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """What the output head reads, [B, T, n_embd]; with a cache, of the last position. Arguments as forward()'s."""
        ctx = self.context(tokens, doc_ids, cache)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, ctx, use_reentrant=False)
            elif cache and cache.compiled and tokens.size(1) == 1:
                x = compiled_block()(block, x, ctx, cache.layers[i])
            else:
                x = block(x, ctx, cache.layers[i] if cache else None)
        if cache is not None:
            cache.length += tokens.size(1)
            x = x[:, -1:]
        return self.norm(x)

    def context(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None) -> BatchContext:
        """What all layers share of a batch: positions, mask, document starts. Arguments as forward()'s."""
        B, T = tokens.shape
        past = cache.length if cache else 0
        end, room = past + T, cache.max_length if cache else self.config.block_size
        seen = room if cache and cache.compiled and T == 1 else end
        if end > min(room, self.config.block_size):
            raise ValueError(f"{end} tokens in a row, but there is room for {room}")
        mask, start = None, torch.zeros(B, T, dtype=torch.int64, device=tokens.device)
        if doc_ids is None and past:
            doc_ids = cache.doc_ids[:, past - 1 : past].expand(B, T)
        if doc_ids is not None:
            previous = cache.doc_ids[:, past - 1 : past] if past else doc_ids[:, :1]
            is_new = doc_ids != torch.cat((previous, doc_ids[:, :-1]), dim=1)
            start = torch.where(is_new, torch.arange(1, T + 1, device=tokens.device), 0).cummax(1).values
        if cache is not None:
            cache.doc_ids[:, past:end] = 0 if doc_ids is None else doc_ids
            if past or doc_ids is not None:
                mask = document_mask(cache.doc_ids[:, past:end], cache.doc_ids[:, :seen], past)
        elif doc_ids is not None:
            flex = tokens.is_cuda if self.flex is None else self.flex
            mask = document_block_mask(doc_ids) if flex else document_mask(doc_ids, doc_ids)
        angles, positions = self.angles[past:end], torch.arange(past, end, device=tokens.device)
        return BatchContext(angles.cos(), angles.sin(), mask, start, self.tau, positions, seen)

    # ------------------------------------------------------------------------------------------------- using the model

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Collection[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts, a token of every row at a time: yields [B] int64, -1 in rows that have ended.

        tokens: prompts of any lengths, [B, T] or lists of ids. temperature 0 takes the likeliest token; top_k keeps the
        k likeliest, top_p the fewest whose probabilities reach p. A row ends after a token in `stop`. A row that
        outgrows block_size goes on from its last block_size / 2 tokens, a longer prompt likewise. Noise is drawn by the
        sampling alone. `torch.stack(list(model.generate(...)), 1)` collects [B, steps].
        Raises ValueError for an empty prompt, and for a "sequence" router with prompts of different lengths.
        """
        rows, block_size, device = [list(map(int, row)) for row in tokens], self.config.block_size, self.tau.device
        if not rows or not all(rows):
            raise ValueError("an empty prompt; start from <|endoftext|> to write freely")
        if not all(0 <= token < self.config.vocab_size for row in rows for token in row):
            raise ValueError(f"a token that is not in 0..{self.config.vocab_size - 1}")
        if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need >= 0, >= 1 and in (0, 1]")
        ragged = any(len(row) != len(rows[0]) for row in rows)
        if ragged and self.config.sees_future:
            raise ValueError('router_context="sequence" would read the padding too; give prompts of one length')
        stops = torch.tensor(sorted(stop), device=device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        cache, training = None, self.training
        self.eval()
        try:
            for step in range(max_new_tokens):
                if cache is None or cache.length == block_size:
                    rows = [row if len(row) <= block_size else row[-max(1, block_size // 2) :] for row in rows]
                    longest = max(map(len, rows))
                    # Shorter rows are padded on the left, and the padding is a document of its own.
                    padding = [longest - len(row) for row in rows]
                    unread = torch.tensor([[0] * n + row for n, row in zip(padding, rows)], device=device)
                    doc_ids = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
                    doc_ids = doc_ids if any(padding) else None
                    if not self.config.sees_future:
                        room = block_size if self.compile_decode else min(block_size, longest + max_new_tokens - step)
                        dtype = compute_dtype(self.embedding.weight)
                        cache = KVCache(self.config, len(rows), room, device, dtype, self.compile_decode)
                logits = self(unread, doc_ids=doc_ids, cache=cache)
                token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
                yield torch.where(ended, -1, token)
                for row, new, over in zip(rows, token.tolist(), ended.tolist()):
                    row.extend([] if over else [new])
                ended |= torch.isin(token, stops)
                if ended.all():
                    return
                unread, doc_ids = token[:, None], None
        finally:
            self.train(training)

    @torch.no_grad()
    def routing_stats(
        self, tokens: Tensor, doc_ids: Tensor | None = None, counted: Tensor | None = None, neurons: bool = False
    ) -> dict[str, list]:
        """What the routing does on these tokens [B, T], without noise: measures by name, each a list over the layers.

        counted [B, T] bool says which tokens to average over (None: all), so that padding is left out.
        - static_entropy: of softmax(alpha), mean over neurons, in nats. It says nothing of the input, nor of tau.
        - dynamic_entropy: of g = softmax((alpha + beta f) / tau), mean over neurons and tokens, in nats
        - usage: share of each activation [K], the mean of g
        - input_dependence: mutual information of choice and token, mean over neurons, in nats: H(mean g) - mean H(g)
        - agreement: largest share of the layer's neurons that favour the same activation, mean over tokens
        static_entropy_share and dynamic_entropy_share are the entropies as shares of ln K. With neurons=True also
        - neuron_usage: usage of every neuron by itself, [K, d_ff]
        Empty for a plain GLU.
        """
        K = len(self.config.activations)
        if K == 1:
            return {}
        names = ("static_entropy", "dynamic_entropy", "usage", "input_dependence", "agreement")
        stats = {name: [] for name in (*names, "neuron_usage")[: None if neurons else len(names)]}
        training = self.training
        self.eval()
        ctx, x = self.context(tokens, doc_ids), self.embedding(tokens)
        counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
        n = counted.sum()
        for block in self.blocks:  # Block.forward, with a look at what goes into its PolyGLU
            x = x + block.attn(block.norm_1(x), ctx)
            h = block.norm_2(x)
            x = x + block.ffn(h, ctx.tau, ctx.start)
            entropy_of_g, agreement, mean_g = 0.0, 0.0, 0.0
            for i, (row, start) in enumerate(zip(h.split(1), ctx.start.split(1))):  # g has K * T * d_ff numbers a row
                g = torch.stack(block.ffn.routing(row, ctx.tau, start))
                g = g[:, 0, counted[i]]  # [K, counted tokens, d_ff]
                votes = (g == g.amax(0)).float()  # a tie splits the neuron's vote
                entropy_of_g += entropy(g).mean(-1).sum() / n
                agreement += (votes / votes.sum(0)).mean(-1).amax(0).sum() / n
                mean_g += g.sum(1) / n  # [K, d_ff]
            stats["static_entropy"].append(entropy(block.ffn.alpha.t().softmax(0)).mean().item())
            stats["dynamic_entropy"].append(entropy_of_g.item())
            stats["usage"].append(mean_g.mean(-1).tolist())
            stats["input_dependence"].append((entropy(mean_g).mean() - entropy_of_g).clamp_min(0).item())
            stats["agreement"].append(agreement.item())
            if neurons:
                stats["neuron_usage"].append(mean_g.tolist())
        self.train(training)
        for name in ("static_entropy", "dynamic_entropy"):
            stats[f"{name}_share"] = [nats / math.log(K) for nats in stats[name]]
        return stats

    def configure_optimizer(
        self, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> torch.optim.AdamW:
        """Fused AdamW, with decay on weight matrices and the embedding only: never on alpha, beta, norms, biases.

        Parameters that need no gradient are left out. Every group says with "routing" whether its parameters are those
        of the routing.
        """
        groups = {
            (decay, routing): {"params": [], "weight_decay": weight_decay if decay else 0.0, "routing": routing}
            for decay in (True, False)
            for routing in (True, False)
        }
        for name, p in ((name, p) for name, p in self.named_parameters() if p.requires_grad):
            decay, routing = p.dim() == 2 and not name.endswith("alpha"), bool(ROUTING.search(name))
            groups[decay, routing]["params"].append(p)
        used = [group for group in groups.values() if group["params"]]
        return torch.optim.AdamW(used, lr=lr, betas=betas, eps=eps, fused=True)

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations of a training token, forward and backward, in rows of `length` (block_size) tokens.

        6 for each parameter that multiplies (looking up an embedding that is no head is free), 12 L H D T for
        attention, the half that causality masks counted too (arXiv 2204.02311, appendix B).
        """
        c = self.config
        attention = 12 * c.n_layer * c.n_head * c.head_dim * (length or c.block_size)
        lookup = 0 if c.tied_head else self.embedding.weight.numel()
        return 6 * (sum(p.numel() for p in self.parameters()) - lookup) + attention

    # ------------------------------------------------------------------------------------------- weights in and out

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, router_context: str | None = None
    ) -> "PolychromaticLM":
        """A model on the CPU, float32, from any of four layouts, told apart by their keys.

        - a checkpoint of train.py or sft.py, or a run folder that holds one
        - config.json and model.safetensors of save_pretrained()
        - the paper's released weights: .safetensors, or their training checkpoint. They route by the "sequence",
          without noise; tau is the file's, or 0.1
        - a Qwen3 (config.json, .safetensors, sharded or not): the model with one activation, K = 1
        source: a local path, or a model's name on the hub, at a revision. router_context replaces the model's own.
        Raises FileNotFoundError if nothing is there, ValueError, naming the file and what is wrong, for the rest.
        """
        shape, state, path = load_weights(source, revision)
        try:
            model = cls(dataclasses.replace(shape, **({"router_context": router_context} if router_context else {})))
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: {e}") from None
        expected = model.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state:
                raise ValueError(f"{path} lacks the tensor {name}")
            if name not in expected:
                raise ValueError(f"{path} has a tensor that the model has not: {name}")
            if state[name].shape != expected[name].shape:
                theirs, ours = list(state[name].shape), list(expected[name].shape)
                raise ValueError(f"{path}: the tensor {name} has the shape {theirs}, not {ours}")
        model.load_state_dict(state)
        return model

    def save_pretrained(self, directory: str | Path, settings: dict | None = None):
        """Write config.json, model.safetensors and a model card, README.md, with the settings of the training.

        from_pretrained() reads it back, bit for bit. Raises ValueError if the safetensors package is not installed.
        """
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise ValueError("writing .safetensors needs a package: pip install safetensors") from None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        (directory / "README.md").write_text(self.model_card(settings or {}))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, directory / "model.partial")
        (directory / "model.partial").replace(directory / "model.safetensors")

    def model_card(self, settings: dict) -> str:
        """Markdown: what the model is, how it was trained, how to load it."""
        c, size = self.config, sum(p.numel() for p in self.parameters())
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        return (
            "---\nlicense: apache-2.0\nlibrary_name: pytorch\ntags: [polyglu]\n---\n"
            f"# PolychromaticLM, {size:,} parameters\n\nA decoder-only transformer with PolyGLU feed-forward layers "
            f"(arXiv 2603.13347) of {', '.join(c.activations)}; router context {c.router_context}, "
            f"tau {self.tau.item():g}, tokenizer {c.tokenizer}.\n\n"
            '    model = PolychromaticLM.from_pretrained("this folder")\n\n'
            + (f"Trained with:\n\n| setting | value |\n|---|---|\n{rows}" if settings else "")
        )

    def push_to_hub(self, name: str, settings: dict | None = None, private: bool = False):
        """save_pretrained() to a model repository on the hub, "owner/name", which is made if it is not there.

        Raises ValueError if huggingface_hub is not installed, and what that raises without a login or a network.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise ValueError("the hub needs a package: pip install huggingface_hub") from None
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, settings)
            HfApi().create_repo(name, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=folder)


def upcycle(old: PolychromaticLM, config: ModelConfig, tau: float) -> dict[str, Tensor]:
    """Weights of a model with several activations that, at temperature tau, is the plain GLU `old`.

    Its own activation gets e^10 times the weight of each other, in every neuron; the router starts at zero. With noise,
    which a low tau does not lessen, alpha is at least 10, so that training starts there too.
    """
    alpha = 10 * (max(tau, 1.0) if config.gumbel else tau)
    state = PolychromaticLM(config).state_dict()
    state.update(old.state_dict())
    for name, tensor in state.items():
        if name.endswith("alpha"):
            tensor.zero_()[:, config.activations.index(old.config.activations[0])] = alpha
        elif ".router_out." in name:
            tensor.zero_()
    return state


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the first dimension, in nats: [K, ...] -> [...]."""
    return torch.special.entr(p.clamp_max(1)).sum(0)  # rounding can leave a sure choice a little above 1


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None = None
) -> Tensor:
    """One token of every row of logits [B, V] -> [B] int64; arguments as generate()'s."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # however small: the likeliest stays at 0
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = p.cumsum(-1) - p >= top_p  # what comes before it reaches p already
        logits = logits.masked_fill(torch.empty_like(outside).scatter(1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def load_checkpoint(source: str | Path) -> dict:
    """Read a torch checkpoint, or the one in a run folder: tensors and plain values on the CPU, never code.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or holds no model.
    """
    path = Path(source)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"bad checksum of {damaged}")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged zip, a truncated tensor and refused code each raise their own kind
        raise ValueError(f"{path} is damaged or not a checkpoint ({' '.join(str(e).split())[:120]})") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of a model")
    return saved


# How other layouts name our tensors: (pattern of their name, our name).
RELEASED_NAMES = (
    (r"embeddings\.weight", "embedding.weight"),
    (r"output_head\.weight", "head.weight"),
    (r"rmsnorm\.gama", "norm.weight"),
    (r"model_core\.(\d+)\.rmsnorm_([12])\.gama", r"blocks.\1.norm_\2.weight"),
    (r"model_core\.(\d+)\.gqa\.W_([qkvo])\.weight", r"blocks.\1.attn.w_\2.weight"),
    (r"model_core\.(\d+)\.gqa\.rmsnorm_([qk])\.gama", r"blocks.\1.attn.norm_\2.weight"),
    (r"model_core\.(\d+)\.polyglu\.W_(gate|up|down)\.weight", r"blocks.\1.ffn.w_\2.weight"),
    (r"model_core\.(\d+)\.polyglu\.(alpha|beta)", r"blocks.\1.ffn.\2"),
    (r"model_core\.(\d+)\.polyglu\.gate_net\.0\.(weight|bias)", r"blocks.\1.ffn.router_in.\2"),
    (r"model_core\.(\d+)\.polyglu\.gate_net\.2\.(weight|bias)", r"blocks.\1.ffn.router_out.\2"),
)
QWEN3_NAMES = (
    (r"model\.embed_tokens\.weight", "embedding.weight"),
    (r"lm_head\.weight", "head.weight"),
    (r"model\.norm\.weight", "norm.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blocks.\1.norm_1.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"blocks.\1.norm_2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight", r"blocks.\1.attn.w_\2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"blocks.\1.attn.norm_\2.weight"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"blocks.\1.ffn.w_\2.weight"),
)


def renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """state with our names; what has none keeps its own. A head equal to the embedding is left out."""
    found = {}
    for theirs, tensor in state.items():
        ours = (re.sub(pattern, name, theirs) for pattern, name in names if re.fullmatch(pattern, theirs))
        found[next(ours, theirs)] = tensor
    if "head.weight" in found and torch.equal(found["head.weight"], found["embedding.weight"]):
        del found["head.weight"]
    return found


def shape_of(state: dict[str, Tensor]) -> dict:
    """The settings of ModelConfig that tensors show. Raises KeyError for one that is missing."""
    head_dim = state["blocks.0.attn.norm_q.weight"].numel()
    shape = {
        "vocab_size": state["embedding.weight"].size(0),
        "n_embd": state["embedding.weight"].size(1),
        "n_layer": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "n_head": state["blocks.0.attn.w_q.weight"].size(0) // head_dim,
        "n_kv_head": state["blocks.0.attn.w_k.weight"].size(0) // head_dim,
        "head_dim": head_dim,
        "d_ff": state["blocks.0.ffn.w_gate.weight"].size(0),
        "tied_head": "head.weight" not in state,
    }
    if "blocks.0.ffn.router_in.weight" in state:
        shape["router_hidden"] = state["blocks.0.ffn.router_in.weight"].size(0)
    return shape


def load_weights(source: str | Path, revision: str | None = None) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """Shape, tensors under our names, and file of a model; arguments and errors as from_pretrained()'s."""
    path = Path(source) if Path(source).exists() else _download(str(source), revision)
    if revision and path == Path(source):
        raise ValueError(f"{source} is a local path, which has no revisions")
    if path.is_dir():
        candidates = [path / name for name in ("ckpt.pt", "model.safetensors.index.json", "model.safetensors")]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"no checkpoint at {candidates[0]}, and no model.safetensors beside it")
        path = file
    try:
        config_file = path.parent / "config.json"
        settings = json.loads(config_file.read_text()) if config_file.is_file() else {}
    except ValueError as e:
        raise ValueError(f"{config_file} is damaged ({e})") from None
    if path.name.endswith((".safetensors", ".index.json")):
        saved = {"model": _load_safetensors(path), "model_config": settings}
    else:
        saved = load_checkpoint(path)
    try:
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in saved["model"].items()}
        if "embedding.weight" in state:
            return ModelConfig(**saved.get("model_config", settings)), state, path
        if "embeddings.weight" in state:
            state = {name: t for name, t in state.items() if not name.startswith("rope.")}  # tables that we make anew
            state = renamed(state, RELEASED_NAMES)
            state.setdefault("tau", torch.as_tensor(float(saved.get("tau", 0.1))))
            return ModelConfig(**shape_of(state), router_context="sequence", gumbel=False), state, path
        if "model.embed_tokens.weight" in state:
            if not settings.get("tie_word_embeddings", True):
                state["lm_head.weight"]  # else it would pass for a tied one
            state = renamed(state, QWEN3_NAMES)
            state["tau"] = torch.tensor(1.0)
            return ModelConfig(**shape_of(state), **_qwen3_settings(settings, config_file)), state, path
    except KeyError as e:
        raise ValueError(f"{path} lacks the tensor {e.args[0]}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} does not hold a model of this project: {' '.join(str(e).split())[:300]}") from None
    raise ValueError(f"{path} holds no model of a known layout: its first tensor is {next(iter(state), 'missing')}")


def _qwen3_settings(settings: dict, path: Path) -> dict:
    """Settings of ModelConfig in a Qwen3's config.json; ValueError names what this model cannot be."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    unsupported = {
        f"model_type {settings.get('model_type')!r}": settings.get("model_type") != "qwen3",
        "attention_bias": settings.get("attention_bias", False),
        "use_sliding_window": settings.get("use_sliding_window", False),
        f"rope scaling {rope.get('rope_type', rope.get('type'))!r}": rope.get("rope_type", "default") != "default"
        or rope.get("type", "default") != "default",
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") not in ACTIVATIONS,
    }
    if named := [name for name, is_so in unsupported.items() if is_so]:
        raise ValueError(f"{path} asks for {', '.join(named)}, which this model has not")
    return {
        "block_size": settings.get("max_position_embeddings", 32_768),
        "rope_theta": float(settings.get("rope_theta") or rope.get("rope_theta", 1_000_000.0)),
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "activations": (settings.get("hidden_act", "silu"),),
    }


def _download(name: str, revision: str | None) -> Path:
    """The folder of a model on the hub, in the hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no checkpoint at {name}")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as e:  # no such package, model, revision or network: each of its own kind
        reason = " ".join(str(e).split())[:150]
        message = f"no checkpoint at {name}, nor can a model of that name be had from the hub ({reason})"
        raise FileNotFoundError(message) from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of all that an index.json names."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("reading .safetensors needs a package: pip install safetensors") from None
    try:
        files, tensors = [path], {}
        if path.suffix == ".json":
            files = [path.parent / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
        for path in files:  # whichever fails is named
            tensors.update(load_file(path))
        return tensors
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}") from None
    except Exception as e:
        raise ValueError(f"{path} is damaged ({e})") from None
