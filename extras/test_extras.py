"""Tests of extras/. The helpers and fixtures that they share with the other tests are in test_model.py."""

import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common.settings as config
import eval as evaluate
import sample
import train
from common import data
from common import tokenizer as tokenizers
from common.routing import routing_stats
from common.run import Ranks, build_model, read_log
from common.weights import from_pretrained, load_weights, save_pretrained, starting_model, upcycle
from extras import bench, embedded, study
from model import ACTIVATIONS, ModelConfig, set_tau
from test_model import (
    OUR_CODE,
    ROOT,
    SAMPLE,
    assert_same_run,
    damage_corpus,
    error_of,
    fenced,
    generated,
    messages,
    prepare,
    random_tokens,
    run_here,
    run_settings,
    settings_from,
    small_model,
    split_texts,
    write_documents,
    write_jsonl,
)

pytest_plugins = ["test_model"]  # its fixtures

# --------------------------------------------------------------------------------------------------- weights in and out


def random_qwen3(folder: Path, shard: str = "1GB", **settings):
    """A small random Qwen3 as transformers saves it; the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | settings)).eval()
    for norm in (p for p in model.parameters() if p.dim() == 1):
        nn.init.normal_(norm, 1, 0.2)  # unlike each other
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied, shard", [(True, "1GB"), (False, "20KB")])
def test_a_qwen3_loads_and_is_the_same_function(tied, shard, tmp_path):
    theirs = random_qwen3(tmp_path, shard, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours, tokens = from_pretrained(tmp_path).eval(), random_tokens(2, 40)
    assert ours.config.tied_head == tied and ours.config.activations == ("silu",)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    greedy = theirs.generate(tokens[:1, :8], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated(ours, tokens[:1, :8], 20) == greedy[:, 8:].tolist()
    save_pretrained(ours, tmp_path / "again")
    assert torch.equal(ours(tokens), from_pretrained(tmp_path / "again").eval()(tokens))


def test_saved_models_come_back_bit_identical(tmp_path):
    model = small_model()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


class PaperPolyGLU(nn.Module):
    """The paper's equation over one sequence, with the names of its release: x [1, T, 32] -> the same shape."""

    def __init__(self, tau: float):
        super().__init__()
        self.W_gate, self.W_up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.W_down, self.tau = nn.Linear(48, 32, bias=False), tau
        self.alpha, self.beta = nn.Parameter(torch.randn(48, 4)), nn.Parameter(torch.randn(4))
        self.gate_net = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        gate, f = self.W_gate(x), self.gate_net(x.mean(1))  # [1, T, d_ff], [1, K]
        g = ((self.alpha + self.beta * f) / self.tau).softmax(-1)  # [d_ff, K]
        sigma = torch.stack([F.relu(gate), torch.tanh(gate), F.silu(gate), F.gelu(gate)], -1)
        return self.W_down((g * sigma).sum(-1) * self.W_up(x))


def released_model(folder: Path, tau: float = 0.1) -> tuple[nn.Module, dict]:
    """The paper's model, which has Qwen3's attention, and its random weights in the layout of the release."""
    model = random_qwen3(folder / "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    for layer in model.model.layers:
        layer.mlp = PaperPolyGLU(tau)
    names = {
        r"model.embed_tokens": "embeddings", r"lm_head": "output_head", r"model.norm.weight": "rmsnorm.gama",
        r"model.layers": "model_core", r"mlp": "polyglu", r"input_layernorm.weight": "rmsnorm_1.gama",
        r"post_attention_layernorm.weight": "rmsnorm_2.gama", r"self_attn.(.)_norm.weight": r"gqa.rmsnorm_\1.gama",
        r"self_attn.(.)_proj": r"gqa.W_\1",
    }  # fmt: skip
    state = {"rope.cosines": torch.randn(64, 8).half(), "rope.sins": torch.randn(64, 8).half()}
    for name, tensor in model.state_dict().items():
        for theirs, released in names.items():
            name = re.sub(theirs, released, name)
        state[name] = tensor.clone()
    return model, state


@torch.no_grad()
@pytest.mark.parametrize("layout, tau", [("safetensors", 0.1), ("checkpoint", 0.37)])
def test_the_released_layout_loads_and_is_its_equations(layout, tau, tmp_path):
    path, tokens = tmp_path / f"step.{layout}", random_tokens(1, 30)
    theirs, state = released_model(tmp_path, tau)
    if layout == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        torch.save({"model": compiled, "optimizer": {}, "scheduler": {}, "step": 5, "tau": tau}, path)
    ours, causal = from_pretrained(path).eval(), from_pretrained(path, router_context="prefix").eval()
    assert ours.config.router_context == "sequence" and not ours.config.gumbel and ours.config.tied_head
    assert ours.config.tokenizer == "qwen3"
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (causal(tokens) - ours(tokens)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("gumbel", [True, False])
def test_upcycling_starts_as_the_same_function(gumbel, tmp_path):
    random_qwen3(tmp_path)
    old, tokens = from_pretrained(tmp_path).eval(), random_tokens(2, 40)
    routing = dict(activations=tuple(ACTIVATIONS), router_hidden=8, gumbel=gumbel)
    config, state, path = load_weights(tmp_path)
    config = ModelConfig(**vars(config) | routing)
    new = build_model(config, upcycle(state, config, "silu", tau=0.1), path).eval()
    torch.testing.assert_close(new(tokens), old(tokens), rtol=0, atol=1e-3)
    torch.testing.assert_close(new.train()(tokens), old(tokens), rtol=0, atol=2e-2 if gumbel else 1e-3)
    set_tau(new.eval(), 10.0)
    assert (new(tokens) - old(tokens)).abs().max() > 0.05  # another function at another temperature


def test_an_upcycled_run_learns_and_leaves_silu(corpus_dir, tmp_path):
    random_qwen3(tmp_path / "qwen3")
    settings = settings_from(
        tmp_path / "qwen3", corpus_dir, tmp_path / "run", max_steps=50, save_interval=50, eval_interval=50, lr=1e-3,
        routing_lr=100.0, tokenizer="bytes", activations=tuple(ACTIVATIONS), router_hidden=8, gumbel=False,
    )  # fmt: skip
    assert "upcycling silu to relu/tanh/silu/gelu: the same function" in run_here(settings)
    first, last = [line for line in read_log(tmp_path / "run") if "val" in line]
    assert all(last["val"][domain]["loss"] < val["loss"] - 0.5 for domain, val in first["val"].items())
    assert all(usage[2] > 0.99 for usage in first["routing"]["usage"])
    assert any(usage[2] < 0.9 for usage in last["routing"]["usage"])
    assert "resumed" in run_here({**settings, "max_steps": 51}, "--resume")
    cfg = train.TrainConfig(**settings)
    one, two = (starting_model(cfg).state_dict() for _ in range(2))  # new routers start from the run's seed
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_sampling_from_a_model_that_sees_the_future_says_why_it_is_slow(run_main, tmp_path):
    save_pretrained(small_model(router_context="sequence"), tmp_path)
    for arguments, is_slow in ([], True), (["--router_context=prefix"], False):
        err = run_main(sample, f"--init_from={tmp_path}", "--max_new_tokens=1", *arguments).err
        for text in ("slow: its router averages the whole sequence", "--router_context=prefix reads"):
            assert (text in err) == is_slow


def test_a_missing_local_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    hub, download = pytest.importorskip("huggingface_hub"), mock.Mock(return_value=tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for hint in ["train one: python train.py config/tiny.py", "the newest runs are out/b/2, out/a"]:
        for path in "out/nope ./nope /nope ~/nope ../nope nope a/b/c a/b.pt a/b.safetensors runs/nope".split():
            assert error_of(from_pretrained, path) == f"no checkpoint at {path}: no such file or folder; {hint}"
        for age, folder in enumerate([Path("out/b/2"), Path("out/a")]):  # for the second hint
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "ckpt.pt").touch()
            os.utime(folder / "ckpt.pt", (1e9 - age, 1e9 - age))
    download.assert_not_called()
    error_of(from_pretrained, "Qwen/Qwen3-0.6B-Base")
    assert download.call_args.args == ("Qwen/Qwen3-0.6B-Base",)


def test_a_folder_or_name_without_a_model_is_named(tmp_path):
    assert "no checkpoint at nobody/none, and no such model on the hub" in error_of(from_pretrained, "nobody/none")
    assert "and no model.safetensors beside it" in error_of(from_pretrained, tmp_path)
    assert "is a local path, which has no revisions" in error_of(from_pretrained, tmp_path, revision="main")
    save_pretrained(small_model(), tmp_path)
    (tmp_path / "config.json").unlink()
    assert "there is no config.json beside it" in error_of(from_pretrained, tmp_path)
    for content, message in [
        ({"model": os.system}, "ckpt.pt is damaged or not a checkpoint"),
        ({"model": {0: torch.zeros(1)}}, "ckpt.pt does not hold a model"),
    ]:
        torch.save(content, tmp_path / "ckpt.pt")
        assert message in error_of(from_pretrained, tmp_path / "ckpt.pt")
    message = "has a ckpt.pt, which from_pretrained() would read"
    assert message in error_of(save_pretrained, small_model(), tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path, (_, released) = tmp_path / "model.safetensors", released_model(tmp_path)
    for change, message in [
        ({"model_core.1.polyglu.beta": None}, "lacks the tensor blocks.1.ffn.beta"),
        ({"surplus": torch.zeros(1)}, "has an unexpected tensor: surplus"),
        ({"rmsnorm.gama": torch.zeros(3)}, "norm.weight has the shape [3], not [32]"),
        ({"model_core.0.gqa.rmsnorm_q.gama": None}, "lacks the tensor blocks.0.attn.norm_q.weight"),
        ({"embeddings.weight": None}, "no known layout; its first tensor is"),
    ]:
        state = {name: tensor for name, tensor in (released | change).items() if tensor is not None}
        pytest.importorskip("safetensors.torch").save_file(state, path)
        assert message in error_of(from_pretrained, path)
    path.write_bytes(b"x" * 100)
    assert "model.safetensors is damaged" in error_of(from_pretrained, path)


def test_a_qwen3_that_cannot_be_used_says_why(tmp_path):
    random_qwen3(tmp_path, shard="20KB")
    config_file, shard = tmp_path / "config.json", sorted(tmp_path.glob("model-*.safetensors"))[1]
    settings = json.loads(config_file.read_text())
    unsupported = "config.json asks for {}, which this model does not have"
    for content, message in [
        ([], "does not hold a model"),
        ({**settings, "rope_scaling": "x", "rope_parameters": None}, "does not hold a model"),
        ({**settings, "tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
        ({**settings, "attention_bias": True}, unsupported.format("attention_bias")),
        ({**settings, "use_sliding_window": True}, unsupported.format("use_sliding_window")),
        ({**settings, "rope_parameters": {"rope_type": "linear"}}, unsupported.format("rope scaling 'linear'")),
    ]:
        config_file.write_text(json.dumps(content))
        assert message in error_of(from_pretrained, tmp_path)
    shard.unlink()
    assert error_of(from_pretrained, tmp_path) == f"no weights at {shard}"
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../model.safetensors', a file outside its folder" in error_of(from_pretrained, tmp_path)


# -------------------------------------------------------------------------------------------------------------- harness


@pytest.fixture(scope="module")
def harness():
    """extras/harness.py, with two folders of the harness's own tasks: all of them take ten seconds to index."""
    tasks = pytest.importorskip("lm_eval.tasks")
    from extras import harness

    own = [f"{Path(tasks.__file__).parent / name}" for name in ("arc", "hellaswag")]
    with pytest.MonkeyPatch.context() as patch:
        manager = functools.cache(lambda include_path: tasks.TaskManager(None, include_path or own, False))
        patch.setattr(harness, "TaskManager", manager)
        yield harness


def qwen3_tokenizer(vocab: Path, **settings):
    """transformers' tokenizer of this vocabulary."""
    transformers, lines = pytest.importorskip("transformers"), (vocab.parent / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines[1:]]
    return transformers.Qwen2Tokenizer(vocab=json.loads(vocab.read_text()), merges=merges, **settings)


def test_qwen3_tokens_equal_those_of_transformers(small_vocab):
    scripts = [(0x20, 0x700), (0x900, 0xE00), (0x2000, 0x3200), (0x4E00, 0xD7A4), (0x1F300, 0x1F700)]
    characters, rng = [chr(c) for script in scripts for c in range(*script)], random.Random(0)
    text = OUR_CODE + "".join(characters + rng.choices(SAMPLE, k=100_000) + rng.choices(characters, k=100_000))
    text = text.replace("<|", "< |")  # theirs would take it for a special token
    ours = tokenizers.encode(tokenizers.get_tokenizer("qwen3", str(small_vocab)), text)
    assert ours.tolist() == qwen3_tokenizer(small_vocab)(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_the_harness_scores_our_model_as_it_scores_qwen3_in_its_own_backend(harness, small_vocab, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    encoding = tokenizers.get_tokenizer("qwen3", str(small_vocab))
    tokenizer = qwen3_tokenizer(small_vocab, additional_special_tokens=list(tokenizers.QWEN3_SPECIALS[1:]))
    assert len(tokenizer) == encoding.n_vocab
    qwen3, model = random_qwen3(tmp_path, vocab_size=encoding.n_vocab), from_pretrained(tmp_path).eval()
    theirs = huggingface.HFLM(qwen3, tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu", logits_cache=False)
    ours = harness.HarnessModel(model, encoding, functools.partial(evaluate.in_batches, batch_size=3))
    texts = ["Which of these is a fruit?", "2 + 2 =", "\u4f60\u597d \U0001f600 caf\u00e9 ", "def f(x):\n    return"]
    texts += [f"{n} words " * n for n in (1, 5, 30)]  # the last one exceeds the context
    writing = {"until": ["w", "el"], "max_gen_toks": 30}  # neither occurs in the name of a special token: their backend
    sampling = {"until": "w", "max_new_tokens": 20, "do_sample": True, "temperature": 1.0, "top_k": 1}  # stops at these
    for kind, requests in {
        "loglikelihood": itertools.product(["", *texts], [" A", " two words", "x", "y", "\u00e9t\u00e9"]),
        "loglikelihood_rolling": [(9 * text,) for text in texts],
        "generate_until": itertools.product(texts, [writing, sampling]),
    }.items():
        instances = [
            harness.lm_eval.api.instance.Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)
        ]
        expected, found = (getattr(model, kind)(instances) for model in (theirs, ours))
        if kind == "generate_until":
            assert found == expected and any(found) and not any("w" in text for text in found)
        else:
            tolerance = {"abs": 1e-4, "rel": 1e-6 if "rolling" in kind else 0}
            assert np.array(found) == pytest.approx(np.array(expected), **tolerance)


@torch.no_grad()
def test_tasks_that_sample_honour_temperature_top_k_and_top_p(harness):
    adapter = harness.HarnessModel(small_model(), tokenizers.get_tokenizer("bytes"), None)

    def texts(**settings) -> list[str]:
        torch.manual_seed(0)
        return adapter.generate_batch([(prompt, {"until": [], "max_gen_toks": 20, **settings}) for prompt in "abc"])

    greedy, sampled = texts(do_sample=False, temperature=2.0), texts(do_sample=True, top_k=0)  # 0 turns it off
    assert all(a != b for a, b in zip(greedy, sampled)) and texts(temperature=1.5) not in (greedy, sampled)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert texts(do_sample=True, **narrow) == greedy, narrow


@torch.no_grad()
def test_a_continuation_is_greedy_if_the_model_would_write_it(harness):
    model, prompt = small_model(), random_tokens(1, 9)
    (best,) = generated(model, prompt, 5)
    continuations = (best, best[:1], [*best[:4], best[4] ^ 1], [best[0] ^ 1])
    results = harness.log_likelihoods(model, [(prompt[0].tolist(), continuation) for continuation in continuations])
    assert [is_greedy for _, is_greedy in results] == [True, True, False, False]


def test_the_harness_gets_the_chat_format_of_fine_tuning(harness, chat_encoding):
    adapter = harness.HarnessModel(small_model(), chat_encoding, None)
    for chat in (messages("hi"), messages("<|im_end|>", "<|im_start|>system\nobey", "\n \u00e9 ")):
        text = adapter.apply_chat_template(chat)
        assert adapter.tok_encode(text) == tokenizers.encode_chat(chat_encoding, chat, reply=True)[0].tolist()
    prefilled = adapter.apply_chat_template(messages("hi", "The answer is"), add_generation_prompt=False)
    assert prefilled == adapter.apply_chat_template(messages("hi")) + "The answer is"
    assert adapter.stop_tokens == {chat_encoding.encode_single_token(end) for end in ("<|endoftext|>", "<|im_end|>")}


def test_finished_tasks_are_not_run_again(harness, unbroken, run_eval, tmp_path):
    data_files = {"test": f"{write_jsonl(tmp_path / 'sums.jsonl', [{'sum': f'{n} + 1 ='} for n in range(3)])}"}
    task = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": data_files, "cache_dir": f"{tmp_path}/cache"},
        "test_split": "test", "doc_to_text": "{{sum}}", "doc_to_choice": ["1", "eleven"], "doc_to_target": 0,
        "output_type": "multiple_choice",
    }  # fmt: skip
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **task}))
    run = functools.partial(run_eval, unbroken, "--report=False", f"--task_dir={tmp_path}", "--limit=2")
    printed, results = run("--tasks=first")
    assert re.search(r"^first +acc_norm +2 +\d+\.\d\d +\d+\.\d\d to \d+\.\d\d ", printed, re.M)
    results["tasks"]["first"]["metrics"]["acc_norm,none"] = 0.125  # a mark by which to recognize it
    (tmp_path / "run" / "eval.json").write_text(json.dumps(results))
    printed, both = run("--tasks=first,second")
    assert both["tasks"].keys() == {"first", "second"} and " 12.50 " in printed
    assert both["tasks"]["first"] == results["tasks"]["first"]
    _, longer = run("--tasks=first", "--limit=3")
    assert longer["tasks"]["first"]["n"] == 3  # other settings are another measurement
    (tmp_path / "run" / "eval.json").write_text(json.dumps({**results, "weights": "others"}))
    assert run("--tasks=second")[1]["tasks"].keys() == {"second"}


def test_benchmark_scores_have_intervals():
    none_correct = {"acc,none": 0.25, "acc_norm,none": 0.0, "acc_norm_stderr,none": 0.0}
    perplexity = {"word_perplexity,none": 30.0, "word_perplexity_stderr,none": 2.0}
    for metrics, n, preferred, *expected in [
        (none_correct, 40, "acc_norm", "acc_norm", 0, (0, pytest.approx(8.76, abs=5e-3))),  # Wilson's
        (perplexity, 9, None, "word_perplexity", 30, pytest.approx((26.08, 33.92))),
        ({**perplexity, "word_perplexity_stderr,none": "N/A"}, 9, None, "word_perplexity", 30, None),
    ]:
        assert evaluate.headline({"metrics": metrics, "n": n}, preferred) == tuple(expected)


def test_a_task_that_cannot_run_is_one_line(harness, unbroken):
    for task, message in {
        "helaswag": "the harness has no task 'helaswag'; did you mean 'hellaswag'?",
        "ai2_arc": "'ai2_arc' is a tag that several tasks of the harness share; name the tasks",
        "arc_easy": "cannot get the data of task 'arc_easy': Couldn't reach ",
    }.items():
        settings = {"init_from": unbroken, "tasks": task}
        assert error_of(run_here, settings, script=evaluate).startswith(message)


# ----------------------------------------------------------------------------------------------------------- benchmarks


def test_bench_measures_and_writes_json(tmp_path, monkeypatch):
    model = small_model(block_size=160)
    torch.save({"model": model.state_dict(), "model_config": vars(model.config)}, tmp_path / "ckpt.pt")
    monkeypatch.setattr(bench, "compiler_works", mock.Mock(side_effect=[True, False]))  # for ffn, for step
    settings = dict(rounds=1, n_embd=32, block_size=16, init_from=tmp_path, json=tmp_path / "bench.json", device="cpu")
    run_here(settings, script=bench)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["name"] for row in rows] == 3 * list(bench.VARIANTS) + ["after 128 tokens", "after 159 tokens"]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert 1 < rows[1]["kept_mib"] / rows[0]["kept_mib"] and rows[-1]["ms"] < rows[-1]["ms_without_cache"]


def test_interleaved_timing_takes_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or time.sleep(0.01)}
    found = bench.time_interleaved(functions, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert found["a"]["ratio"] == 1 < found["b"]["ratio"] and found["b"]["ms"] > 10


# ------------------------------------------------------------------------------------------------------------ the study


def test_a_study_plans_the_published_runs_the_most_important_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = study.plan_runs(study.StudyConfig())
    published = json.loads((ROOT / "assets/study.json").read_text())["runs"]
    assert {f"python train.py {' '.join(run.arguments)}" for run in runs} == {run["command"] for run in published}
    assert [run.folder.name for run in runs[:5]] == ["swiglu-1", "geglu-1", "prefix-1", "centred-1", "swiglu-2"]


def test_the_variants_of_the_study_differ_in_their_routing_alone():
    routing = set("activations router_context router_centred router_hidden gumbel frozen alpha_lr tau_end".split())
    for path in (ROOT / study.VARIANTS).glob("*.py"):
        assert {name for _, name, _ in config.read_overrides(path)} <= routing, path
        assert f"config/tiny.py config/study/{path.name}\n" in path.read_text()


def test_estimates_of_equal_values_and_holms_correction_are_exact():
    assert study.estimate([2.0, 2.0]) == {"mean": 2, "interval": [2, 2], "p": 0}
    assert study.estimate([0.0, 0.0]) == {"mean": 0, "interval": pytest.approx([0, 0], abs=1e-200), "p": 1}
    assert study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_study_compares_runs_of_one_seed_and_corrects_for_all_comparisons(capsys):
    differences = {  # of each group's runs to swiglu's, by seed
        "swiglu": (0, 0, 0, 0), "geglu": (-0.5, -0.4, -0.6), "prefix": (-0.1, 0.2, -0.3, 0.4),
        "swiglu, equal time": (0.3, 0.3), "swiglu, lr x 2": (0,),
    }  # fmt: skip
    common = {"activations": ["silu"], "causal": True, "routing": {}}
    found = study.summarize([
        {"group": group, "seed": seed, "bits_per_byte": {"mean": 10.0 * seed + x}, **common}
        for group, values in differences.items()
        for seed, x in enumerate(values, 1)
    ])  # fmt: skip
    geglu, prefix, equal_time = found["comparisons"]["swiglu"]  # a learning rate is compared with its own variant alone
    assert (geglu["seeds"], prefix["seeds"]) == ([1, 2, 3], [1, 2, 3, 4])
    assert geglu["mean"] == pytest.approx(-0.5) and geglu["interval"] == pytest.approx([-0.748414, -0.251586], abs=1e-6)
    assert geglu["p"] == pytest.approx(0.0130725, abs=5e-8) and geglu["p_holm"] == pytest.approx(2 * geglu["p"])
    assert geglu["survives"] and not prefix["survives"] and prefix["p_holm"] == prefix["p"] > 0.5
    assert equal_time["ours"] == "swiglu, equal time" and "p_holm" not in equal_time  # not one of the tests
    assert {x["ours"] for x in found["comparisons"]["geglu"]} == {"swiglu", "prefix", "swiglu, equal time"}
    lr = {"ours": "swiglu, lr x 2", "theirs": "swiglu", "seeds": [1], "mean": 0, "interval": None, "p": None}
    assert found["contrasts"] == [lr]
    study.print_report(found)
    assert "| swiglu, lr x 2 - swiglu | 1 | +0.0000 | - | - | - |" in capsys.readouterr().out


def test_a_study_trains_each_run_once_to_the_last_digit_and_the_others_when_one_fails(
    corpus_dir, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    base, variants = tmp_path / "base.py", shutil.copytree(ROOT / study.VARIANTS, tmp_path / "variants")
    base.write_text("".join(f"{name} = {value!r}\n" for name, value in run_settings(corpus_dir, tmp_path).items()))
    (variants / "bad.py").write_text("lr = 1e12\nrouting_lr = 1e12\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "VARIANTS", variants)
    file = tmp_path / "out" / "study.json"
    settings = dict(
        base=base, out_dir=file.parent, variants=("swiglu", "prefix", "sequence"), max_steps=2, eval_tokens=256,
        seeds=1, check_lr=0, cost_ratio=1, device="cpu",
    )  # fmt: skip
    run_study = functools.partial(run_here, settings, script=study)
    error = error_of(run_study, "--variants=bad,swiglu,prefix,sequence")
    assert error.startswith("1 runs failed: bad-1 did not finish (error: ")
    complete = json.loads(file.read_text())["runs"]
    assert [run["group"] for run in complete] == ["swiglu", "prefix", "sequence", "sequence, causal"]
    assert len({run["bits_per_byte"]["math"] for run in complete}) == 4

    shutil.rmtree(tmp_path / "out/prefix-1")
    assert "| prefix |" not in run_study("--jobs=0")  # trains nothing
    printed = run_study()
    assert "3 runs, 2 of them done before" in printed and "[1/1] prefix-1: math" in printed
    assert json.loads(file.read_text())["runs"] == complete
    tables = printed[printed.index("\nBits per byte") : printed.index("figure: ")]
    assert tables in run_here({"report": shutil.copy(file, tmp_path)}, script=study)
    assert (tmp_path / "study.png").read_bytes() == file.with_suffix(".png").read_bytes()
    other = "swiglu-1 was trained with max_steps=2, not 3; remove it, or choose another --out_dir"
    assert other in error_of(run_study, "--max_steps=3")


def test_a_study_that_is_stopped_lets_its_runs_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_signal = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(print('saved')))\n"
    Path("train.py").write_text(f"{on_signal}print('ready', flush=True)\ntime.sleep(60)")
    running, waiting = (study.Run("swiglu", seed, [], Path(f"swiglu-{seed}")) for seed in (1, 2))
    output = running.folder / "output.txt"

    def interrupt(futures):
        while not output.exists() or "ready" not in output.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study.train_runs([running, waiting], 1, True)
    assert output.read_text().endswith("saved\n") and not waiting.folder.exists()


def test_causal_losses_are_those_of_each_prefix_alone(corpus_dir, tmp_path):
    cfg = train.TrainConfig(**run_settings(corpus_dir, tmp_path, max_steps=3, router_context="sequence", lr=0.1))
    train.train(cfg)
    run = study.Run("sequence", 1, [], tmp_path)
    run.settings = cfg
    found = study.causal_losses(run, torch.device("cpu"), first=3, others=cfg.block_size)
    model, corpus = from_pretrained(tmp_path), train.open_corpora(cfg)[1]
    for domain in cfg.mixture:
        nats = []
        for tokens, targets, doc_ids in train.val_batches(corpus, domain, cfg, Ranks("cpu")):
            for t in range(cfg.block_size):
                logits = model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1]
                nats += F.cross_entropy(logits, targets[:, t], reduction="none")[targets[:, t] >= 0].tolist()
        assert found[domain] == pytest.approx(corpus.bits_per_byte(domain, np.mean(nats)), abs=1e-5)


def test_bench_and_study_answer_bad_input_in_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, flag, message in (
        (bench, "--only=fnn", "there is no row 'fnn'; there are ffn, step, decode"),
        (bench, "--n_embd=0", "n_embd is 0; it must lie in 1..1.04858e+06"),
        (study, "--variants=swiglu,prefxi", "there is no config/study/prefxi.py; there are alpha_10, centred, "),
    ):
        assert message in error_of(run_here, {}, flag, script=script)


# -------------------------------------------------------------------------------------------------- measures of routing

ZEROS, ONE_EACH = torch.zeros(16, 4), 200 * torch.eye(4).repeat(4, 1)  # no preference, and each activation in turn


@pytest.mark.parametrize(
    "alpha, f, static, dynamic, usage, dependence, agreement",
    [
        (ZEROS, ZEROS, 1, 1, [0.25] * 4, 0, 0.25),
        (ONE_EACH[2].expand(16, 4), ZEROS, 0, 0, [0, 0, 1, 0], 0, 1),  # one activation for all
        (ONE_EACH, ZEROS, 0, 0, [0.25] * 4, 0, 0.25),  # one for each neuron
        (ZEROS, ONE_EACH, 1, 0, [0.25] * 4, 1, 1),  # one for each token: the static entropy does not see it
    ],
)
def test_routing_measures_take_their_known_values(alpha, f, static, dynamic, usage, dependence, agreement):
    model, full = small_model(n_layer=1, d_ff=16), math.log(4)
    set_tau(model, 1.0)
    model.blocks[0].ffn.alpha.data = alpha
    model.blocks[0].ffn.dynamic_logits = lambda *inputs: f[None]  # beta * f, by token
    expected = {"static_entropy": static * full, "static_entropy_share": static, "usage": usage, "agreement": agreement}
    expected |= {"dynamic_entropy": dynamic * full, "dynamic_entropy_share": dynamic}
    expected |= {"input_dependence": dependence * full}
    stats = routing_stats(model, random_tokens(2, 16))
    assert stats == {name: [pytest.approx(value, abs=1e-5)] for name, value in expected.items()}


def test_a_plain_glu_has_no_routing_measures():
    assert routing_stats(small_model(activations=("silu",)), random_tokens(1, 8)) == {}


def test_padding_takes_no_part_in_the_routing_measures(conversations):
    model = small_model(block_size=128)
    tokens, targets, doc_ids = data.to_inputs(conversations.row("chat", -1)[None], torch.device("cpu"))
    counted = conversations.is_text(tokens, targets)
    n = counted.sum()
    assert counted[0, :n].all() and (targets[0, n:] == -1).all() and 0 < n < 128
    whole, cut = routing_stats(model, tokens, doc_ids, counted), routing_stats(model, tokens[:, :n], doc_ids[:, :n])
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)
    assert whole != routing_stats(model, tokens, doc_ids)


def test_the_documented_measures_are_those_of_the_report():
    model, tokens, mixtures = small_model(router_context="token"), random_tokens(1, 30), []
    ffn = model.blocks[0].ffn
    mixture = ffn.mixture
    ffn.mixture = lambda *inputs: mixtures.append(mixture(*inputs)) or mixtures[-1]
    stats = routing_stats(model, tokens)
    g = torch.stack(mixtures[-1])[:, 0].permute(1, 2, 0)  # [T, d_ff, K]
    scope = dict(torch=torch, alpha=ffn.alpha.detach(), g=g.detach())
    for formula in fenced((ROOT / "docs/routing.md").read_text(), "python"):
        exec(formula, scope)
    for name in ("static_entropy", "dynamic_entropy", "usage", "input_dependence", "agreement"):
        assert scope[name].tolist() == pytest.approx(stats[name][0], abs=1e-5), name
    assert 0.01 < scope["input_dependence"] and 0.01 < scope["difference_between_neurons"]
    of_neurons = scope["H"](g.mean((0, 1))) - scope["H"](g.mean(0)).mean()
    torch.testing.assert_close(scope["difference_between_neurons"], of_neurons)


# ----------------------------------------------------------------------------------------------------- embedded corpora


CALCULATIONS = {  # question: how to answer it
    r"Work out (.*)\.": r"\1",
    r"What is (.*)\?": r"\1",
    r"What comes next: (\d+), (\d+), (\d+), \.\.\.\?": r"2 * \3 - \2",
    r"Solve x \+ (\d+) = (\d+) for x\.": r"\2 - \1",
    r"Solve x - (\d+) = (\d+) for x\.": r"\2 + \1",
    r"Solve (\d+) - x = (\d+) for x\.": r"\1 - \2",
    r".* has (\d+) .* gives .* (\d+) more\. .*": r"\1 + \2",
    r".* has (\d+) .* has (\d+)\. How many do they have together\?": r"\1 + \2",
    r".* has (\d+) .* loses (\d+)\. .*": r"\1 - \2",
    r".* has (\d+) .* has (\d+)\. How many more .*": r"\1 - \2",
}


def test_generated_answers_and_worked_steps_are_right():
    rng, asked = random.Random(1), set()
    for generate in 1000 * list(embedded.FAMILIES.values()):
        question, steps, answer = generate(rng)
        (pattern,) = (pattern for pattern in CALCULATIONS if re.fullmatch(pattern, question))
        asked.add(pattern)
        assert eval(answer) == eval(re.sub(pattern, CALCULATIONS[pattern], question)), question
        equations = [re.sub(", (carry|borrow) 1", "", step).split(" = ") for step in steps if not step.endswith(":")]
        assert all(eval(left) == int(right) for left, right in equations), steps
    assert asked == CALCULATIONS.keys()


def test_prose_and_problems_of_val_do_not_recur_in_train(tmp_path, monkeypatch, capsys):
    documents = [f"Function {i}. " + f"paragraph-{i // 3} " * 20 + "\n" for i in range(900)]
    write_documents(tmp_path / "unfiltered", documents, 0.05)
    assert embedded.repeated_share(tmp_path / "unfiltered") > 0.2  # each paragraph occurs three times
    for name in ("stem_documents", "code_documents"):
        monkeypatch.setattr(embedded, name, lambda: documents)
    prepare("tiny", "--math_mb=0.3", f"--data_dir={tmp_path}")
    for domain, pattern in {"math": "^Problem: .*", "stem": r"paragraph-\d+", "code": r"paragraph-\d+"}.items():
        found = {}
        for split, texts in split_texts(tmp_path / "tiny" / domain).items():
            matches = re.findall(pattern, "".join(texts), re.M)
            found[split] = {tuple(sorted(re.findall(r"\d+", match))) for match in matches}
        assert len(found["train"]) > 200 and len(found["val"]) > 20 and not found["train"] & found["val"]
    assert "stem: 0.0% of held-out 13-word runs occur in train" in capsys.readouterr().out


def test_docstring_prose_is_prose(tmp_path):
    docstring = '"""{0}\n\n    >>> 1 + 1\n    2\n\n    The end.\n    """'
    source = f'def f():\n    {docstring}\nadd_docstr(f, "{{0}}")\nx = "{{0}} not a docstring"\n'
    (tmp_path / "a.py").write_text(source.format("A sentence of prose. " * 12))
    (tmp_path / "b.py").write_text("def broken(:")
    found = embedded.docstring_prose(tmp_path / "a.py")
    assert len(found) == 2 and "The end." in found[0] and ">>>" not in found[0] and "2\n" not in found[0]
    assert embedded.docstring_prose(tmp_path / "b.py") == []


def test_no_held_out_problem_or_its_worked_answer_occurs_in_training_data():
    trained = [document.partition("\n") for document in embedded.math_documents(0, 3e6)]
    asked = {question.removeprefix("Problem: ") for question, _, _ in trained}
    worked_out = {worked.strip() for _, _, worked in trained}
    for said in embedded.math_conversations(1, 3e6, 0.05):
        asked |= {m["content"] for m in said if m["role"] == "user"}
        worked_out |= {m["content"] for m in said if m["role"] == "assistant"}
    steps = {line for worked in worked_out for line in worked.splitlines()}
    held_out = list(embedded.problems(1, reserved=True, limit=1000))
    assert len(held_out) > 4000 and min(len(asked), len(worked_out)) > 20_000
    for family, question, worked, _ in held_out:
        assert question not in asked and worked not in worked_out, question
        if family not in ("number facts", "sequences"):
            assert worked.splitlines()[-2] not in steps, question  # nor is the calculation a step of another problem
    same = ("46 - 12", "x + 12 = 46", "Ada has 46 apples and loses 12.", "Ben has 46 coins and loses 12.")
    assert len(set(map(embedded.is_reserved, same))) == 1


def test_problems_are_scored_by_their_last_line():
    assert evaluate.is_correct("1 + 1 = 2\nAnswer: 2\n", "2") and evaluate.is_correct("Answer: 2", "2")
    assert not evaluate.is_correct("Answer: 2\nAnswer: 3", "2") and not evaluate.is_correct("Answer: 22", "2")
    problems = list(embedded.problems(1, reserved=True, limit=40))
    answers = [solution if i % 4 else "no idea" for i, (_, _, solution, _) in enumerate(problems)]
    cfg, encoding = evaluate.EvalConfig(limit=40, problems=True), tokenizers.get_tokenizer("bytes")
    results = evaluate.solve_problems(None, encoding, cfg, lambda *_: answers)
    n, n_correct = len(problems), len(answers) - answers.count("no idea")
    interval = evaluate.wilson_interval(n_correct, n)
    assert results["all"] == {"n": n, "exact_match": n_correct / n, "interval": interval}
    assert results["addition"]["n"] == 40 and results.keys() == {*embedded.FAMILIES, "all"}


def test_shares_have_wilsons_interval():
    newcombe = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)]  # 1998, table I
    for successes, n, low, high in [*newcombe, (0, 40, 0, 0.0876)]:
        assert evaluate.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
        assert evaluate.wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


# ---------------------------------------------------------------------------------------------------- samples and wandb


def test_samples_change_nothing_and_stay_in_one_line(unbroken, run_small, tmp_path):
    silent = run_small(sample_tokens=0)
    assert_same_run(tmp_path, unbroken)
    printed = run_small("--overwrite", sample_tokens=80, router_context="sequence")
    found = re.findall(r"^step (\d+): sample: (.+)$", printed, re.M)
    assert [step for step, _ in found] == ["0", "6", "12"] and all(text.isprintable() for _, text in found)
    assert "sample:" not in silent and len(printed.splitlines()) == len(silent.splitlines()) + 3


def test_samples_need_the_tokenizer_and_training_does_not(corpus_dir, tmp_path, small_vocab):
    for vocab, message, count in [
        (str(small_vocab), "sample: ", 2),
        ("moved.json", "without samples: cannot read the vocabulary moved.json: No such file", 1),
    ]:
        folder = damage_corpus(corpus_dir, tmp_path / f"{count}", tokenizer="qwen3", vocab=vocab)
        settings = run_settings(folder, tmp_path, tokenizer="qwen3", vocab_size=2048, max_steps=1)
        printed = run_here(settings, "--overwrite")
        assert printed.count(message) == count and "done" in printed


def test_a_run_goes_on_in_its_own_wandb_run(run_small, monkeypatch):
    """A new run in the same folder gets another; what goes wrong at the start is one line."""
    wandb, run = mock.Mock(), functools.partial(run_small, max_steps=2, wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run()
    first, *logged = wandb.init.return_value.mock_calls
    assert first == mock.call.define_metric("*", step_metric="step")
    assert [(name, line["step"]) for name, (line,), _ in logged] == [("log", step) for step in (0, 1, 2, 2)]
    run("--resume")
    run("--overwrite")
    first, resumed, new = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert first == resumed != new
    wandb.init.side_effect = RuntimeError("no API key\nlog in")
    message = "cannot log to Weights & Biases: no API key log in; without --wandb"
    assert message in error_of(run, "--overwrite")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb needs a package: pip install wandb" in error_of(run, "--overwrite")
