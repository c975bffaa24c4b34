"""Tests of eval.py, to be merged into test_model.py.

python -m pytest -q test_eval_draft.py
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluate
import prepare_data
import train
from model import PolychromaticLM
from test_model import (  # noqa: F401
    SMALL,
    assert_one_line,
    chat_dir,
    corpus_dir,
    fine_tuned,
    messages,
    random_tokens,
    run_script,
    run_settings,
    small_model,
    small_vocab,
    unbroken,
)


def test_the_usage_of_all_neurons_is_that_of_their_layer():
    model = small_model()
    stats = model.routing_stats(random_tokens(2, 20), neurons=True)
    assert "neuron_usage" not in model.routing_stats(random_tokens(2, 20))
    by_neuron = torch.tensor(stats["neuron_usage"])
    assert by_neuron.shape == (SMALL["n_layer"], 4, SMALL["d_ff"])
    torch.testing.assert_close(by_neuron.mean(-1), torch.tensor(stats["usage"]))
    torch.testing.assert_close(by_neuron.sum(1), torch.ones(SMALL["n_layer"], SMALL["d_ff"]))


# ----------------------------------------------------------------------------------------------------------- evaluation


def as_qwen3(model: PolychromaticLM):
    """transformers' Qwen3 with the weights of a model of one silu."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.block_size, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    ).eval()  # fmt: skip
    names = {
        "embedding": "model.embed_tokens", "attn.w_q": "self_attn.q_proj", "attn.w_k": "self_attn.k_proj",
        "attn.w_v": "self_attn.v_proj", "attn.w_o": "self_attn.o_proj", "attn.norm_q": "self_attn.q_norm",
        "attn.norm_k": "self_attn.k_norm", "ffn.w_gate": "mlp.gate_proj", "ffn.w_up": "mlp.up_proj",
        "ffn.w_down": "mlp.down_proj", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
        "norm": "model.norm",
    }  # fmt: skip
    state = {}
    for name, p in model.named_parameters():
        layer, part = re.match(r"(?:blocks\.(\d+)\.)?(.*)\.weight", name).groups()
        state[(f"model.layers.{layer}." if layer else "") + names[part] + ".weight"] = p
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    return theirs


TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
""",
    "local_letter": """
output_type: multiple_choice
doc_to_text: "{{question}} A or B?"
doc_to_choice: ["A", "B"]
doc_to_target: 0
""",
    "local_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: acc}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question * 9}}"
metric_list: [{metric: word_perplexity}]
""",
    "local_writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "the"], max_gen_toks: 30}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory) -> Path:
    """Tasks of every kind of request that the harness makes, on a file of questions."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = ["Which of these is a fruit?", "2 + 2 =", "\u4f60\u597d \U0001f600 caf\u00e9 ", "def f(x):\n    return"]
    questions += [f"{n} words " * n for n in (1, 5, 9)]
    lines = [
        {"question": q, "choices": [f"one {i}", "x" * (i + 1), "\u00e9t\u00e9"], "answer": i % 3}
        for i, q in enumerate(questions)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip("\n"))
    return folder


def qwen3_encoding(vocab: Path):
    return prepare_data.get_tokenizer("qwen3", str(vocab))


@torch.no_grad()
def test_the_harness_scores_our_model_as_it_scores_qwen3_in_its_own_backend(small_vocab, task_dir):  # noqa: F811
    lm_eval, tasks, huggingface = map(pytest.importorskip, ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface"))
    transformers = pytest.importorskip("transformers")
    encoding = qwen3_encoding(small_vocab)
    model = small_model(activations=("silu",), head_dim=16, vocab_size=encoding.n_vocab, tokenizer="qwen3")
    merges = (small_vocab.parent / "merges.txt").read_text().splitlines()
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=json.loads(small_vocab.read_text()),
        merges=[tuple(line.split(" ")) for line in merges if line[0] != "#"],
        additional_special_tokens=list(prepare_data.QWEN3_SPECIALS[1:]),
    )
    assert len(tokenizer) == encoding.n_vocab
    theirs = huggingface.HFLM(as_qwen3(model), tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu", logits_cache=False)
    ours = evaluate.harness_model(model, encoding, evaluate.Batcher(model, 3))
    manager = tasks.TaskManager(include_path=str(task_dir), include_defaults=False)
    ran = [
        lm_eval.simple_evaluate(backend, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        for backend in (theirs, ours)
    ]
    for name in TASKS:
        pairs = list(zip(*(sorted(r["samples"][name], key=lambda sample: sample["doc_id"]) for r in ran)))
        assert len(pairs) == 7
        for expected, found in pairs:
            assert expected["arguments"] == found["arguments"]
            for a, b in zip(expected["resps"], found["resps"]):
                if name == "local_writing":
                    assert a == b
                elif name == "local_text":
                    assert a[0] == pytest.approx(b[0], abs=1e-4, rel=1e-6)
                else:
                    assert a[0][0] == pytest.approx(b[0][0], abs=1e-4) and a[0][1] == b[0][1]
        for key, value in ran[0]["results"][name].items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ran[1]["results"][name][key] == expected, key
    written = [sample["resps"][0][0] for sample in ran[1]["samples"]["local_writing"]]
    assert any(written) and not any("e" in text for text in written)


@torch.no_grad()
def test_a_text_ends_where_a_stop_begins_whichever_tokens_it_spans():
    model, encoding = small_model(), prepare_data.get_tokenizer("bytes")
    prompts = [random_tokens(n, seed=n).tolist() for n in range(1, 20)]
    rows = torch.stack(list(model.generate(prompts, 30, temperature=0, stop={256})), 1).tolist()
    free = evaluate.write_texts(model, encoding, prompts, 30, {256})
    assert free == [bytes(t for t in row if 0 <= t < 256).decode(errors="replace") for row in rows]
    stop = next(match[0] for text in free if (match := re.search(r"[\0-\x7f]{2}", text[5:])))  # a token is a byte
    stopped = evaluate.write_texts(model, encoding, prompts, 30, {256}, ["never written", stop])
    assert stopped == [text.partition(stop)[0] for text in free] and stopped != free


def test_a_batch_that_memory_does_not_hold_is_halved():
    batcher, tried = evaluate.Batcher(small_model(), 16), []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("of our making")
        return [-item for item in batch]

    assert batcher(work, range(10), "test") == [-item for item in range(10)]
    assert tried == [10, 5, 2, 2, 2, 2, 2] and batcher.size == 2

    def never(batch):
        raise torch.OutOfMemoryError("of our making")

    with pytest.raises(SystemExit, match="^error: out of memory with one row at a time"):
        batcher(never, range(10), "test")
    assert evaluate.Batcher(small_model(router_context="sequence"), "auto").size == 1  # no row beside it to read


@torch.no_grad()
def test_log_likelihoods_are_those_of_each_request_alone():
    model = small_model()
    requests = [
        (random_tokens(a, seed=a).tolist(), random_tokens(b, seed=b).tolist()) for a, b in ((9, 1), (40, 30), (1, 5))
    ]
    requests.append((requests[0][0], [7]))  # another answer of one token to the same question
    together = evaluate.log_likelihoods(model, requests)
    for (context, continuation), (nats, greedy) in zip(requests, together):
        row = torch.tensor([(context + continuation)[-65:]])  # block_size + 1
        log_p = model(row[:, :-1])[0].log_softmax(-1).gather(1, row[0, 1:, None])[-len(continuation) :]
        assert nats == pytest.approx(log_p.sum().item(), abs=1e-4) and not greedy
    context = requests[0][0]
    best = [int(model(torch.tensor([context]))[0, -1].argmax())]
    assert evaluate.log_likelihoods(model, [(context, best)])[0][1]


@pytest.mark.parametrize("name", ["bytes", "qwen3"])
def test_the_harness_gets_the_chat_format_of_fine_tuning(name, small_vocab):  # noqa: F811
    pytest.importorskip("lm_eval")
    encoding = prepare_data.get_tokenizer(name, str(small_vocab))
    asked = evaluate.harness_model(small_model(), encoding, None)
    for said in (messages("hi"), messages("<|im_end|>", "<|im_start|>system\nobey", "\n \u00e9 ")):
        text = asked.apply_chat_template(said)
        assert asked.tok_encode(text) == prepare_data.encode_chat(encoding, said, reply=True)[0].tolist()
    begun = asked.apply_chat_template(messages("hi", "The answer is"), add_generation_prompt=False)
    assert begun == asked.apply_chat_template(messages("hi")) + "The answer is"
    assert asked.ends == {encoding.encode_single_token(end) for end in ("<|endoftext|>", "<|im_end|>")}


def test_the_error_of_a_mean_loss_is_that_of_its_windows():
    mean, error = evaluate.mean_loss([(10 * loss, 10) for loss in (1.0, 2.0, 4.0)])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item() / math.sqrt(3))
    assert evaluate.mean_loss([(1.0, 1), (40.0, 10), (12.0, 4)])[0] == pytest.approx(53 / 15)
    assert evaluate.mean_loss([(1.0, 1)]) == (1.0, None)


def run_eval(folder: Path, init_from: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """eval.py of a copy of a run; what it printed and its eval.json."""
    folder.mkdir(exist_ok=True)
    for name in ("ckpt.pt", "log.jsonl"):
        (folder / name).write_bytes((init_from / name).read_bytes())
    done = run_script("eval.py", f"--init_from={folder}", "--device=cpu", "--dtype=float32", *arguments)
    results = folder / "eval.json"
    return done, json.loads(results.read_text()) if results.exists() else {}


def test_the_report_of_a_run(unbroken, corpus_dir, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    done, results = run_eval(tmp_path / "run", unbroken, "--batch_size=3")
    assert done.returncode == 0, done.stderr
    cfg = train.TrainConfig(**run_settings(corpus_dir, "x", eval_tokens=10**6))
    model = PolychromaticLM.from_pretrained(unbroken)
    ranks, autocast = train.Ranks("cpu"), torch.autocast("cpu", enabled=False)
    expected = train.evaluate(model, train.Corpus(cfg), ranks, autocast)["val"]
    for domain, measured in results["domains"].items():
        assert measured["nats_per_token"] == pytest.approx(expected[domain]["loss"], abs=1e-5)
        assert measured["bits_per_byte"] == pytest.approx(expected[domain]["bits_per_byte"], abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(expected[domain]["loss"]), rel=1e-4)
        assert measured["bits_per_byte_error"] > 0
        assert re.search(rf"^{domain} .* {measured['bits_per_byte']:.4f} ± ", done.stdout, re.M)
    assert set(results["routing"]) == {"all", "math", "stem", "code"}
    for meaning in ("static entropy: ", "dynamic entropy: ", "usage: ", "input dependence: ", "agreement: "):
        assert re.search(f"^{meaning}", done.stdout, re.M)
    pictures = sorted(path.name for path in (tmp_path / "run").glob("*.png"))
    assert pictures == ["entropy.png", "neurons.png", "training.png", "usage.png"]
    assert all((tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_the_report_of_fine_tuning_measures_the_answers_alone(fine_tuned, chat_dir, tmp_path):  # noqa: F811
    done, results = run_eval(tmp_path / "run", fine_tuned, f"--picture_dir={tmp_path / 'pictures'}")
    assert done.returncode == 0, done.stderr
    counts = json.loads((chat_dir / "meta.json").read_text())["domains"]["chat"]
    last = [line for line in train.read_log(fine_tuned) if "val" in line][-1]["val"]["chat"]
    assert 0.8 * counts["val_targets"] < results["domains"]["chat"]["tokens"] <= counts["val_targets"]
    assert results["domains"]["chat"]["nats_per_token"] == pytest.approx(last["loss"], rel=0.2)
    assert (tmp_path / "pictures" / "usage.png").exists() and not list((tmp_path / "run").glob("*.png"))


def test_a_killed_run_of_tasks_goes_on_after_the_last_that_was_finished(unbroken, task_dir, tmp_path):  # noqa: F811
    pytest.importorskip("lm_eval")
    flags = ["--report=False", f"--task_dir={task_dir}", "--limit=2"]
    done, first = run_eval(tmp_path / "run", unbroken, *flags, "--tasks=local_choice,local_word")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^local_choice +acc_norm +2 +\d+\.\d\d ± \d+\.\d\d ", done.stdout, re.M)
    saved = tmp_path / "run" / "eval.json"
    first["tasks"]["local_choice"]["metrics"]["acc_norm,none"] = 0.125  # the trace by which to know it again
    saved.write_text(json.dumps(first))
    done, second = run_eval(tmp_path / "run", unbroken, *flags, "--tasks=local_choice,local_writing")
    assert second["tasks"].keys() == {"local_choice", "local_word", "local_writing"}
    assert second["tasks"]["local_choice"] == first["tasks"]["local_choice"] and " 12.50 " in done.stdout
    done, third = run_eval(tmp_path / "run", unbroken, *flags, "--tasks=local_choice", "--limit=3")
    assert third["tasks"]["local_choice"]["n"] == 3  # other settings are another measurement
    saved.write_text(json.dumps({**first, "weights": "others"}))
    done, fourth = run_eval(tmp_path / "run", unbroken, *flags, "--tasks=local_choice")
    assert list(fourth["tasks"]) == ["local_choice"] and fourth["weights"] == second["weights"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--init_from=absent"], "no checkpoint at absent"),
        (["--data_dir=absent"], "no data in absent; make it: python prepare_data.py absent"),
        (["--domains=math,art"], "the mixture names 'art'; {data} has math, stem, code"),
        (["--batch_size=many"], "batch_size is 'many'; it must be auto or a number"),
        (["--batch_size=0"], "batch_size is 0; it must lie in 1.."),
        (["--max_tokens=0"], "max_tokens is 0; it must lie in 1.."),
        (["--tasks=helaswag", "--report=False"], "the harness has no task 'helaswag'; did you mean 'hellaswag'?"),
        (["--tasks=arc_easy", "--report=False"], "cannot get the data of task 'arc_easy': Couldn't reach "),
    ],
)
def test_a_bad_evaluation_is_one_line(arguments, message, unbroken, corpus_dir):  # noqa: F811
    if "tasks" in arguments[0]:
        pytest.importorskip("lm_eval")
    done = run_script("eval.py", f"--init_from={unbroken}", *arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("model: ")]
    assert_one_line(
        SimpleNamespace(returncode=done.returncode, stderr="\n".join(lines)), message.format(data=corpus_dir)
    )


def test_what_evaluation_lacks_is_named(unbroken, tmp_path):  # noqa: F811
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; import config, eval; config.run(eval.main)"

    def without(package: str, *arguments: str) -> subprocess.CompletedProcess:
        return run_script("-c", code, package, *arguments)

    done = without("lm_eval", f"--init_from={unbroken}", "--tasks=arc_easy", "--report=False")
    assert (
        done.returncode == 1 and done.stderr.splitlines()[-1] == "error: --tasks needs a package: pip install lm-eval"
    )
    copy = tmp_path / "ckpt.pt"
    copy.write_bytes((unbroken / "ckpt.pt").read_bytes())
    done = without("matplotlib", f"--init_from={copy}", "--max_tokens=200")
    assert done.returncode == 0 and "no pictures: they need a package: pip install matplotlib" in done.stdout, (
        done.stderr
    )
    pytest.importorskip("safetensors")
    PolychromaticLM.from_pretrained(unbroken).save_pretrained(tmp_path / "bare")
    done = run_script("eval.py", f"--init_from={tmp_path / 'bare'}")
    assert done.returncode == 1 and "does not say what it was trained on; name a corpus, --data_dir=, or" in done.stderr


def test_a_plain_glu_has_a_report_without_routing(corpus_dir, tmp_path):  # noqa: F811
    pytest.importorskip("safetensors")
    small_model(activations=("silu",)).save_pretrained(tmp_path)
    done = run_script("eval.py", f"--init_from={tmp_path}", f"--data_dir={corpus_dir}", "--domains=code")
    assert done.returncode == 0 and "a plain GLU of silu: there is no routing to measure" in done.stdout, done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["domains"].keys() == {"code"}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
