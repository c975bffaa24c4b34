"""Tests for one GPU of 16 GB or more: about five minutes. They end with a table in Markdown for the README.

python -m pytest -q -s extras/test_cuda.py

POLYGLU_TEST_DEVICE=cpu runs the same code on a CPU, with small shapes; test_extras.py does so.
"""

import functools
import gc
import math
import os
import re
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import train
from common.data import Corpus
from common.generate import StepGraph, generate, prepare_weights
from common.run import Ranks, flops_per_token, peak_flops
from common.settings import load
from extras import bench
from model import ModelConfig, PolychromaticLM, chunk_loss, chunked_cross_entropy, set_tau
from test_model import ROOT, SMALL, command_of, losses_of, run_here, run_settings, signal_at

pytest_plugins = ["test_model"]  # its fixtures

DEVICE = torch.device(os.environ.get("POLYGLU_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU with CUDA")

if ON_GPU:
    SHAPE = dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=256, head_dim=64, d_ff=768, router_hidden=32)
    DOCUMENTS = [200, 1, 3, 308]  # lengths in a row
    LOSS = 2048, 1024, 151_669  # tokens, width, vocabulary
    PRETRAINING = [f"{ROOT}/config/pretrain.py", "--batch_size=8"]  # one micro-batch a step
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        PRETRAINING += ["--n_layer=4", "--batch_size=2", "--micro_batch_size=2"]
else:
    SHAPE = {}
    DOCUMENTS = [100, 1, 3, 56]
    LOSS = 300, 64, 1000
    PRETRAINING = [f"{ROOT}/config/tiny.py", "--n_layer=1", "--block_size=64"]
SHAPE = {**SMALL, **SHAPE, "block_size": sum(DOCUMENTS)}
B = 2  # rows in a micro-batch
BACKEND = "inductor" if ON_GPU else "aot_eager"  # C++ takes too long to compile
TABLE = []


@pytest.fixture(scope="module", autouse=True)
def print_results():
    yield
    triton = getattr(sys.modules.get("triton"), "__version__", None)
    bench.print_table(f"{bench.describe_machine(DEVICE)}, CUDA {torch.version.cuda}, Triton {triton}", TABLE)


@pytest.fixture(autouse=True)
def clean_slate():
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")  # not TF32


def add_row(name: str, result: str):
    TABLE.append({"": name, "result": result})


# ------------------------------------------------------------------------------------------------------------ exactness
# Each result is computed three times: in float32 by plain code (eager, dense masks, no cache), in bfloat16 by plain
# code, and in bfloat16 by the code under test. A bfloat16 is off by up to 2**-9, and a gradient has been rounded dozens
# of times. How far that takes it from float32 depends on the parameter: 0.5% to 6% in this model. The plain code
# measures it, so no tolerance is guessed. Code that rounds elsewhere ends about as far away: on a CPU, 0.7 to 1.5 times
# as far. Twice as far is allowed, and 2**-7 for results of a few numbers, where the plain code may be right by luck.
# Faults are larger: without doc_ids, packed documents are over 30% off.


def float32_plain_and_ours(function) -> list[dict[str, list[Tensor]]]:
    """The results of function(is_ours): in float32 by plain code, in bfloat16 by plain code, in bfloat16 by ours."""
    results = []
    for dtype, is_ours in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            results.append(function(is_ours))
    return results


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference, relative to that of the exact values."""
    found, exact = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (found, exact))
    return ((found - exact).norm() / exact.norm()).item()


def check_exactness(name: str, exact: dict, plain: dict, ours: dict):
    """Our results are as close to the exact ones as plain code's are."""
    errors = {key: (distance(ours[key], exact[key]), distance(plain[key], exact[key])) for key in exact}
    too_large = {key: error for key, error in errors.items() if not error[0] < 2 * error[1] + 2**-7}
    assert not too_large
    error, of_plain = max(errors.values())
    add_row(name, f"{error:.2%} from float32; plain bfloat16 code {of_plain:.2%}")


def random_model() -> PolychromaticLM:
    """A model with weights large enough that its routing and attention differ from token to token."""
    torch.manual_seed(0)
    model = PolychromaticLM(ModelConfig(**SHAPE))
    for p in model.parameters():
        p.data += torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.5 * p.size(-1) ** -0.5)
    set_tau(model, 0.1)
    return model.to(DEVICE)


def random_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and doc_ids [B, T]: the documents in order, and in reverse."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(SHAPE["vocab_size"], (2, B, SHAPE["block_size"]))
    targets[:, ::5] = -1
    index = torch.arange(len(DOCUMENTS))
    rows = [index.repeat_interleave(torch.tensor(lengths)) for lengths in (DOCUMENTS, DOCUMENTS[::-1])]
    return tokens.to(DEVICE), targets.to(DEVICE), torch.stack(rows).to(DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
@torch._inductor.config.patch(fallback_random=True)  # the routing noise of eager code
def test_flexattention_and_compiled_code_agree_with_dense_masks_and_eager_code(compiled, monkeypatch):
    """In training with one seed's noise, gradients included, and in evaluation."""
    monkeypatch.setattr(PolychromaticLM, "is_compiled", True)  # eager blocks may use FlexAttention, compiled alone
    flex = ON_GPU or not compiled
    tokens, targets, doc_ids = random_batch()

    def results(is_ours: bool) -> dict[str, list[Tensor]]:
        model = random_model()
        model.requires_grad_(ON_GPU or not flex)  # FlexAttention has no backward pass on a CPU
        model.flex = flex and is_ours
        if compiled and is_ours:
            model.compile(backend=BACKEND)
        torch.manual_seed(2)
        loss = model.train()(tokens, targets, doc_ids)
        with torch.no_grad():
            evaluated, logits = model.eval()(tokens, targets, doc_ids), model(tokens, doc_ids=doc_ids)
        found = {"loss": [loss], "loss in evaluation": [evaluated], "logits": [logits]}
        if loss.requires_grad:
            loss.backward()
            for name, p in model.named_parameters():
                kind = re.sub(r"\.\d+\.", ".", name)  # the same in all blocks
                found.setdefault(kind, []).append(p.grad)
        return found

    name = " and ".join(["FlexAttention"] * flex + ["compiled blocks"] * compiled)
    check_exactness(f"{name}: losses, logits, gradients", *float32_plain_and_ours(results))


def test_the_loss_in_chunks_is_the_plain_loss():
    torch.manual_seed(0)
    N, d, V = LOSS
    hidden, weight = torch.randn(N, d, device=DEVICE), torch.randn(V, d, device=DEVICE) / 16
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[::5] = -1
    body = torch.compile(chunk_loss, dynamic=False, backend=BACKEND)

    def results(is_ours: bool) -> dict[str, list[Tensor]]:
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if is_ours:
            loss = chunked_cross_entropy(*inputs, targets, math.ceil(N / 3), body)
        else:
            loss = F.cross_entropy(F.linear(*inputs), targets, ignore_index=-1)
        d_hidden, d_weight = torch.autograd.grad(loss, inputs)
        return {"loss": [loss.detach()], "d_hidden": [d_hidden], "d_weight": [d_weight]}

    check_exactness(f"loss in 3 chunks of {V:,} tokens: value, gradients", *float32_plain_and_ours(results))


@torch.no_grad()
def test_packed_documents_give_the_logits_of_each_alone(monkeypatch):
    monkeypatch.setattr(PolychromaticLM, "is_compiled", True)  # as above
    model, (tokens, _, doc_ids) = random_model().eval(), random_batch()
    model.flex = True

    def results(is_packed: bool) -> dict[str, list[Tensor]]:
        if is_packed:
            return {"logits": [model(tokens, doc_ids=doc_ids)[0]]}
        return {"logits": [model(document)[0] for document in tokens[:1].split(DOCUMENTS, dim=1)]}

    exact, plain, ours = float32_plain_and_ours(results)
    check_exactness("packed documents, each as if alone: logits", exact, plain, ours)
    assert distance([model(tokens)[0]], exact["logits"]) > 0.3  # without doc_ids


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_decoding_with_the_cache_gives_the_logits_of_the_full_forward_also_in_padded_rows(compiled):
    model, steps = random_model().eval(), []
    prompts = [row[:length] for row, length in zip(random_batch()[0], (60, 37))]
    if compiled:
        model.compile(backend=BACKEND)
    hook = model.register_forward_hook(lambda model, inputs, logits: steps.append(logits[:, -1]))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        written = torch.stack(list(generate(model, prompts, 24, temperature=0)), dim=1)
    hook.remove()
    rows = [torch.cat(row)[None, :-1] for row in zip(prompts, written)]

    def results(is_cached: bool) -> dict[str, list[Tensor]]:
        if is_cached:
            return {"logits": list(torch.stack(steps, dim=1))}
        with torch.compiler.set_stance("force_eager"):
            return {"logits": [model(row)[0, -24:] for row in rows]}

    name = f"decoding with the cache, padded rows{', compiled' * compiled}: logits"
    check_exactness(name, *float32_plain_and_ours(results))


@torch.no_grad()
@pytest.mark.skipif(not ON_GPU, reason="a CUDA graph")
def test_replayed_decoding_steps_write_what_ordinary_ones_do(monkeypatch):
    model, prompts = random_model().eval(), [row[:n] for row, n in zip(random_batch()[0], (60, 37))]
    prepare_weights(model, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        replayed = torch.stack(list(generate(model, prompts, 24, temperature=0)))
        monkeypatch.setattr(StepGraph, "fits", lambda model: False)
        assert torch.equal(replayed, torch.stack(list(generate(model, prompts, 24, temperature=0))))


# ----------------------------------------------------------------------------------------------------------------- runs


def settings_here(corpus_dir, out_dir) -> dict:
    machine = {"device": str(DEVICE), "dtype": "bfloat16", "compile": None}
    return run_settings(corpus_dir, out_dir, **SHAPE, **machine, micro_batch_size=B, lr=3e-4, sample_tokens=0)


def check_steps(name: str, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]):
    """The losses and gradient norms are the same, up to the order in which a GPU adds numbers.

    1% is allowed. In these 12 steps, at this learning rate, weights that start 1e-6 off move a norm by 0.02%. (At ten
    times the rate they move it by 4%.) A resumed run without AdamW's moments is 58% off.
    """
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)
    difference = ((ours - theirs) / theirs).abs().max().item()
    add_row(f"{name}: losses, gradient norms", f"{difference:.1e} apart" if difference else "the same bits")


def test_one_nccl_rank_takes_the_steps_of_a_run_without_torchrun(corpus_dir, tmp_path):
    def take_steps(is_distributed: bool) -> list[tuple[float, float]]:
        cfg = train.TrainConfig(**settings_here(corpus_dir, tmp_path))
        run = train.set_up(cfg, Corpus, Ranks(cfg.device))
        run.ranks.world_size = 2 if is_distributed else 1  # train.py does not distribute over one rank
        model = train.compile_and_distribute(run)
        assert isinstance(model, DistributedDataParallel) == is_distributed
        assert run.ranks.sum(1.5, 2.0) == [1.5, 2.0]
        run.ranks.world_size = 1
        model.train()
        n_rows = train.rows_per_step(cfg)
        return [train.optimizer_step(model, run, train.next_rows(run, n_rows[step]), step) for step in range(6)]

    backend = "nccl" if ON_GPU else "gloo"
    alone = take_steps(is_distributed=False)
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distributed = take_steps(is_distributed=True)
    finally:
        torch.distributed.destroy_process_group()
    check_steps(f"one {backend} rank, and none", distributed, alone)


def test_a_killed_and_resumed_run_takes_the_steps_of_an_unbroken_one(corpus_dir, tmp_path):
    unbroken, killed = (settings_here(corpus_dir, tmp_path / name) for name in ("unbroken", "killed"))
    run_here(unbroken)
    status, output = signal_at(command_of(killed), "step +5/", signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    assert re.search("^resumed .* at step [369]$", run_here(killed, "--resume"), re.M)
    logs = (losses_of(tmp_path / name) for name in ("killed", "unbroken"))
    check_steps("killed and resumed, and unbroken", *([(x["loss"], x["grad_norm"]) for x in log] for log in logs))


# ---------------------------------------------------------------------------------------------------------------- speed


def measure(cfg: train.TrainConfig) -> float:
    """Train for ten steps and decode; adds rows of the speed. Returns the milliseconds of a step."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    model = PolychromaticLM(cfg.model_config()).to(DEVICE)
    model.compile(backend=BACKEND)
    step = bench.training_step(model, cfg, DEVICE, torch.autocast(DEVICE.type, torch.bfloat16))
    first_loss, _ = step()
    step_ms = bench.time_interleaved({"": step}, 10, DEVICE)[""]["ms"]
    assert step()[0] < first_loss
    rate = 1e3 * cfg.micro_batch_size * cfg.block_size / step_ms
    mfu = rate * flops_per_token(model) / peak_flops(DEVICE)
    memory = torch.cuda.max_memory_allocated() / 2**30
    K, n_new, prompt = len(cfg.activations), 32, torch.zeros(1, 16, dtype=torch.int64, device=DEVICE)
    shape = f"{cfg.n_layer} layers of {cfg.n_embd}, {cfg.micro_batch_size} x {cfg.block_size:,} tokens"
    add_row(f"training, K = {K}: {shape}", f"{rate:,.0f} tokens/s, MFU {mfu:.1%}, {memory:.1f} GiB")
    decode = functools.partial(bench.decode, model.bfloat16(), prompt, n_new)
    with torch.compiler.set_stance("force_eager"):
        decode_ms = bench.time_interleaved({"": decode}, 1, DEVICE)[""]["ms"]
    mode = "a CUDA graph of eager code" if ON_GPU else "eager"
    add_row(f"decoding, K = {K}: one row, {mode}", f"{1e3 * n_new / decode_ms:,.0f} tokens/s")
    return step_ms


def test_pretraining_runs_with_one_activation_and_with_four():
    cfg, step_ms = load(train.TrainConfig, PRETRAINING), []
    for activations in bench.VARIANTS.values():
        cfg.activations = activations
        step_ms.append(measure(cfg))
        gc.collect()  # before the next one: its peak of memory is its own
    add_row("time of a training step, K = 4 / K = 1", f"{step_ms[1] / step_ms[0]:.2f}")
