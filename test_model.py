"""Everything that must stay true: size, causality, documents, cache, loss, gradients, data, schedules, kill and
resume, error messages. common/ and extras/ hold the tests of what is there. To run all: python -m pytest -q -n 2
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import graphlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common.generate as generation
import common.settings as config
import eval as evaluate
import prepare_data
import sample
import sft
import train
from common import data, tokenizer
from common.run import Ranks, StopSignal, flops_per_token, load_checkpoint, read_log
from common.weights import freeze, from_pretrained
from extras import embedded
from model import (
    ROUTER_CONTEXTS,
    KVCache,
    ModelConfig,
    PolychromaticLM,
    PolyGLU,
    chunk_loss,
    chunked_cross_entropy,
    gumbel_noise,
    set_tau,
)

ROOT = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # of scripts; the tests run in parallel
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script would ignore, had we been started with &
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or with nohup
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is first imported: no test waits for a network
ROUTING = re.compile(r"alpha|beta|router")
SMALL = dict(
    block_size=64, vocab_size=259, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, d_ff=48,
    router_hidden=8, tokenizer="bytes",
)  # fmt: skip


def small_model(**overrides) -> PolychromaticLM:
    """A small model with weights large enough that its routing and attention differ from token to token."""
    torch.manual_seed(0)
    model = PolychromaticLM(ModelConfig(**{**SMALL, **overrides}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    set_tau(model, 0.5)
    return model.eval()


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def maybe_compiled(function, compiled: bool):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


# ---------------------------------------------------------------------------------------------------------- 1. the size


@pytest.mark.parametrize(
    "arguments, total, routing",
    [
        ([], 597_153_888, 1_380_960),
        (["--activations=gelu"], 595_772_928, 0),
        ([f"{ROOT}/config/small.py"], 123_961_824, 407_520),
    ],
)
def test_models_have_the_size_and_flops_that_we_print_and_no_unused_routing(arguments, total, routing):
    c = config.load(train.TrainConfig, arguments).model_config()
    with torch.device("meta"):
        model = PolychromaticLM(c)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == total
    assert sum(n for name, n in sizes.items() if ROUTING.search(name)) == routing
    assert flops_per_token(model) == 6 * total + 12 * c.n_layer * c.n_head * 64 * c.block_size


def test_init_is_the_papers():
    torch.manual_seed(0)
    model = PolychromaticLM(ModelConfig(**{**SMALL, "n_layer": 8, "n_embd": 128, "d_ff": 256}))
    for name, p in model.named_parameters():
        if p.dim() == 1 or name.endswith("alpha"):
            assert p.eq(1 if "beta" in name or "norm" in name else 0).all(), name
        else:
            expected = 0.02 / 4 if re.search(r"w_o|w_down", name) else 0.02  # 1 / sqrt(2 * 8 layers)
            assert p.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * p.numel())), name  # standard errors
    for name, p in PolyGLU(128, 256).named_parameters():  # a layer alone
        if p.dim() == 2 and name != "alpha":
            assert p.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * p.numel())), name
        assert not name.endswith("bias") or p.eq(0).all(), name


def test_models_of_one_seed_share_every_weight_except_routing():
    """Bit by bit, so that a study compares routings and not initial weights."""
    shared = []
    for kw in ({}, {"activations": ("silu",)}, {"router_hidden": 0}, {"router_context": "token"}, {"router_hidden": 5}):
        torch.manual_seed(3)
        parameters = PolychromaticLM(ModelConfig(**{**SMALL, **kw})).named_parameters()
        shared.append({name: p for name, p in parameters if not ROUTING.search(name)})
        torch.testing.assert_close(shared[-1], shared[0], rtol=0, atol=0)


def test_only_weight_matrices_and_the_embedding_decay():
    model = small_model()
    cfg = train.TrainConfig(weight_decay=0.1, routing_lr=4.0, alpha_lr=10.0, beta1=0.5, beta2=0.75)
    groups = train.configure_optimizer(model, cfg).param_groups
    assert all(group["betas"] == (0.5, 0.75) and group["eps"] == 1e-8 for group in groups)
    group_of = {p: group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        scale = (4.0 if ROUTING.search(name) else 1.0) * (10.0 if name.endswith("alpha") else 1.0)
        decay = 0.0 if re.search(r"alpha|beta|norm|bias", name) else 0.1  # of lr * lr_scale
        assert group_of[p]["lr_scale"] == scale, name
        assert group_of[p]["weight_decay"] * scale == pytest.approx(decay), name


# --------------------------------------------------------------------------------------------------------- 2. causality

ROUTERS = {name: {"router_context": name} for name in ROUTER_CONTEXTS}
ROUTERS |= {f"centred {name}": {**ROUTERS[name], "router_centred": True} for name in ("prefix", "token")}
CAUSAL = [name for name in ROUTERS if name != "sequence"]
EAGER_AND_COMPILED = [*((name, False) for name in ROUTERS), ("prefix", True), ("centred token", True)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_token_changes_an_earlier_logit_or_another_row_except_for_a_sequence_router(router, training):
    model, tokens = small_model(**ROUTERS[router]).train(training), random_tokens(2, 24)

    def logits(tokens):
        torch.manual_seed(1)  # the same routing noise
        return model(tokens)

    before = logits(tokens)
    for t in range(1, 24):
        changed = tokens.clone()
        changed[0, t:] = (tokens[0, t:] + 101) % 256
        difference = (logits(changed) - before).abs()
        assert difference[0, t].max() > 1e-2  # the change is one that shows
        assert difference[1].max() < 1e-5
        assert (difference[0, :t].max() < 1e-5) == (router in CAUSAL)


# --------------------------------------------------------------------------------------------------------- 3. documents


@pytest.mark.parametrize("router, flex", [*((name, False) for name in CAUSAL), ("prefix", True)])
def test_packed_documents_give_the_logits_and_the_loss_of_each_alone(router, flex):
    model, lengths = small_model(**ROUTERS[router], block_size=256), [100, 1, 3, 120]
    tokens, targets = random_tokens(1, 224), random_tokens(1, 224, seed=2)
    targets[:, ::5] = -1
    doc_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([model(document) for document in tokens.split(lengths, dim=1)], dim=1)
    loss = F.cross_entropy(alone[0], targets[0], ignore_index=-1)
    model.requires_grad_(not flex).flex = flex  # FlexAttention has no backward pass on a CPU
    with mock.patch.object(PolychromaticLM, "is_compiled", flex):  # FlexAttention compiles alone, as in routing_stats()
        torch.testing.assert_close(model(tokens, doc_ids=doc_ids), alone, rtol=0, atol=2e-5)
        torch.testing.assert_close(model(tokens, targets, doc_ids), loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(tokens, doc_ids=torch.zeros_like(doc_ids)), model(tokens), rtol=0, atol=1e-5)


def test_a_short_document_loses_no_digits_to_the_large_sum_of_the_one_before():
    x, doc_start = 100 + torch.randn(1, 4000, 3), torch.full((1, 4000), -1)
    doc_start[0, 3998:] = 3998
    torch.testing.assert_close(ROUTER_CONTEXTS["prefix"](x, doc_start, None)[0, 3998], x[0, 3998], rtol=1e-7, atol=0)


# ------------------------------------------------------------------------------------------------------------- 4. cache


@pytest.mark.parametrize(
    "router, compiled", [("prefix", True), ("centred token", True), *((name, False) for name in CAUSAL)]
)
def test_cached_logits_equal_the_full_forward_whatever_the_documents_and_the_lengths_of_calls(router, compiled):
    model, graphs = small_model(**ROUTERS[router]), torch._dynamo.utils.counters["stats"]
    tokens, cache = random_tokens(3, 24), KVCache(model.config, 3, 26)
    doc_ids = torch.tensor([24 * [0], 5 * [0] + 19 * [1], 7 * [0] + 10 * [1] + 7 * [2]])
    full = model(tokens, doc_ids=doc_ids)
    if compiled:
        model.compile(options=generation.DECODING_OPTIONS)
    graphs.clear()
    with torch.set_grad_enabled(not compiled):
        for start, end in itertools.pairwise([0, 5, 9, 10, 15, *range(16, 25)]):
            given = doc_ids[:, start:end] if end <= 20 else None  # the rest continues the documents under way
            logits = model(tokens[:, start:end], doc_ids=given, cache=cache)
            torch.testing.assert_close(logits[:, 0], full[:, end - 1], rtol=0, atol=1e-4)
    assert cache.length == 24
    assert graphs["unique_graphs"] == compiled  # one, for all layers and tokens


@torch.no_grad()
@pytest.mark.parametrize("router", CAUSAL)
def test_cached_logits_equal_the_full_forward_of_rows_of_one_document_as_in_a_chat(router):
    model, tokens = small_model(**ROUTERS[router]), random_tokens(2, 24)
    full, cache = model(tokens), KVCache(model.config, 2, 24)
    for start, end in itertools.pairwise([0, 5, 9, *range(10, 25)]):
        logits = model(tokens[:, start:end], cache=cache)
        torch.testing.assert_close(logits[:, 0], full[:, end - 1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="a row of 25 tokens, but there is room for 24"):
        model(tokens[:, :1], cache=cache)


# ------------------------------------------------------------------------------------------------------------- 5. Qwen3


def random_qwen3(folder: Path, shard: str = "1GB", **settings):
    """A small random Qwen3 as transformers saves it; the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-3,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | settings)).eval()
    for norm in (p for p in model.parameters() if p.dim() == 1):
        torch.nn.init.normal_(norm, 1, 0.2)  # unlike each other
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied, shard", [(True, "1GB"), (False, "20KB")])
def test_one_activation_is_qwen3(tied, shard, tmp_path):
    theirs = random_qwen3(tmp_path, shard, tie_word_embeddings=tied)
    ours, tokens = from_pretrained(tmp_path), random_tokens(2, 40)
    assert ours.config.tied_head == tied and ours.config.activations == ("silu",)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["tie_word_embeddings"]  # then the tensors say it
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(from_pretrained(tmp_path)(tokens), ours(tokens))
    greedy = theirs.generate(tokens[:1, :8], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated(ours, tokens[:1, :8], 20) == greedy[:, 8:].tolist()
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    rope = settings.pop("rope_parameters")
    path.write_text(json.dumps({**settings, "rope_theta": rope["rope_theta"], "rope_scaling": None}))  # as of version 4
    assert from_pretrained(tmp_path).config == ours.config


# -------------------------------------------------------------------------------------------------------------- 6. loss


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 300, 128, 7])  # in one chunk, and in up to 43
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_chunked_loss_equals_plain_cross_entropy_in_value_and_gradients(dtype, tolerance, chunk_size, compiled):
    torch.manual_seed(0)
    body, graphs = maybe_compiled(chunk_loss, compiled), torch._dynamo.utils.counters["stats"]
    hidden, weight = (torch.randn(n, 8, dtype=dtype, requires_grad=True) for n in (300, 259))
    targets = torch.randint(0, 259, (300,))
    targets[::7], targets[-1] = -1, 258
    plain = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-1)
    graphs.clear()
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_size, body)
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=0)
    assert graphs["unique_graphs"] == compiled  # one for all chunks
    ours, theirs = (torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, chunk_size), loss)
        assert chunked_cross_entropy(hidden, weight, torch.full_like(targets, -1), chunk_size) == 0


def test_the_loss_holds_one_chunk_of_logits_at_a_time_and_without_grad_computes_no_gradient():
    hidden, weight = torch.randn(300, 8, requires_grad=True), torch.randn(259, 8)
    for grad in (True, False):
        body = mock.Mock(wraps=chunk_loss)
        with torch.set_grad_enabled(grad):
            chunked_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.int64), 7, body)
        assert {(len(call.args[0]), call.args[-1]) for call in body.call_args_list} == {(7, grad)}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_many_bfloat16_chunks_are_summed_in_float32(compiled):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (4096, 300))
    targets = torch.randint(0, 300, (4096,))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16, maybe_compiled(chunk_loss, compiled))
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # 256 sums in bfloat16 would lose several percent


# ------------------------------------------------------------------------------------------- 7. the layer, 10. compiled


def random_layer(*shape: int, **settings) -> PolyGLU:
    """A PolyGLU with weights large enough that its routing differs from token to token."""
    torch.manual_seed(0)
    layer = PolyGLU(*shape, **{"router_hidden": 8, "gumbel": False, **settings})
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    set_tau(layer, 0.5)
    return layer


@pytest.mark.parametrize("router, compiled", EAGER_AND_COMPILED)
def test_polyglu_is_its_equation(router, compiled):
    layer, x = random_layer(16, 24, **ROUTERS[router]).double(), torch.randn(5, 16, dtype=torch.float64)
    means_so_far = torch.stack([x[: t + 1].mean(0) for t in range(5)])
    context = {"prefix": means_so_far, "token": x, "sequence": x.mean(0).expand(5, -1)}[layer.router_context]
    f = layer.router_out(F.relu(layer.router_in(context)))  # [T, K]
    if layer.router_centred:
        f = torch.stack([f[t] - f[: t + 1].mean(0) for t in range(5)])
    g = torch.softmax((layer.alpha + layer.beta * f[:, None]) / 0.5, dim=-1)  # [T, d_ff, K]
    gate = layer.w_gate(x)
    sigma = torch.stack([F.relu(gate), torch.tanh(gate), F.silu(gate), F.gelu(gate)], dim=-1)
    expected = layer.w_down((g * sigma).sum(-1) * layer.w_up(x))
    torch.testing.assert_close(maybe_compiled(layer, compiled)(x[None])[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router, compiled", EAGER_AND_COMPILED)
def test_polyglu_gradients_by_gradcheck(router, compiled):
    """The relu is left out: it has no derivative at 0."""
    layer = random_layer(4, 6, activations=("tanh", "silu", "gelu"), router_hidden=3, **ROUTERS[router]).double()
    doc_start = torch.tensor([[-1, -1, 2, 2, 2], [-1, 1, 1, 1, 4]])
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    run = maybe_compiled(layer, compiled)
    assert torch.autograd.gradcheck(lambda x, *_: run(x, doc_start), (x, *layer.parameters()))


def test_a_layer_in_bfloat16_is_close_and_its_temperature_is_above_0():
    torch.manual_seed(0)
    layer, x = PolyGLU(64, 256).eval(), torch.randn(2, 10, 64)
    set_tau(layer, 0.7)
    y, in_bfloat16 = layer(x), copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16 and (in_bfloat16 - y).norm() < 0.03 * y.norm()
    with pytest.raises(ValueError, match="tau is 0; it must be above 0"):
        set_tau(layer, 0)


def test_the_temperature_may_change_between_forward_and_backward():
    layer, gradients = PolyGLU(16, 24), []
    for tau in (1.0, 0.1):
        torch.manual_seed(0)
        loss = layer(torch.ones(1, 3, 16)).sum()
        set_tau(layer, tau)
        gradients.append(torch.autograd.grad(loss, layer.alpha))
        set_tau(layer, 1.0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_what_no_model_can_compute_is_named():
    model = small_model()
    for shape in ([0, 5], [5]):
        with pytest.raises(ValueError, match=re.escape(f"tokens have shape {shape}; the model takes [B, T]")):
            model(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("x has shape [3, 32]; PolyGLU takes [B, T, n_embd]")):
        model.blocks[0].ffn(torch.zeros(3, 32))
    with pytest.raises(ValueError, match="the batch is empty"):
        chunked_cross_entropy(torch.zeros(0, 32), model.head_weight, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="rope_theta is nan; it must be above 0"):
        ModelConfig(rope_theta=math.nan)


def test_in_training_alone_each_row_neuron_and_activation_adds_one_gumbel_draw_to_its_logits():
    layer, x = random_layer(8, 24, gumbel=True).double(), torch.randn(2, 12, 8, dtype=torch.float64)
    torch.manual_seed(1)
    e = torch.stack(layer.unnormalized_weights(x), dim=-1)  # [B, T, d_ff, K]
    torch.manual_seed(1)
    noise = gumbel_noise(torch.zeros(2, 4, 24, dtype=torch.float64)).mT  # [B, d_ff, K]
    logits = layer.alpha + noise[:, None] + layer.dynamic_logits(x)[:, :, None]
    torch.testing.assert_close(e / e.sum(-1, keepdim=True), (logits / layer.tau).softmax(-1), rtol=1e-9, atol=0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(200_000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("nats, tau", [(0, 1), (15, 1), (200, 1), (200, 0.001)])
def test_float32_values_and_gradients_are_the_float64_ones_when_logits_conflict(nats, tau, compiled):
    """Neurons and tokens that want contrary activations by 2 * nats, to 1e-6 and the rounding of logits that large."""
    layer, opposed = random_layer(24, 32), nats * torch.tensor([1.0, -1.0, 0.5, -0.5])
    layer.alpha.data += opposed
    layer.beta.data.fill_(1)
    layer.router_out.bias.data -= opposed
    set_tau(layer, tau)
    x, d_y, results = torch.randn(2, 16, 24, requires_grad=True), torch.randn(2, 16, 24), []
    for run, d in ((maybe_compiled(layer, compiled), d_y), (copy.deepcopy(layer).double(), d_y.double())):
        y = run(x.to(d.dtype))
        results.append([y, *torch.autograd.grad(y, (x, *run.parameters()), d)])
    for ours, exact in zip(*results):
        tolerance = (3e-6 + nats / tau * 2**-23) * exact.abs().max().item()
        torch.testing.assert_close(ours, exact.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_choice_that_is_made_gives_its_logits_no_gradient_in_bfloat16(compiled):
    """Where one activation has all the weight, rounding must not pass for a gradient: AdamW would make steps of it."""
    layer = random_layer(24, 32)
    layer.alpha.data = torch.tensor([0.0, 0.0, 0.0, 30.0]).repeat(32, 1)
    for p in layer.router_out.parameters():
        p.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = maybe_compiled(layer, compiled)(torch.randn(2, 16, 24))
    y.float().backward(torch.randn(2, 16, 24))
    assert layer.w_gate.weight.grad.abs().max() > 1e-2
    assert max(p.grad.abs().max() for p in (layer.alpha, layer.router_out.bias)) < 1e-5


def test_compiled_routing_keeps_next_to_nothing_for_the_backward_pass():
    """As eager code it keeps every intermediate tensor; compiled, what SwiGLU keeps."""
    x, kept = torch.randn(4, 512, 64, requires_grad=True), []
    for names in (("silu",), ("relu", "tanh", "silu", "gelu")):
        layer, saved = PolyGLU(64, 1024, names), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            maybe_compiled(layer, True)(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in parameters))
    assert kept[1] < 1.05 * kept[0]


@pytest.mark.parametrize("flex", [False, True])
@torch._inductor.config.patch(fallback_random=True)  # the routing noise of eager code
def test_a_compiled_model_trains_like_an_eager_one_in_four_graphs(flex):
    """One of all blocks for training, one for evaluation, whatever the documents and tau; two of the loss."""
    torch._dynamo.reset()
    eager, graphs = small_model(block_size=256, n_layer=3), torch._dynamo.utils.counters["stats"]
    eager.requires_grad_(not flex)  # FlexAttention has no backward pass on a CPU
    compiled, rng = copy.deepcopy(eager), np.random.default_rng(0)
    eager.flex, compiled.flex = False, flex
    compiled.compile(backend="aot_eager" if flex else "inductor")
    assert compiled.state_dict().keys() == eager.state_dict().keys()  # a checkpoint does not show it
    graphs.clear()
    for step in range(20):
        tokens, starts = random_tokens(2, 256, seed=step), rng.random((2, 256)) < step / 20
        doc_ids, results = torch.tensor(starts).cumsum(1), []
        for model in (eager, compiled):
            torch.manual_seed(step)
            set_tau(model, 1 - step / 25)
            model.zero_grad()
            loss = model.train()(tokens, tokens, doc_ids)
            if not flex:
                loss.backward()
            with torch.no_grad():
                validation = model.eval()(tokens, tokens, doc_ids)
            results.append([(loss.detach(), validation), [p.grad for p in model.parameters()]])
        losses, gradients = zip(*results)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert graphs["unique_graphs"] == 4


# ------------------------------------------------------------------------------------ helpers and fixtures of all tests

SAMPLE = (  # code, apostrophes, numbers, accents in one and two pieces, scripts, emoji, odd spaces, controls, specials
    "def f(x):\n\treturn x**2  # ok\r\n\r\n\n   spaces   and\ttabs\t\t\n It's we'LL THEY'RE 1234567 3.14e-5 a_b-c "
    "na\u00efve nai\u0308ve \u212b \ufb01 \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d\u4e16\u754c \ud55c\uae00 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\u00a0\u2003\u200b\ufeff \x00\x07 <|endoftext|><|im_start|><|im_end|> <think>"
)
OUR_CODE = "".join(path.read_text() for path in sorted(ROOT.glob("*.py")))


def generated(model: PolychromaticLM, prompts, steps: int, **settings) -> list[list[int]]:
    tokens = generation.generate(model, prompts, steps, **{"temperature": 0, **settings})
    return torch.stack(list(tokens), dim=1).tolist()


def messages(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def error_of(function, *arguments, **keywords) -> str:
    """The one line that config.run() prints for the error of this call."""
    with pytest.raises(config.UserError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(settings: dict) -> list[str]:
    return [f"--{name}={','.join(v) if isinstance(v, tuple) else v}" for name, v in settings.items()]


def run_main(script, *arguments: str, stdin: str = "") -> SimpleNamespace:
    """What a script prints in this process, without its signal handlers: out and err."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(signal, "signal", lambda *_: None)
        script.main()
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue())


prepare = functools.partial(run_main, prepare_data)


def run_here(settings: dict, *extra: str, script=train) -> str:
    """What a run with these settings prints."""
    return run_main(script, *flags(settings), *extra).out


def run_script(*arguments: str, **kw) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, **kw})


@pytest.fixture(scope="session")
def small_vocab(tmp_path_factory) -> Path:
    """A byte-level BPE vocabulary in Qwen3's format, trained here on this repository's own text."""
    tokenizers, folder = pytest.importorskip("tokenizers"), tmp_path_factory.mktemp("vocab")
    bpe, splits = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    by_pattern = splits.Split(tokenizers.Regex(tokenizer.QWEN3_PATTERN), "isolated")
    bpe.pre_tokenizer = splits.Sequence([by_pattern, splits.ByteLevel(add_prefix_space=False, use_regex=False)])
    settings = dict(vocab_size=2000, initial_alphabet=splits.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator([OUR_CODE + 50 * SAMPLE], tokenizers.trainers.BpeTrainer(**settings))
    bpe.model.save(str(folder))
    return folder / "vocab.json"


def qwen3_tokenizer(vocab: Path, **settings):
    """transformers' tokenizer of this vocabulary."""
    transformers, lines = pytest.importorskip("transformers"), (vocab.parent / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines[1:]]
    return transformers.Qwen2Tokenizer(vocab=json.loads(vocab.read_text()), merges=merges, **settings)


@pytest.fixture(params=["bytes", "qwen3"])
def chat_encoding(request, small_vocab):
    return tokenizer.get_tokenizer(request.param, str(small_vocab))


def source_of(documents: list[str], val_fraction: float) -> prepare_data.Source:
    open_documents = functools.partial(prepare_data.numbered, lambda: documents)
    return prepare_data.Source("test", open_documents, {}, val_fraction)


def split_texts(folder: Path) -> dict[str, list[str]]:
    """The documents of a domain's splits, from their byte tokens."""
    texts = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", dtype=np.uint16)
        *texts[split], rest = np.where(ids < 256, ids, 0).astype(np.uint8).tobytes().decode().split("\0")
        assert rest == ""  # <|endoftext|> is last
    return texts


def damage_corpus(source: Path, target: Path, **meta) -> Path:
    shutil.copytree(source, target)
    path = target / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
    return target


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A small corpus of three domains, written by the real writer."""
    folder, rng, domains = tmp_path_factory.mktemp("data") / "tiny", random.Random(0), {}
    alphabets = {"math": ("0123456789+= ", 400), "stem": ("the quick brown fox. ", 150), "code": ("if x:\n ()", 60)}
    for name, (alphabet, size) in alphabets.items():
        documents = ["".join(rng.choices(alphabet, k=rng.randint(20, 200))) for _ in range(size)]
        domains[name] = source_of(documents, val_fraction=0.2)
    prepare_data.write_corpus(folder, tokenizer.get_tokenizer("bytes"), domains)
    return folder


def write_chat_source(path: Path, n: int = 300) -> Path:
    """Conversations of which several open with one question, and some that training leaves out."""
    said = [messages(f"Say {i // 2} to {i // 2 % 7}.", f"{i}!" * (i % 20 + 1)) for i in range(n)]
    said += [[{"role": "system", "content": "!"}, *turns, *messages("Sure?", "1!")] for turns in said[::9]]
    odd = [[{"role": "tool", "content": "x"}], messages("?"), messages("?" * 5000, "!")]
    return write_jsonl(path, [{"messages": m, "id": i} for i, m in enumerate(said + odd)])


def chat_arguments(source: Path) -> list[str]:
    return ["sft", f"--source={source}", "--tokenizer=bytes", "--max_length=65", "--val_fraction=0.1"]


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory) -> Path:
    """Conversations of up to 64 tokens, prepared from a file."""
    folder = tmp_path_factory.mktemp("chat")
    arguments = chat_arguments(write_chat_source(folder / "a[1].jsonl").with_name("*.jsonl"))  # a name, not a pattern
    printed = prepare(*arguments, f"--data_dir={folder}").out
    assert re.search(r"^chat: \d+ cut to 65 tokens$", printed, re.M)
    for fault in ("the role 'tool', not one of", "no assistant message", "no answer within 65 tokens"):
        assert f"chat: 1 left out: {fault}" in printed
    return folder / "sft"


def run_settings(corpus_dir: Path, out_dir: Path, **overrides) -> dict:
    return {
        **SMALL, "data_dir": str(corpus_dir), "out_dir": str(out_dir), "max_steps": 12, "batch_size": 8,
        "micro_batch_size": 4, "lr": 1e-2, "warmup_steps": 2, "eval_interval": 6, "eval_tokens": 256,
        "save_interval": 3, "log_interval": 1, "device": "cpu", "dtype": "float32", "compile": False, **overrides,
    }  # fmt: skip


def settings_from(init: Path, corpus_dir: Path, out_dir: Path, **overrides) -> dict:
    """Of a run that takes its model from `init`."""
    settings = run_settings(corpus_dir, out_dir, init_from=str(init), **{"lr": 3e-3, "tau_start": 0.1, **overrides})
    return {name: value for name, value in settings.items() if name not in SMALL or name in overrides}


@pytest.fixture
def run_small(corpus_dir, tmp_path):
    """Train in tmp_path with these flags and settings; returns what is printed."""
    return lambda *extra, **overrides: run_here(run_settings(corpus_dir, tmp_path, **overrides), *extra)


@pytest.fixture(scope="session")
def unbroken(corpus_dir, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("unbroken")
    assert f"done; {out_dir}/ckpt.pt is at step 12" in run_here(run_settings(corpus_dir, out_dir))
    return out_dir


@pytest.fixture(scope="session")
def fine_tuned(unbroken, chat_dir, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("sft")
    output = run_here(settings_from(unbroken, chat_dir, out_dir), script=sft)
    assert f"starting from the model of {unbroken}" in output and f"; {8 * 64:,} tokens a step" in output
    assert re.search(r"step 12: sample: user\\nSay \d+ to \d\.\\nassistant\\n(?s:.*): python sample.py --chat ", output)
    assert re.search(r"step 0: static entropy.*agreement.*\n  step 12: static entropy .*usage.*dependence", output)
    return out_dir


def run_eval(source: Path, folder: Path, *arguments: str) -> tuple[str, dict]:
    """Run eval.py on a copy of a run in this folder; what it prints, and its eval.json."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    printed = run_main(evaluate, f"--init_from={folder}", "--device=cpu", "--dtype=float32", *arguments).out
    return printed, json.loads((folder / "eval.json").read_text())


def command_of(settings: dict, *extra: str, processes: int = 1, script: str = "train.py") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [*torchrun, script, *flags(settings), *extra]


def assert_one_line(done: subprocess.CompletedProcess, *messages: str):
    """The script ended with exit status 1 and one line for the person, which says all of this."""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("override: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert all(message in errors[0] for message in ("error: ", *messages)), errors[0]


def losses_of(out_dir: Path) -> list[dict]:
    return [record for record in read_log(out_dir) if "loss" in record]


def assert_same_run(*out_dirs: Path):
    """Bit by bit, the state of the optimizer included."""
    one, two = ((run["model"], run["optimizer"]["state"]) for run in map(load_checkpoint, out_dirs))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- 8. runs, 9. their errors


def signal_at(command: list[str], line_start: str, number: int) -> tuple[int, str]:
    """Start a run and send it (or its torchrun) a signal once it prints such a line; exit status and output."""
    pipes, output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, ""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, **pipes)
    (watchdog := threading.Timer(400, process.kill)).start()
    for line in process.stdout:
        output += line
        if re.match(line_start, line):
            process.send_signal(number)
    watchdog.cancel()
    return process.wait(), output


def step_of(out_dir: Path) -> int:
    return load_checkpoint(out_dir)["progress"]["step"]


def test_a_run_stopped_killed_and_resumed_ends_bit_identical_to_an_unbroken_one(unbroken, corpus_dir, tmp_path):
    """A polite signal saves, exits with status 130 and prints the command to go on with; SIGKILL costs a few steps."""
    settings = run_settings(corpus_dir, tmp_path)
    command, resume = command_of(settings), command_of(settings, "--resume")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # before the first step, nothing is there to save
        status, output = signal_at(command, "override: ", number)
        assert status == 1 and "error: stopped" in output.splitlines()[-1] and not (tmp_path / "ckpt.pt").exists()
    for step, number in [(1, signal.SIGTERM), (4, signal.SIGHUP), (7, signal.SIGKILL), (9, signal.SIGINT)]:
        status, output = signal_at(command, f"step +{step}/", number)
        if number == signal.SIGKILL:
            assert status == -number and 4 <= step_of(tmp_path) <= 6, output
        else:
            assert status == 130 and "stopping after" in output and step <= step_of(tmp_path) <= step + 2, output
            command = shlex.split(re.search(r"Resume with: python (.*)", output)[1])
            assert command == resume
    assert "resumed" in run_here(settings, "--resume")
    assert_same_run(tmp_path, unbroken)
    assert [x["step"] for x in losses_of(tmp_path)] == list(range(1, 13))  # nothing is logged twice


def test_one_process_and_two_take_the_same_steps_also_when_resumed(corpus_dir, tmp_path):
    """With a centred router, noise, an annealed mixture and micro-batches."""
    overrides = {"max_steps": 20, "micro_batch_size": 2, "anneal_start": 0.5, "eval_interval": 10, "save_interval": 99}
    overrides |= {"mixture": {"math": 0.8, "code": 0.2}, "mixture_end": {"math": 0.2, "code": 0.8}}
    one, two = (run_settings(corpus_dir, tmp_path / n, **overrides, **ROUTERS["centred token"]) for n in ("one", "two"))
    run_here(one)
    # A signal to torchrun reaches both processes: they stop after the same step, and say how to go on.
    _, output = signal_at(command_of(two, processes=2), "step 11/", signal.SIGTERM)
    again = "Resume with: torchrun --nproc_per_node=2 --shutdown_timeout=600 train.py .*--resume"
    assert re.search(f"stopped; .* {again}", output) and "Warning" not in output, output
    assert 11 <= step_of(tmp_path / "two") < 20
    run_here(two, "--resume")

    def losses(folder: Path) -> list[tuple[int, float]]:  # of all steps, and of all domains at each evaluation
        log = read_log(folder)
        return [(line["step"], x["loss"]) for line in log for x in line.get("val", {"": line}).values()]

    expected = losses(tmp_path / "one")
    assert len(expected) == 20 + 3 * 2
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=0, atol=1e-5)


def test_a_run_resumed_with_another_batch_size_goes_on_reading_where_it_stopped(run_small, monkeypatch):
    """Half the batch, then twice: each domain's rows are read in order, none twice, and none is skipped."""
    read, nth_row = defaultdict(list), data.Corpus.nth_row
    monkeypatch.setattr(data.Corpus, "nth_row", lambda self, d, n: read[d].append(n) or nth_row(self, d, n))
    run_small(max_steps=3, batch_size=8)
    run_small("--resume", max_steps=6, batch_size=4)
    run_small("--resume", max_steps=9, batch_size=16)
    assert all(found == list(range(len(found))) for found in read.values())
    assert sum(map(len, read.values())) == 3 * (8 + 4 + 16)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_the_plain_training_loop(recompute, unbroken, chat_dir, tmp_path):
    """Each target of a step has one weight, whatever its micro-batch; a resumed run takes its new settings."""
    old = settings_from(unbroken, chat_dir, tmp_path, max_steps=3, grad_clip=0.01, tau_start=1.0, recompute=recompute)
    new = {**old, "max_steps": 5, "beta1": 0.5, "beta2": 0.75, "weight_decay": 0.5, "routing_lr": 4.0}
    with mock.patch("model.checkpoint", wraps=torch.utils.checkpoint.checkpoint) as checkpoint:
        run_here(old, script=sft)
    assert checkpoint.called == recompute
    assert "resuming with routing_lr=4.0; it was 1.0" in run_here(new, "--resume", script=sft)
    assert json.loads((tmp_path / "settings.json").read_text())["routing_lr"] == 4.0

    model, moments, log = from_pretrained(unbroken).train(), defaultdict(dict), []
    for step in range(5):
        cfg = sft.SFTConfig(**SMALL, **(old if step < 3 else new))
        lr, tau = train.get_lr(step, cfg), train.get_tau(step, cfg)
        optimizer = train.configure_optimizer(model, cfg)
        optimizer.state = moments
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        set_tau(model, tau)
        corpus, loss = data.Conversations(chat_dir, cfg.block_size, seed=cfg.seed), torch.zeros(())
        rows = np.stack([corpus.row("chat", corpus.nth_row("chat", 8 * step + i)) for i in range(8)])
        n_targets = (rows[:, 1] >= 0).sum()
        for i, part in enumerate(np.split(rows, 2)):
            torch.manual_seed(int(np.random.SeedSequence((cfg.seed, step, i)).generate_state(1, np.uint64)[0]))
            micro_loss = model(*data.to_inputs(part, model.device)) * ((part[:, 1] >= 0).sum() / n_targets)
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), norm.item(), tau))
    set_tau(model, 0.1)
    assert [(x["loss"], x["grad_norm"], x["tau"]) for x in losses_of(tmp_path)] == log
    torch.testing.assert_close(load_checkpoint(tmp_path)["model"], model.state_dict(), rtol=0, atol=0)


def test_pretraining_and_fine_tuning_learn_and_log_their_losses_evaluations_and_routing(unbroken, fine_tuned):
    for out_dir, domain, fall in ((unbroken, "math", 0.5), (fine_tuned, "chat", 0.1)):
        steps, evaluations = losses_of(out_dir), [line for line in read_log(out_dir) if "val" in line]
        assert [x["step"] for x in steps] == list(range(1, 13)) and [x["step"] for x in evaluations] == [0, 6, 12]
        first, _, last = (line["val"][domain] for line in evaluations)
        assert last["loss"] < first["loss"] - fall
        assert {"lr", "tau", "mixture", "grad_norm", "tokens_per_second", "mfu", "memory_gib"} <= steps[0].keys()
        for measure in ("static_entropy", "dynamic_entropy", "usage", "input_dependence", "agreement"):
            assert all(len(line["routing"][measure]) == SMALL["n_layer"] for line in evaluations)
    assert all(line["tau"] == 0.1 for line in read_log(fine_tuned))
    assert from_pretrained(fine_tuned).config == from_pretrained(unbroken).config


def test_the_default_settings_and_schedules_are_the_papers():
    cfg = train.TrainConfig()
    assert cfg.model_config() == ModelConfig()
    assert [train.get_lr(s, cfg) for s in (999, 1999, 2000, 19_531)] == [5e-5, 1e-4, 1e-4, 0]
    floor = dataclasses.replace(cfg, min_lr=1e-5)
    assert [train.get_lr(s, floor) for s in (999, 2000, 19_531)] == pytest.approx([5e-5, 1e-4, 1e-5])
    assert [train.get_tau(s, cfg) for s in (0, 9765, 19_531)] == pytest.approx([1, 1 - 0.9 * 9765 / 19_531, 0.1])
    mixed = config.load(train.TrainConfig, [f"{ROOT}/config/pretrain.py"])
    assert dataclasses.replace(mixed, mixture=None, mixture_end=None) == cfg
    mixed.max_steps = 500
    assert train.get_mixture(0, mixed) == train.get_mixture(399, mixed) == {"math": 0.7, "stem": 0.25, "code": 0.05}
    for mixed.max_steps in (1, 5, 9, 500):  # the last step has mixture_end, in a short run too
        last = train.get_mixture(mixed.max_steps - 1, mixed)
        assert last == pytest.approx({"math": 0.85, "stem": 0.1, "code": 0.05})
    assert config.load(sft.SFTConfig, [f"{ROOT}/config/sft.py"]) == sft.SFTConfig()


def test_an_evaluation_reads_no_more_than_the_run_trains_on_unless_asked(corpus_dir, tmp_path):
    for asked, steps, read in ((None, 3, 3 * 8 * 64 // 3), (None, 10**6, 2**20), (10**5, 3, 10**5)):
        cfg = train.TrainConfig(**run_settings(corpus_dir, tmp_path, eval_tokens=asked, max_steps=steps))
        train.open_corpora(cfg)
        assert cfg.eval_tokens == read


def test_the_mixture_follows_the_corpus_by_its_shares_or_else_by_size(corpus_dir, tmp_path):
    counts = json.loads((corpus_dir / "meta.json").read_text())["domains"]
    sizes = {domain: counts[domain]["train_tokens"] for domain in counts}
    assert data.Corpus(corpus_dir, 64).shares == {domain: size / sum(sizes.values()) for domain, size in sizes.items()}
    for domain, share in {"math": 1.0, "stem": 0.5, "code": 0.5}.items():
        counts[domain]["share"] = share  # relative
    cfg = train.TrainConfig(**run_settings(damage_corpus(corpus_dir, tmp_path / "named", domains=counts), "x"))
    train.open_corpora(cfg)
    assert cfg.mixture == {"math": 0.5, "stem": 0.25, "code": 0.25}


@pytest.mark.parametrize("batch_size", [8, 32, 128])
def test_every_step_is_within_one_sequence_of_its_mixture(batch_size):
    cfg = train.TrainConfig(max_steps=500, batch_size=batch_size, mixture={"math": 0.7, "stem": 0.25, "code": 0.05})
    cfg.mixture_end = {"math": 0.85, "stem": 0.1, "code": 0.05}
    table, shares = train.rows_per_step(cfg), [list(train.get_mixture(step, cfg).values()) for step in range(500)]
    excess = table - np.array(shares) * batch_size
    assert (table.sum(1) == batch_size).all() and (table >= 0).all() and np.abs(excess).max() <= 1
    assert np.abs(excess.cumsum(0)).max() <= 2  # small shares are not starved


@pytest.mark.parametrize("flag, kept", [("--frozen=alpha,norm_1", "alpha|norm_1"), ("--routing_lr=0", ROUTING)])
def test_frozen_parameters_and_those_of_rate_0_stay_as_they_are(flag, kept, run_small, tmp_path):
    run_small(flag, max_steps=4)
    torch.manual_seed(train.TrainConfig().seed)
    before, after = PolychromaticLM(ModelConfig(**SMALL)).state_dict(), load_checkpoint(tmp_path)["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if re.search(kept, name)}
    run_small(flag, "--resume", max_steps=6)


def test_centring_freezes_the_bias_that_it_cancels_whatever_else_is_frozen():
    model = small_model(router_centred=True)
    freeze(model, ("alpha",))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"blocks.{i}.ffn.{name}" for i in range(2) for name in ("alpha", "router_out.bias")}


def test_a_failed_save_leaves_the_checkpoint_before_it(run_small, tmp_path, monkeypatch):
    def save(checkpoint, file, save=torch.save):
        if checkpoint["progress"]["step"] == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    message = error_of(run_small, save_interval=1)
    assert re.match("cannot write .*ckpt.pt: No space left on device; an earlier checkpoint.* is intact", message)
    assert step_of(tmp_path) == 1 and "ckpt.partial" not in os.listdir(tmp_path)


def test_the_best_checkpoint_is_that_of_the_lowest_loss_also_after_a_resume(run_small, unbroken, tmp_path, monkeypatch):
    """Each evaluation here is as good as its table says. A checkpoint of before there was best.pt goes on, too."""
    evaluate, table = train.evaluate, {0: 0.5, 2: 3.0, 4: 2.0, 6: 2.5, 8: math.nan, 9: 1.5, 10: 1.75}
    steps = iter([0, 2, 4, 6, 6, 8, 9, 10])

    def fake(*arguments):
        loss = table[next(steps)]
        return {**evaluate(*arguments), "val": {"math": {"loss": loss, "bits_per_byte": loss}}}

    monkeypatch.setattr(train, "evaluate", fake)
    run = functools.partial(run_small, "--keep_best", eval_interval=2, save_interval=99)
    for max_steps, best in ((6, 4), (9, 9), (10, 9)):
        run("--resume", max_steps=max_steps)
        assert step_of(tmp_path / "best.pt") == best and step_of(tmp_path) == max_steps
    assert load_checkpoint(tmp_path)["progress"]["best_loss"] == 1.5
    assert "model: " in run_main(sample, str(tmp_path / "best.pt"), "--max_new_tokens=1").err
    monkeypatch.undo()
    checkpoint = load_checkpoint(unbroken)
    del checkpoint["progress"]["best_loss"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    run("--resume", max_steps=13)
    assert step_of(tmp_path / "best.pt") == 13
    del checkpoint["progress"]["rows_read"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    error = error_of(run, "--resume", max_steps=14)
    assert "was written by another version of this code" in error and error.endswith("; --overwrite starts over")
    assert f"; python eval.py {tmp_path}/ckpt.pt --data_dir=" in error_of(run, "--eval_only")
    checkpoint = load_checkpoint(unbroken)
    checkpoint["optimizer"]["param_groups"][0]["params"].pop()  # AdamW would mistake the moments of one for another's
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    error = error_of(run, "--resume", max_steps=14)
    assert "that trained other parameters" in error and error.endswith("; --overwrite starts over")
    run("--eval_only")


def test_checkpoints_are_kept_at_milestones_and_a_new_run_removes_them(run_small, tmp_path):
    run_small("--keep_every=4", "--keep_best", save_interval=99)
    kept = ["best.pt", "ckpt.pt", "ckpt_12.pt", "ckpt_4.pt", "ckpt_8.pt"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == kept
    assert [step_of(tmp_path / f"ckpt_{step}.pt") for step in (4, 8, 12)] == [4, 8, 12]
    assert_same_run(tmp_path / "ckpt_12.pt", tmp_path / "ckpt.pt")
    run_small("--overwrite", max_steps=1)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["ckpt.pt"]


def test_an_evaluation_alone_prints_the_losses_of_the_run_and_changes_no_file(unbroken, corpus_dir, tmp_path):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}
    printed = run_here(run_settings(corpus_dir, unbroken), "--eval_only", "--max_steps=5")  # changes nothing
    assert f"evaluating {unbroken}/ckpt.pt at step 12" in printed and "evaluating with" not in printed
    losses = "  ".join(f"{name} {x['bits_per_byte']:.3f}" for name, x in read_log(unbroken)[-1]["val"].items())
    assert f"step 12: val bits per byte: {losses}\n" in printed and "done" not in printed
    assert {path: path.read_bytes() for path in unbroken.iterdir()} == before
    printed = run_here(run_settings(corpus_dir, unbroken), "--eval_only", "--init_from=out/other")
    assert f"evaluating the model of {unbroken}; init_from='out/other' is ignored" in printed
    printed = run_here(settings_from(unbroken, corpus_dir, tmp_path / "new"), "--eval_only")
    assert f"step 0: val bits per byte: {losses}\n" in printed and not (tmp_path / "new").exists()
    error = error_of(run_here, run_settings(corpus_dir, tmp_path / "new"), "--eval_only")
    assert error.endswith("new/ckpt.pt; name the run to evaluate, --out_dir=, or --init_from=")


def test_a_second_signal_stops_at_once_unless_torchrun_repeats_the_first(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = StopSignal()
    for _ in range(2):  # within a second
        stop.handle(signal.SIGINT, None)
    stop.time -= 2
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_a_profile_traces_a_few_steps(run_small, tmp_path):
    assert "no trace: it starts with the sixth step" in run_small("--profile", max_steps=3)
    assert f"trace: {tmp_path}/trace.json" in run_small("--profile", "--overwrite")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{i}" for i in (5, 6, 7)}  # counted from 0


def test_non_finite_updates_are_skipped_and_never_saved(run_small, tmp_path):
    """The first update of this run ruins the weights, and the second is the first to show it."""
    run = functools.partial(run_small, lr=1e12, warmup_steps=0, eval_interval=100, save_interval=2)
    assert error_of(run) == "5 non-finite updates in a row; nothing was saved yet; lower --lr"
    *_, last = map(functools.partial(json.loads, parse_constant=pytest.fail), open(tmp_path / "log.jsonl"))  # no NaN
    assert not (tmp_path / "ckpt.pt").exists() and last["skipped"] == 4
    assert "skipped" not in run("--resume", lr=1e-3, max_steps=2)
    message = error_of(run, "--resume", max_steps=6)
    assert re.match("the run ended in non-finite updates; .* at step 2; resume with a lower --lr", message)
    error = error_of(run, "--overwrite", "--routing_lr=1e12", max_steps=1)
    assert error == "the held-out loss at the last step is not finite; start over with a lower --lr: --overwrite"


def test_a_non_finite_gradient_changes_no_weight_and_the_run_goes_on(corpus_dir, tmp_path):
    cfg = train.TrainConfig(**run_settings(corpus_dir, tmp_path))
    run = train.set_up(cfg, data.Corpus, Ranks("cpu"))
    before, rows = copy.deepcopy(run.model.state_dict()), train.next_rows(run, train.rows_per_step(cfg)[0])
    run.model.blocks[0].ffn.alpha.register_hook(lambda grad: grad * math.nan)
    loss, norm = train.optimizer_step(run.model, run, rows, 0)
    assert math.isfinite(loss) and math.isnan(norm) and not run.optimizer.state
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)
    train.count_step(run, loss, norm)
    train.count_step(run, 1.0, 1.0)
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (1, 0)


def test_a_bad_run_is_one_line_and_nothing_of_the_old_one_is_lost(unbroken, corpus_dir, chat_dir, tmp_path):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}
    for arguments, message in {
        "": "ckpt.pt exists.*--resume.*--overwrite",
        "--resume --max_steps=5": "is already at step 12, beyond max_steps, 5",
        "--resume --n_layer=3": "was trained with n_layer=2, not 3; --resume cannot change",
        "--overwrite --frozen=alhpa": "^frozen: no parameter has 'alhpa' in its name; there are embedding, .*ffn.alpha",
        "--overwrite --frozen=.": "leaves nothing to train",
    }.items():
        assert re.search(message, error_of(run_here, run_settings(corpus_dir, unbroken), *arguments.split()))
        assert {path: path.read_bytes() for path in unbroken.iterdir()} == before
    message = error_of(run_here, run_settings(chat_dir, tmp_path / "new"))
    assert message == f"{chat_dir} holds conversations; train on it with sft.py"
    (tmp_path / "file").write_text("")
    message = error_of(run_here, run_settings(corpus_dir, tmp_path / "file" / "run"))
    assert f"cannot write {tmp_path}/file/run: Not a directory; choose another folder" in message


def test_a_run_in_a_folder_without_a_checkpoint_keeps_what_it_finds(run_small, tmp_path):
    run_small(max_steps=2)
    log, results = (tmp_path / "log.jsonl").read_text(), tmp_path / "eval.json"
    (tmp_path / "ckpt.pt").unlink()
    results.write_text("{}")
    run_small("--resume", max_steps=1)
    assert (tmp_path / "log.old.jsonl").read_text() == log and results.exists()
    run_small("--overwrite", max_steps=1)
    assert not results.exists()


def test_a_resumed_run_says_what_has_changed_and_nothing_else(run_small, corpus_dir, tmp_path):
    run_small(max_steps=1)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # a line that a kill cut short
    assert "resuming with" not in run_small("--resume", max_steps=1)
    assert [x["step"] for x in read_log(tmp_path) if "val" in x] == [0, 1]  # the last evaluation is repeated
    printed = run_small("--resume", max_steps=2, mixture={"math": 1.0})
    assert sorted(re.findall("resuming with (.*?)=", printed)) == ["max_steps", "mixture"]
    assert "has changed" not in printed
    assert [x["step"] for x in read_log(tmp_path) if "val" in x] == [0, 1, 2]  # or kept


def test_a_resumed_run_says_that_its_corpus_has_changed(corpus_dir, tmp_path):
    folder = damage_corpus(corpus_dir, tmp_path / "tiny")  # a copy
    settings, path = run_settings(folder, tmp_path / "run", max_steps=1), folder / "meta.json"
    run_here(settings)
    meta = json.loads(path.read_text())
    meta["domains"]["math"]["val_bytes"] += 1
    path.write_text(json.dumps(meta))
    assert f"resuming on other data: {folder} has changed" in run_here(settings, "--resume")


def test_a_bad_fine_tuning_is_one_line(unbroken, corpus_dir, chat_dir, tmp_path):
    for flag, message in {
        "--init_from=": "init_from is empty; give it a value, or leave it out",
        f"--data_dir={corpus_dir}": "has no conversations; to make some: python prepare_data.py tiny_sft",
        "--n_layer=3": "has n_layer=2, not 3",
        "--block_size=32": "too many for block_size 32; prepare it again with --max_length=33",
    }.items():
        assert message in error_of(run_here, settings_from(unbroken, chat_dir, tmp_path / "run"), flag, script=sft)


def test_a_missing_embedded_corpus_is_prepared_by_one_process_and_no_other_corpus_is(unbroken, tmp_path, monkeypatch):
    rows_of_256 = {"block_size": 256, "max_steps": 1, "sample_tokens": 0}
    settings = settings_from(unbroken, tmp_path / "data/tiny_sft", tmp_path / "run", **rows_of_256)
    done = run_script(*command_of(settings, processes=2, script="sft.py"))
    assert done.stdout.count("tiny_sft yet: preparing it") == 1 and "\ndone; " in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)
    for name, command in {"data/text": "text --source=input.txt", "x/tiny": "tiny --data_dir=x"}.items():
        message = error_of(run_here, {**settings, "data_dir": name, "out_dir": "new"}, script=sft)
        assert message == f"no data in {name}; make it: python prepare_data.py {command}"
    shutil.rmtree("data")
    message = error_of(run_main, sft, f"{ROOT}/config/tiny_sft.py")
    assert message == "no checkpoint at out/tiny: no such file or folder; train one: python train.py config/tiny.py"
    assert not Path("data").exists()  # found before the data is prepared


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_damaged_checkpoint_is_one_line(unbroken, run_small, tmp_path):
    content, path = (unbroken / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    half, rest = content[: len(content) // 2], content[len(content) // 2 :]
    for damaged in (b"", half, half + bytes([rest[0] ^ 16]) + rest[1:]):
        path.write_bytes(damaged)
        assert f"{path} is damaged or not a checkpoint" in error_of(run_small, "--resume")
    for wrong, message in (
        ({"weights": torch.zeros(3)}, "is not a checkpoint of a model"),
        ({"model": {}}, "does not hold a model of this project: it lacks model_config"),
        ({"model": MakesFolder(tmp_path / "made")}, "is damaged or not a checkpoint (Weights only load failed"),
    ):
        torch.save(wrong, path)
        assert f"{path} {message}" in error_of(from_pretrained, path)
        assert str(path) in error_of(run_small, "--resume")
    assert not (tmp_path / "made").exists()  # no code in a checkpoint runs


def test_training_needs_neither_a_compiler_nor_the_optional_packages(corpus_dir, tmp_path):
    packages = ("tiktoken", "datasets", "tqdm", "safetensors", "transformers", "matplotlib")
    # flex, as on a GPU: without a compiler, documents are kept apart by a mask
    flex = "model.uses_flex = lambda model, uses_flex=model.uses_flex: setattr(model, 'flex', True) or uses_flex(model)"
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); import model, train; {flex}; train.main()"
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    settings = run_settings(corpus_dir, tmp_path, max_steps=1, compile=True)
    done = run_script("-c", code, *flags(settings), env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("continuing uncompiled.*torch.compile does not work here", done.stdout)) == 1
    assert "no samples: " in done.stdout
    done = run_script("-c", code.replace("train.main()", "train.settings.run(train.main)"), "--data_dir=data/absent")
    assert_one_line(done, "no data in data/absent; prepare_data.py makes text, tiny")


# ---------------------------------------------------------------------------------------------------------- 11. imports


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_one_way():
    """Scripts import common/, and common/ imports model.py. extras/ is imported where a flag asks for it."""
    paths = [path for folder in ("", "common", "extras") for path in (ROOT / folder).glob("[!_]*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    trees = {name: ast.parse(path.read_text()) for name, path in names.items() if "test_" not in name}
    graph = {name: imports_of(ast.walk(tree)) & trees.keys() for name, tree in trees.items()}
    assert graph["model"] == set()
    for name, imported in graph.items():
        in_functions = [node for node in ast.walk(trees[name]) if isinstance(node, ast.FunctionDef)]
        at_top = imports_of(set(ast.walk(trees[name])) - {node for f in in_functions for node in ast.walk(f)})
        scripts = {module for module in imported if "." not in module} - {"model"}
        if not name.startswith("extras."):
            assert scripts == ({"train"} if name == "sft" else set()), name
            assert not any(module.startswith("extras.") for module in at_top), name
        if name.startswith("common."):
            assert not any(module.startswith("extras.") for module in imported), name
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


# -------------------------------------------------------------------------------------------------------- the documents

README, HACKING = (ROOT / "README.md").read_text(), (ROOT / "docs/hacking.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", HACKING, re.M))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def apply_diff(diff: str, folder: Path):
    """Apply a diff without line numbers: the old lines of each hunk stand in their file exactly once."""
    for name, hunks in re.findall(r"^--- (\S+)\n\+\+\+ \1\n((?:(?!--- ).*\n)*)", diff, re.M):
        text = (folder / name).read_text()
        for hunk in re.split(r"^@@ .*\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(old) == 1, f"a diff changes lines that {name} does not have:\n{old}"
            text = text.replace(old, new)
        (folder / name).write_text(text)


@pytest.fixture
def changed(request, tmp_path, monkeypatch) -> SimpleNamespace:
    """Our modules with a change of docs/hacking.md, in a working directory of their own, and its command's settings."""
    section, names = SECTIONS[request.param], ("model", "train", "prepare_data")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        monkeypatch.delitem(sys.modules, name)
    apply_diff(*fenced(section, "diff"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for command in re.findall("^python train.py (.*)", section, re.M):
        modules.cfg = config.load(modules.train.TrainConfig, shlex.split(command))
    return modules


@pytest.mark.parametrize("changed", ["A new activation"], indirect=True)
def test_the_documented_activations_learn(changed):
    model = changed.model.PolychromaticLM(changed.model.ModelConfig(**SMALL | {"activations": changed.cfg.activations}))
    changed.cfg.lr = 1e-2
    optimizer = train.configure_optimizer(model, changed.cfg)
    tokens, x = random_tokens(2, 17), torch.randn(9)
    *_, sine, snake = model.blocks[0].ffn.sigma
    torch.testing.assert_close(torch.stack([sine(x), snake(x)]), torch.stack([x.sin(), x + x.sin() ** 2]))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    assert all(block.ffn.sigma[5].a != 1 for block in model.blocks) and snake is not model.blocks[1].ffn.sigma[5]


@pytest.mark.parametrize("changed", ["A new router context"], indirect=True)
@torch.no_grad()
def test_the_documented_router_context_is_an_average_of_the_past_and_exact_with_the_cache(changed):
    ema = changed.model.ROUTER_CONTEXTS[changed.cfg.router_context]
    u, doc_start, t = torch.randn(2, 300, 5), torch.full((2, 300), -1), torch.arange(300)
    doc_start[1, 100:] = 100
    visible = (t[:, None] >= t) & (t >= doc_start[:, :, None])
    weight = 0.99 ** (t[:, None] - t) * visible  # [B, T, T]
    torch.testing.assert_close(ema(u, doc_start, None), weight @ u / weight.sum(-1, keepdim=True))
    sums, parts = torch.zeros(2, 1, 6, dtype=torch.float64), []
    for part in u.split([290, *[1] * 10], dim=1):
        parts.append(ema(part, torch.full(part.shape[:2], -1), sums))
    torch.testing.assert_close(torch.cat(parts, dim=1), ema(u, torch.full((2, 300), -1), None))


@pytest.mark.parametrize("changed", ["Another rule for mixing"], indirect=True)
def test_the_documented_mixture_is_one_hot_with_the_gradient_of_the_soft_one(changed):
    soft, hard = random_layer(16, 24), changed.model.PolyGLU(16, 24, router_hidden=8, gumbel=False)
    hard.load_state_dict(soft.state_dict())
    x, weight = torch.randn(2, 7, 16), torch.randn(4, 2, 7, 24)
    weights = (torch.stack(layer.unnormalized_weights(x)) for layer in (soft, hard))
    soft_g, hard_g = (e / e.sum(0) for e in weights)
    assert torch.equal(hard_g, F.one_hot(soft_g.argmax(0), 4).movedim(-1, 0).float())
    ((soft_g + hard_g) * weight).sum().backward()
    torch.testing.assert_close(*({name: p.grad for name, p in layer.named_parameters()} for layer in (soft, hard)))
    assert hard.alpha.grad.abs().min() > 0


@pytest.mark.parametrize("changed", ["Another schedule of tau"], indirect=True)
def test_the_documented_schedule_falls_by_one_factor(changed):
    cfg = changed.train.TrainConfig(max_steps=1000)
    taus = [changed.train.get_tau(step, cfg) for step in range(1001)]
    assert (taus[0], taus[500], taus[-1]) == pytest.approx((1, 0.1**0.5, 0.1))
    assert [b / a for a, b in itertools.pairwise(taus)] == pytest.approx([0.1**0.001] * 1000)


@pytest.mark.parametrize("changed", ["Another domain"], indirect=True)
def test_the_documented_domain_is_prepared_and_trained_on(changed, monkeypatch):
    notes = "".join(f"Note {i} says what {i * i} is.\nIt is a square.\n\n\n" for i in range(500))
    for name in ("stem_documents", "code_documents"):  # the real ones take seconds
        monkeypatch.setattr(embedded, name, lambda: (f"{i:099}" for i in range(200)))
    (arguments,) = re.findall("^python prepare_data.py (.*)", SECTIONS["Another domain"], re.M)
    for text in (notes.upper(), notes):  # of one length: the second one replaces the first
        Path("notes.txt").write_text(text)
        run_here({}, *shlex.split(arguments), "--math_mb=0.05", script=changed.prepare_data)
    train.open_corpora(changed.cfg)
    assert list(changed.cfg.mixture.values()) == pytest.approx([0.4, 0.2, 0.2, 0.2])
    for paragraphs in split_texts(Path("data/tiny/notes")).values():
        assert len(paragraphs) > 3 and all(paragraph in notes for paragraph in paragraphs)


def test_the_documented_layer_reads_packed_documents_and_decodes_with_its_sums():
    (code,) = fenced(HACKING, "python")
    exec(code, {"torch": torch, "PolyGLU": PolyGLU})


NOT_RUN = (  # commands of the README, by how they begin: they need the network, the hub or a GPU
    "python3 -m venv .venv && .venv/bin/pip install torch", "python prepare_data.py pretrain", "python sample.py Qwen/",
    "python eval.py tyler", "python train.py config/upcycle.py", "python train.py config/pretrain.py",
    "torchrun --nproc_per_node=8", "bash extras/speedrun.sh pretrain",
)  # fmt: skip
RUN_ELSEWHERE = ("bash extras/speedrun.sh tiny",)  # extras/test_extras.py
CUT = "--max_steps=2 --eval_tokens=512 --sample_tokens=8 --compile=False".split()  # a training to seconds


def copy_of_repository(folder: Path) -> Path:
    """The files of this repository, without what was made in it."""
    made = shutil.ignore_patterns(".*", "__pycache__", "data", "out")
    return shutil.copytree(ROOT, folder, ignore=made, dirs_exist_ok=True)


def test_every_command_of_the_readme_runs_as_printed(tmp_path, monkeypatch):
    """In order and in an empty copy of the repository. Flags are added that cut each to seconds.

    In the commands that install, pip finds the packages of this Python instead of downloading them, and of the tests
    one runs.
    """
    monkeypatch.chdir(copy_of_repository(tmp_path))
    commands = re.findall(r"^    ((?:python|pip|bash|torchrun|cp).*)$", README, re.M)
    assert all(any(command.startswith(start) for command in commands) for start in (*NOT_RUN, *RUN_ELSEWHERE))
    packages = os.pathsep.join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    installing = {"PYTHONPATH": packages, "PIP_NO_INDEX": "1", "PYTEST_ADDOPTS": "-k test_init_is_the_papers"}
    installing["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    scripts = {f"{script.__name__}.py": script for script in (prepare_data, train, sft, sample, evaluate)}
    cut = {"train.py": CUT, "sft.py": CUT, "sample.py": ["--max_new_tokens=8"], "eval.py": ["--max_tokens=512"]}
    cut |= {"--problems": ["--limit=1"]}
    (tmp_path / "input.txt").write_text("".join(f"Line {i} of my own text.\n\n" for i in range(2000)))
    for command in commands:
        if command.startswith((*NOT_RUN, *RUN_ELSEWHERE)):
            continue
        words = shlex.split(command)
        added = [flag for word in words for flag in cut.get(word, [])]
        if words[0] == "python3":
            environment = {name: value for name, value in os.environ.items() if "XDIST" not in name} | installing
            shell = ["bash", "-c", f"{command} {shlex.join(added)}"]
            done = subprocess.run(shell, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert re.search("^step 2: sample: |^1 passed", done.stdout, re.M), done.stdout
        else:
            with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
                run_main(scripts[words[1]], *words[2:], *added, stdin="What is 1 + 2?\n")
    assert len(list(Path("out").glob("*/ckpt.pt"))) >= 5 and Path("out/tiny_sft/eval.json").exists()


def test_every_documented_change_is_tested():
    titles = {title for title, section in SECTIONS.items() if fenced(section, "diff")}
    tests = Path(__file__).read_text() + (ROOT / "extras/test_nanogpt.py").read_text()
    tested = re.findall(r'(?:"changed", |SECTIONS)\["(.+?)"\]', tests)
    assert titles == set(tested) and len(fenced(HACKING, "python")) == 1
