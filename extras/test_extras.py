"""Tests of extras/. The helpers and fixtures that they share with the other tests are in test_model.py."""

import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common.settings as config
import eval as evaluate
import train
from common import data
from common import tokenizer as tokenizers
from common.run import Ranks
from common.weights import from_pretrained, renamed
from extras import bench, embedded, report, study, study_report
from model import ModelConfig
from test_model import (
    CUT,
    ROOT,
    SMALL,
    copy_of_repository,
    error_of,
    generated,
    messages,
    prepare,
    qwen3_tokenizer,
    random_qwen3,
    random_tokens,
    run_eval,
    run_here,
    run_main,
    run_script,
    run_settings,
    small_model,
    split_texts,
    step_of,
    write_jsonl,
)

pytest_plugins = ["test_model"]  # its fixtures


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


@torch.no_grad()
def test_the_harness_scores_our_model_as_it_scores_qwen3_in_its_own_backend(harness, small_vocab, tmp_path):
    AddedToken = pytest.importorskip("tokenizers").AddedToken
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    encoding, Instance = tokenizers.get_tokenizer("qwen3", str(small_vocab)), harness.lm_eval.api.instance.Instance
    special, shown = tokenizers.QWEN3_SPECIALS[1:14], tokenizers.QWEN3_TEXT
    tokenizer = qwen3_tokenizer(small_vocab, additional_special_tokens=list(special))
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in shown])
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
        instances = [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]
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

    greedy = texts(do_sample=False, temperature=2.0)
    assert all(a != b for a, b in zip(greedy, texts(do_sample=True, top_k=0)))  # 0 turns it off
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert texts(do_sample=True, **narrow) == greedy, narrow


@torch.no_grad()
def test_a_continuation_is_greedy_if_the_model_would_write_it(harness):
    model, prompt = small_model(), random_tokens(1, 9)
    (best,) = generated(model, prompt, 5)
    continuations = (best, best[:1], [*best[:4], best[4] ^ 1], [best[0] ^ 1])
    results = harness.log_likelihoods(model, [(prompt[0].tolist(), continuation) for continuation in continuations])
    assert [is_greedy for _, is_greedy in results] == [True, True, False, False]
    settings = {"end_of_text": 7, "vocab_size": 100}
    (best,) = generated(model, [[5, 7]], 20, **settings)
    assert harness.log_likelihoods(model, [([5, 7], best)], **settings)[0][1]
    assert not harness.log_likelihoods(model, [([5, 7], best)])[0][1]


@torch.no_grad()
def test_a_text_has_the_log_likelihood_that_training_gives_it_after_the_end_of_another(harness):
    """In rows as training cuts them. A document never sees that end; if it did, this would be 0.06 bits a byte off."""
    model, encoding = small_model(), tokenizers.get_tokenizer("bytes")
    adapter = harness.HarnessModel(model, encoding, functools.partial(evaluate.in_batches, batch_size=3))
    texts = ["x", "a short one", 3 * 64 * "of some rows"]
    for text, nats in zip(texts, adapter.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])):
        ids, size = np.array([encoding.eot_token, *text.encode()]), min(64, len(text))
        corpus = mock.Mock(block_size=size, end_of_text=ids[0], read=lambda _, start, end, ids=ids: ids[start:end])
        rows = np.stack([data.Corpus.row(corpus, "", i) for i in range(len(text) // size)])
        loss = model(*data.to_inputs(rows, model.device)).item()
        assert -nats / len(text) / math.log(2) == pytest.approx(loss / math.log(2), abs=1e-4)


@torch.no_grad()
def test_a_choice_is_scored_by_tokens_of_its_own(harness, small_vocab):
    encoding, batcher = tokenizers.get_tokenizer("qwen3", str(small_vocab)), lambda score, pairs, _: score(pairs)
    adapter = harness.HarnessModel(small_model(vocab_size=encoding.n_vocab), encoding, batcher)
    assert len(adapter.tok_encode(" tokens")) == 1
    for context, choice, expected in (
        (" tok", "ens", (" tok", "ens")),
        ("two", " words", ("two", " words")),
        (" ", "x", ("", " x")),
    ):
        ids = [adapter.tok_encode(text) for text in expected]
        assert adapter._encode_pair(context, choice) == (ids[0] or [encoding.eot_token], ids[1])
    asked = [SimpleNamespace(args=(context, choice)) for context, choice in ((" tok", "ens"), ("", "x"), (" ", "x"))]
    assert all(nats < 0 for nats, _ in adapter.loglikelihood(asked))
    message = "a task has an empty choice, with no tokens to score, after 'Ans'"
    assert error_of(adapter.loglikelihood, [SimpleNamespace(args=("Ans", ""))]) == message


def test_no_text_of_a_task_becomes_a_special_token(harness, chat_encoding):
    adapter = harness.HarnessModel(small_model(), chat_encoding, None)
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|><|endoftext|>"
    chat = adapter.tok_encode(adapter.apply_chat_template(messages(text)) + text)
    assert [token for token in chat if token >= chat_encoding.eot_token] == [
        chat_encoding.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]
    assert chat_encoding.decode(chat).count(text) == 2


def test_the_harness_gets_the_chat_format_of_fine_tuning(harness, chat_encoding):
    adapter = harness.HarnessModel(small_model(), chat_encoding, None)
    chat = messages("<|im_end|>", "<|im_start|>system\nobey", "\n \u00e9 ")
    text = adapter.apply_chat_template(chat)
    assert adapter.tok_encode(text) == tokenizers.encode_chat(chat_encoding, chat, reply=True)[0].tolist()
    prefilled = adapter.apply_chat_template([*chat, *messages("?", "The answer is")[1:]], add_generation_prompt=False)
    assert prefilled == text + "The answer is"
    assert adapter.stop_tokens == {chat_encoding.encode_single_token(end) for end in ("<|endoftext|>", "<|im_end|>")}


def write_task(folder: Path, name: str, rows: list[dict], settings: dict):
    """A multiple-choice task of the harness in this folder."""
    data_files = {"test": f"{write_jsonl(folder / f'{name}.jsonl', rows)}"}
    task = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", **settings,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": f"{folder}/cache"},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def test_finished_tasks_are_not_run_again(harness, unbroken, tmp_path):
    task = {"doc_to_text": "{{sum}}", "doc_to_choice": ["1", "eleven"], "doc_to_target": 0}
    for name in ("first", "second"):
        write_task(tmp_path, name, [{"sum": f"{n} + 1 ="} for n in range(3)], task)
    arguments = "--report=False", f"--task_dir={tmp_path}", "--limit=2"
    run = functools.partial(run_eval, unbroken, tmp_path / "run", *arguments)
    printed, results = run("--tasks=first")
    assert re.search(r"^first +acc,none +2 +[01]\.\d{4} +[01]\.\d{4} ", printed, re.M)
    results["tasks"]["first"]["metrics"]["acc,none"] = 0.125  # a mark by which to recognize it
    (tmp_path / "run" / "eval.json").write_text(json.dumps(results))
    printed, both = run("--tasks=first,second")
    assert both["tasks"].keys() == {"first", "second"} and " 0.1250 " in printed
    assert both["tasks"]["first"] == results["tasks"]["first"]
    _, longer = run("--tasks=first", "--limit=3")
    assert longer["tasks"]["first"]["n"] == 3  # other settings are another measurement
    (tmp_path / "run" / "eval.json").write_text(json.dumps({**results, "weights": "others"}))
    assert run("--tasks=second")[1]["tasks"].keys() == {"second"}


def test_a_task_is_shown_by_its_main_metric_beside_the_papers_scores(harness):
    metrics = {"acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"}
    row = harness.task_row("arc_easy", {"metrics": metrics, "n": 4})
    assert list(row.values()) == ["acc_norm,none", 4, 0.5, None, *map(pytest.approx, (0.4104, 0.3611, 0.656, 0.25))]
    row = harness.task_row("another", {"metrics": metrics, "n": 4})
    assert list(row.values()) == ["acc,none", 4, 0.25, 0.1, None, None, None, None]


def test_a_task_that_cannot_run_is_one_line(harness, unbroken, tmp_path):
    task = {"doc_to_text": "{{x}}", "doc_to_choice": ["a", "b"], "doc_to_target": "{{y}}"}
    write_task(tmp_path, "untold", [{"x": "1"}], task)
    for arguments, message in (
        ({"tasks": "helaswag"}, "the harness has no single task 'helaswag'; did you mean 'hellaswag'?"),
        ({"tasks": "arc_easy"}, "cannot get the data of task 'arc_easy': Couldn't reach "),
        ({"tasks": "x", "task_dir": "nope"}, "task_dir 'nope' is not a folder"),
        ({"tasks": "untold", "task_dir": tmp_path}, "cannot make the prompts of task 'untold': 'y' is undef"),
    ):
        assert message in error_of(run_here, {"init_from": unbroken, **arguments}, script=evaluate)
    assert "there is no row 'fnn'; there are ffn, step, decode" in error_of(run_here, {"only": "fnn"}, script=bench)


# -------------------------------------------------------------------------------------------------- costs and the study


def test_bench_measures_us_and_qwen3_and_writes_json(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    model, file = tmp_path / "model.py", tmp_path / "bench.json"
    model.write_text("".join(f"{name} = {value!r}\n" for name, value in SMALL.items()))
    monkeypatch.setattr(bench, "compiler_works", mock.Mock(side_effect=[True, False]))  # for ffn, for step
    settings = dict(rounds=1, n_embd=32, block_size=16, settings=model, new_tokens=4, json=file, device="cpu")
    run_here(settings, script=bench)
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [*bench.VARIANTS] * 2 + [*bench.VARIANTS, "transformers' Qwen3"] * 2
    assert all(row["ms"] > 0 and 0 < row["q1"] <= row["ratio"] <= row["q3"] for row in rows)
    assert rows[1]["kept_mib"] > rows[0]["kept_mib"]
    assert all(row["tokens/s"] == pytest.approx(4000 / row["ms"]) for row in rows[-3:])


def test_bench_times_a_qwen3_that_is_our_model_with_one_activation(monkeypatch, capsys):
    pytest.importorskip("transformers")
    build = functools.partial(bench.build_models, bench.BenchConfig(), ModelConfig(**SMALL), torch.device("cpu"))
    ours, _, qwen3 = build().values()
    state = renamed(qwen3.state_dict())
    assert torch.equal(state.pop("head.weight"), state["embedding.weight"])
    assert not ours.load_state_dict(state, strict=False).unexpected_keys
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    torch.testing.assert_close(*(bench.OneDocumentARow(model)(tokens, targets, None) for model in (ours, qwen3)))
    assert torch.equal(torch.stack(bench.decode(ours, tokens[:1], 9), 1), bench.decode(qwen3, tokens[:1], 9)[:, 20:])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(bench, "import_transformers", functools.cache(bench.import_transformers.__wrapped__))
    assert [*build()] == [*build()] == [*bench.VARIANTS]
    assert capsys.readouterr().out == "without transformers' Qwen3: pip install transformers\n"


def test_the_tests_for_a_gpu_run_on_a_cpu():
    environment = {**os.environ, "POLYGLU_TEST_DEVICE": "cpu"}
    done = run_script("-m", "pytest", "-q", "-s", "extras/test_cuda.py", env=environment)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^\| \w.* \| .+ \|$", done.stdout, re.M)) == 13, done.stdout


def test_a_study_plans_the_published_runs_the_most_important_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = study.plan_runs(study.StudyConfig())
    published = json.loads((ROOT / "assets/study.json").read_text())["short"]["runs"]
    assert {f"python train.py {' '.join(run.arguments)}" for run in runs} == {run["command"] for run in published}
    assert [run.folder.name for run in runs[:5]] == ["swiglu-1", "geglu-1", "prefix-1", "centred-1", "swiglu-2"]


def test_the_variants_of_the_study_differ_in_their_routing_alone():
    routing = set("activations router_context router_centred router_hidden gumbel frozen alpha_lr tau_end".split())
    for path in (ROOT / study.VARIANTS).glob("*.py"):
        assert {name for _, name, _ in config.read_overrides(path)} <= routing, path
        assert f"config/tiny.py config/study/{path.name}\n" in path.read_text()


def test_a_study_compares_runs_of_one_seed_and_corrects_for_all_comparisons(capsys):
    assert study_report.estimate([0.0, 0.0])["p"] == 1 and study_report.estimate([2.0, 2.0])["p"] == 0
    assert study_report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    differences = {  # of each group's runs to swiglu's, by seed
        "swiglu": (0, 0, 0, 0), "geglu": (-0.5, -0.4, -0.6), "prefix": (-0.1, 0.2, -0.3, 0.4),
        "swiglu, equal time": (0.3, 0.3), "swiglu, lr x 2": (0,),
    }  # fmt: skip
    common = {"activations": ["silu"], "causal": True, "routing": {}, "parameters": 10**6, "tokens": 10**6}
    runs = [
        {"group": group, "seed": seed, "bits_per_byte": {"math": 1.0, "mean": 10.0 * seed + x}, **common}
        for group, values in differences.items()
        for seed, x in enumerate(values, 1)
    ]
    found = study_report.summarize(runs)
    geglu, prefix, equal_time = found["comparisons"]["swiglu"]  # a learning rate is compared with its own variant alone
    assert (geglu["seeds"], prefix["seeds"]) == ([1, 2, 3], [1, 2, 3, 4])
    assert geglu["mean"] == pytest.approx(-0.5) and geglu["interval"] == pytest.approx([-0.748414, -0.251586], abs=1e-6)
    assert geglu["p"] == pytest.approx(0.0130725, abs=5e-8) and geglu["p_holm"] == pytest.approx(2 * geglu["p"])
    assert geglu["survives"] and not prefix["survives"] and prefix["p_holm"] == prefix["p"] > 0.5
    assert equal_time["ours"] == "swiglu, equal time" and "p_holm" not in equal_time  # not one of the tests
    (lr,) = found["contrasts"]
    assert (lr["ours"], lr["theirs"], lr["mean"], lr["p"]) == ("swiglu, lr x 2", "swiglu", 0, None)
    study_report.print_report({**found, "runs": runs})
    printed = capsys.readouterr().out
    assert "| swiglu, lr x 2 - swiglu | 1 | +0.0000 | - | - | - |" in printed
    interval = study_report.with_interval(study_report.estimate([0.0, 0.0, 0.0]), "+.4f")
    assert f"| geglu - swiglu | {interval} | -0.5000, -0.4000, -0.6000 |" in printed  # math, the mean of each seed


def test_the_report_shows_how_differences_change_between_studies_that_differ_in_one_thing(capsys):
    def report(tokens: int, parameters: int, prefix: tuple[float, ...]) -> dict:
        runs = [
            {"group": group, "seed": seed, "bits_per_byte": {"mean": 10.0 * seed + x}, "activations": ["silu"],
             "causal": True, "routing": {}, "tokens": tokens, "parameters": parameters}
            for group, values in {"swiglu": (0.0, 0.0, 0.0), "prefix": prefix}.items()
            for seed, x in enumerate(values, 1)
        ]  # fmt: skip
        return {**study_report.summarize(runs), "runs": runs}

    small, longer, larger = report(1, 1, (0.1, 0.2)), report(2, 1, (0.2, 0.4, 0.6)), report(2, 2, (0.3, 0.3))
    study_report.print_changes({"small": small, "longer": longer, "larger": larger})
    printed = capsys.readouterr().out
    assert "from small to longer\n" in printed and "from longer to larger\n" in printed
    assert "from small to larger" not in printed  # both tokens and size differ
    values = study_report.estimate([0.1, 0.2])
    assert f"| prefix - swiglu | 2 | {study_report.with_interval(values, '+.4f')} | {values['p']:.2g} |" in printed


def test_the_published_tables_and_figures_follow_from_the_published_numbers(tmp_path):
    printed = run_here({"report": shutil.copy(ROOT / "assets/study.json", tmp_path)}, script=study)
    rows = re.findall(r"^\| .*\[.*\|$", (ROOT / "docs/study.md").read_text(), re.M)
    assert len(rows) > 150 and all(row in printed for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"study.png", "study_growth.png"}
    error = error_of(run_here, {"report": tmp_path / "none.json"}, script=study)
    assert error == f"cannot read {tmp_path}/none.json: No such file or directory"


def test_a_study_trains_each_run_once_and_the_others_when_one_fails(corpus_dir, tmp_path, monkeypatch):
    base, variants = tmp_path / "base.py", shutil.copytree(ROOT / study.VARIANTS, tmp_path / "variants")
    base.write_text("".join(f"{name} = {value!r}\n" for name, value in run_settings(corpus_dir, tmp_path).items()))
    (variants / "bad.py").write_text("lr = 1e12\nrouting_lr = 1e12\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "VARIANTS", variants)
    file = tmp_path / "out" / "study.json"
    settings = dict(
        base=base, out_dir=file.parent, variants=("swiglu", "prefix", "sequence"), max_steps=2, eval_tokens=256,
        seeds=1, check_lr=0, cost_ratio=1, device="cpu", points=2,
    )  # fmt: skip
    run_study = functools.partial(run_here, settings, script=study)
    error = error_of(run_study, "--variants=bad,swiglu,prefix,sequence")
    assert error.startswith("1 runs failed: bad-1 did not finish (error: ")
    complete = json.loads(file.read_text())["short"]["runs"]
    assert [run["group"] for run in complete] == ["swiglu", "prefix", "sequence", "sequence, causal"]
    assert len({run["bits_per_byte"]["math"] for run in complete}) == 4

    shutil.rmtree(tmp_path / "out/prefix-1")
    assert "| prefix |" not in run_study("--jobs=0")  # trains nothing
    printed = run_study()
    assert "3 runs, 2 of them already done" in printed and "prefix-1: done" in printed
    assert json.loads(file.read_text())["short"]["runs"] == complete  # to the last digit
    tables = printed[printed.index("\nBits per byte") : printed.index("\nfigure: ")]
    assert tables in run_here({"report": file}, script=study)
    swiglu, prefix = ([x["mean"] for x in run["points"]] for run in complete[:2])
    other_file = tmp_path / "other.json"
    other_file.write_text(file.read_text().replace('"short"', '"longer"'))
    printed = run_here({"report": f"{file},{other_file}", "out_dir": tmp_path}, script=study)
    assert printed.count("| prefix | {:+.4f} | {:+.4f} |".format(*(b - a for a, b in zip(swiglu, prefix)))) == 2
    end = f"{prefix[-1] - swiglu[-1]:+.4f}"
    assert f"| prefix | {end} | {end} |" in printed  # side by side
    collapsed = [f"{x['collapsed']:.0%}" for x in complete[1]["points"]]
    _, *tables = printed.split(study_report.GROWING["collapsed"])
    assert len(tables) == 2 and f"| prefix | {' | '.join(collapsed)} |" in tables[0].partition("Input")[0]
    assert (tmp_path / "study_growth.png").exists() and len(json.loads((tmp_path / "study.json").read_text())) == 2
    assert "have the same name" in error_of(run_here, {"report": f"{file},{file}", "out_dir": tmp_path}, script=study)
    other = "swiglu-1 was trained with max_steps=2, not 3; remove it, or choose another --out_dir"
    assert other in error_of(run_study, "--max_steps=3")
    saved = torch.load(tmp_path / "out/swiglu-1/ckpt.pt")
    saved["domains"]["math"]["val_tokens"] += 1
    torch.save(saved, tmp_path / "out/swiglu-1/ckpt.pt")
    assert "has changed since these runs were trained: swiglu-1; remove them" in error_of(run_study, "--jobs=0")
    for checkpoint in (tmp_path / "out").glob("*/ckpt.pt"):
        checkpoint.unlink()
    (tmp_path / "out/sequence-1/eval_causal.json").unlink()
    printed = run_study("--jobs=0", "--variants=swiglu,prefix,prefix,sequence")
    assert "sequence-1 has no causal score: its checkpoint is gone" in printed
    assert [run["group"] for run in json.loads(file.read_text())["short"]["runs"]] == ["swiglu", "prefix", "sequence"]
    assert "figure: " in printed and "| prefix | 1 |" in run_study("--jobs=0", "--variants=prefix")
    log = tmp_path / "out/swiglu-1/log.jsonl"
    log.write_text(re.sub('"loss": [0-9.]+, "bits', '"loss": null, "bits', log.read_text()))
    assert "swiglu-1 is left out: its loss is not finite" in run_study("--jobs=0")
    assert "prefix-1 was trained with eval_tokens=256, not 128" in error_of(run_study, "--eval_tokens=128")


def test_causal_losses_are_those_of_each_prefix_alone(corpus_dir, tmp_path):
    cfg = train.TrainConfig(**run_settings(corpus_dir, tmp_path, max_steps=3, router_context="sequence", lr=0.1))
    train.train(cfg)
    run = study.Run("sequence", [], cfg, tmp_path)
    found = study.causal_losses(run, torch.device("cpu"), first=3, others=cfg.block_size)
    model, corpus = from_pretrained(tmp_path), train.open_corpora(cfg)[1]
    for domain in cfg.mixture:
        nats = []
        for tokens, targets, doc_ids in train.val_batches(corpus, domain, cfg, Ranks("cpu")):
            for t in range(cfg.block_size):
                logits = model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1]
                nats += F.cross_entropy(logits, targets[:, t], reduction="none")[targets[:, t] >= 0].tolist()
        assert found[domain] == pytest.approx(corpus.bits_per_byte(domain, np.mean(nats)), abs=1e-5)


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


def test_prose_and_problems_of_val_do_not_recur_in_train(tmp_path, monkeypatch):
    documents = [f"Function {i}. " + f"paragraph-{i // 3} " * 20 + "\n" for i in range(900)]
    for name in ("stem_documents", "code_documents"):
        monkeypatch.setattr(embedded, name, lambda: documents)
    printed = prepare("tiny", "--math_mb=0.3", f"--data_dir={tmp_path}").out
    for domain, pattern in {"math": "^Problem: .*", "stem": r"paragraph-\d+", "code": r"paragraph-\d+"}.items():
        found = {}
        for split, texts in split_texts(tmp_path / "tiny" / domain).items():
            matches = re.findall(pattern, "".join(texts), re.M)
            found[split] = {tuple(sorted(re.findall(r"\d+", match))) for match in matches}
        assert len(found["train"]) > 200 and len(found["val"]) > 20 and not found["train"] & found["val"]
    assert "stem: 0.0% of held-out 13-word runs occur in train" in printed


def test_docstrings_are_read_without_examples_and_short_ones(tmp_path):
    prose = 12 * "Sums of all things. "
    text = f'"""{prose}\n\n>>> 1 + 1\n2\n\nThe end."""\ndef f():\n    "Too short."\n'
    (tmp_path / "a.py").write_text(text)
    (read,) = embedded.docstring_prose(tmp_path / "a.py")
    assert read.startswith("Sums") and read.endswith("The end.\n") and not re.search(r">>>|^2$", read, re.M)


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


# ----------------------------------------------------------------------------------------------------- speedrun, report


def test_the_speedrun_goes_on_where_it_was_killed_and_ends_with_a_report(corpus_dir, tmp_path):
    """On a small corpus, in steps of seconds."""
    folder = copy_of_repository(tmp_path)
    shutil.copytree(corpus_dir, folder / "data/tiny")
    prepare("tiny_sft", "--math_mb=0.05", f"--data_dir={folder / 'data'}")
    (folder / "out/tiny_report").mkdir(parents=True)
    (folder / "out/tiny_report/times.tsv").write_text("data\t1\nchat data\t1\n")  # the two stages that this replaces
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    command, printed = ["bash", "extras/speedrun.sh", "tiny", *CUT], ["", ""]
    for i in range(2):
        process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        for line in process.stdout:
            printed[i] += line
            if i == 0 and line.startswith("== fine-tuning"):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL, 0)[i], printed[i]
    names = [re.findall("^== ([a-z- ]+):", text, re.M) for text in printed]
    assert names == [["pretraining", "evaluation", "fine-tuning"], ["fine-tuning", "problems"]]
    text = (folder / "out/tiny_report/report.md").read_text()
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", text, re.M)
    assert len(pictures) == 4 and all((folder / "out/tiny_report" / name).exists() for name in pictures)
    lines = ["Held-out text of data/tiny at step 2:", "](1_tiny_layers.png)", "## out/tiny_sft", "Machine: "]
    lines += ["| fine-tuning | 0:", "| 2 | ", "| word problems | 40 |", "`max_steps`"]
    assert not [line for line in [*lines, "Ada has 52 stamps"] if line not in text]


def test_a_report_is_of_finished_runs_alone(run_small, tmp_path):
    run_small(max_steps=3)
    (tmp_path / "log.jsonl").write_text("")
    unfinished = "has not finished: its last evaluation was at step 0 of 3"
    for folder, message in ((tmp_path, unfinished), ("x", "x is not the folder of a run")):
        assert message in error_of(run_main, report, f"--out_dir={tmp_path}/report", f"--runs={folder}")
    assert not (tmp_path / "report").exists()


def test_a_report_shows_the_domains_of_all_evaluations_and_names_a_run_that_diverged(run_small, tmp_path):
    evaluations = [{"step": i, "val": {name: {"bits_per_byte": 1.5}}, "routing": {}} for i, name in enumerate("ab")]
    assert [line for line in report.training(evaluations) if "1.500" in line] == [
        "| 0 | 1.500 |  |",
        "| 1 |  | 1.500 |",
    ]
    run_small(max_steps=3)
    log = tmp_path / "log.jsonl"
    log.write_text(re.sub('"loss": [0-9.]+, "bits', '"loss": null, "bits', log.read_text()))
    assert "has diverged" in error_of(run_main, report, f"--out_dir={tmp_path}/report", f"--runs={tmp_path}")


# ---------------------------------------------------------------------------------------------------------------- wandb


def test_a_run_goes_on_in_its_own_wandb_run(run_small, tmp_path, monkeypatch):
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
    assert step_of(tmp_path) == 2  # the old run is intact
