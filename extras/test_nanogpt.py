"""The diff of nanoGPT in docs/hacking.md, on a stand-in: nanoGPT's names and structure, in our own, fewer words.

To try it on nanoGPT itself, apply the diff to a clone by hand; each of its old lines stands there exactly once.
"""

import functools
import importlib
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from test_model import ROOT, SECTIONS, apply_diff, fenced, run_script

MODEL = """
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.n_embd, bias=config.bias) for _ in range(2))
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 32
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 48
    bias: bool = False


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte = nn.Embedding(config.vocab_size, config.n_embd),
            wpe = nn.Embedding(config.block_size, config.n_embd),
            h = nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f = nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for pn, p in self.named_parameters():
            if pn.endswith('c_proj.weight'):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        param_dict = {pn: p for pn, p in self.named_parameters()}
        decay_params = [p for n, p in param_dict.items() if p.dim() >= 2]
        nodecay_params = [p for n, p in param_dict.items() if p.dim() < 2]
        optim_groups = [
            {'params': decay_params, 'weight_decay': weight_decay},
            {'params': nodecay_params, 'weight_decay': 0.0},
        ]
        return torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
        return idx
"""

TRAIN = """
import math
import sys
from ast import literal_eval

import numpy as np
import torch

from model import GPTConfig, GPT

init_from, out_dir = 'scratch', 'out'
batch_size, block_size, gradient_accumulation_steps = 4, 16, 2
learning_rate, min_lr, max_iters, warmup_iters, lr_decay_iters = 1e-2, 1e-3, 40, 4, 80
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0
eval_interval, eval_iters = 20, 4
for argument in sys.argv[1:]:
    name, value = argument.removeprefix('--').split('=')
    globals()[name] = literal_eval(value)

torch.manual_seed(1337)

def get_batch(split):
    data = np.fromfile(f'data/{split}.bin', dtype=np.uint16).astype(np.int64)
    ix = torch.randint(len(data) - block_size, (batch_size,))
    return [torch.stack([torch.from_numpy(data[i + s:i + s + block_size]) for i in ix]) for s in (0, 1)]

iter_num, best_val_loss = 0, 1e9
model_args = dict(block_size=block_size)
if init_from == 'resume':
    checkpoint = torch.load(f'{out_dir}/ckpt.pt')
    model_args, iter_num, best_val_loss = (checkpoint[name] for name in ('model_args', 'iter_num', 'best_val_loss'))
model = GPT(GPTConfig(**model_args))
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2))
if init_from == 'resume':
    model.load_state_dict(checkpoint['model'])
    optimizer.load_state_dict(checkpoint['optimizer'])

@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ['train', 'val']:
        out[split] = sum(model(*get_batch(split))[1].item() for _ in range(eval_iters)) / eval_iters
    model.train()
    return out

def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = min(1.0, (it - warmup_iters) / (lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)

X, Y = get_batch('train')
raw_model = model
while True:

    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr
    if iter_num % eval_interval == 0:
        losses = estimate_loss()
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if losses['val'] < best_val_loss and iter_num > 0:
            best_val_loss = losses['val']
            checkpoint = {
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model_args,
                'iter_num': iter_num, 'best_val_loss': best_val_loss,
            }
            torch.save(checkpoint, f'{out_dir}/ckpt.pt')
    for micro_step in range(gradient_accumulation_steps):
        logits, loss = model(X, Y)
        X, Y = get_batch('train')
        (loss / gradient_accumulation_steps).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    if iter_num > max_iters:
        break
"""

SAMPLE = """
import torch

from model import GPTConfig, GPT

checkpoint = torch.load('out/ckpt.pt')
model = GPT(GPTConfig(**checkpoint['model_args']))
model.load_state_dict(checkpoint['model'])
model.eval()
print(model.generate(torch.tensor([[3]]), 8).tolist())
"""


@pytest.fixture
def nanogpt(tmp_path, monkeypatch) -> Path:
    """The stand-in with the diff, and a corpus in which every token follows from the one before."""
    for name, text in {"model.py": MODEL, "train.py": TRAIN, "sample.py": SAMPLE}.items():
        (tmp_path / name).write_text(text)
    (diff,) = fenced(SECTIONS["The layer in nanoGPT"], "diff")
    assert len(re.findall(r"^\+(?!\+\+ )", diff, re.M)) == 7
    apply_diff(diff, tmp_path)
    shutil.copy(ROOT / "model.py", tmp_path / "polyglu.py")
    for folder in ("data", "out"):
        (tmp_path / folder).mkdir()
    tokens = functools.reduce(lambda found, _: [*found, (5 * found[-1] + 3) % 32], range(999), [3])
    for split in ("train", "val"):
        np.array(tokens, np.uint16).tofile(tmp_path / f"data/{split}.bin")
    return tmp_path


def test_nanogpt_with_the_documented_layer_trains_saves_samples_and_resumes(nanogpt):
    def losses(*flags: str) -> dict[int, float]:
        done = run_script("train.py", *flags, cwd=nanogpt)
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"^step (\d+): .* val loss (\S+)", done.stdout, re.M)
        return {int(step): float(loss) for step, loss in printed}

    first = losses("--max_iters=40")
    assert list(first) == [0, 20, 40] and first[0] > 3.3 and first[40] < 1.5
    saved = torch.load(nanogpt / "out/ckpt.pt")
    assert saved["iter_num"] == 40
    assert [saved["model"][f"transformer.h.{i}.mlp.tau"].item() for i in (0, 1)] == pytest.approx([0.1, 0.1])
    resumed = losses("--max_iters=80", "--init_from='resume'")
    assert list(resumed) == [40, 60, 80] and abs(resumed[40] - first[40]) < 0.5 and resumed[80] < 0.3
    assert torch.load(nanogpt / "out/ckpt.pt")["model"]["transformer.h.0.mlp.tau"] == pytest.approx(0.1)
    done = run_script("sample.py", cwd=nanogpt)
    assert done.stdout == "[[3, 18, 29, 20, 7, 6, 1, 8, 11]]\n", done.stderr


def test_nanogpt_initializes_and_decays_the_documented_layer_as_its_own(nanogpt, monkeypatch):
    monkeypatch.syspath_prepend(nanogpt)
    monkeypatch.delitem(sys.modules, "model")
    monkeypatch.delitem(sys.modules, "polyglu", raising=False)
    nano = importlib.import_module("model")
    torch.manual_seed(0)
    config = nano.GPTConfig(n_layer=8, n_embd=96)
    model = nano.GPT(config)
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95)).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[p] == (0 if re.search("alpha|beta|bias|ln_", name) else 0.1), name
        if p.dim() == 2 and "alpha" not in name:
            scale = math.sqrt(16) if re.search("c_proj|w_down", name) else 1
            assert p.std().item() == pytest.approx(0.02 / scale, rel=0.1), name
    weights = [p for name, p in model.transformer.h[0].mlp.named_parameters() if name.startswith("w_")]
    assert sum(p.numel() for p in weights) == 2 * 4 * 96**2  # those of nanoGPT's MLP
