"""Tests of common/, prepare_data.py, sample.py and eval.py. Shared helpers and fixtures are in test_model.py."""

import contextlib
import dataclasses
import functools
import gzip
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
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import common.generate as generation
import common.settings as config
import eval as evaluate
import prepare_data
import sample
import sft
import train
from common import data, tokenizer
from common import run as machine
from common.routing import routing_stats
from common.run import Ranks, build_model, pick_device, read_log
from common.weights import (
    from_pretrained,
    load_weights,
    newest_checkpoint,
    save_pretrained,
    starting_model,
    upcycle,
)  # fmt: skip
from extras import bench, embedded, report, study
from model import ACTIVATIONS, KVCache, ModelConfig, PolychromaticLM, set_tau
from test_model import (
    CAUSAL,
    OUR_CODE,
    ROOT,
    ROUTERS,
    SAMPLE,
    SMALL,
    assert_one_line,
    assert_same_run,
    chat_arguments,
    command_of,
    damage_corpus,
    error_of,
    fenced,
    flags,
    generated,
    losses_of,
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
    settings_from,
    small_model,
    source_of,
    split_texts,
    write_chat_source,
    write_jsonl,
)

pytest_plugins = ["test_model"]  # its fixtures


# ------------------------------------------------------------------------------------------------- settings and scripts


def load(*argv: str):
    return config.load(train.TrainConfig, list(argv))


def test_settings_come_from_defaults_then_files_then_flags(tmp_path):
    path = tmp_path / "settings.py"
    path.write_text("lr = 3e-4\nmax_steps = 7\nactivations = ('relu', 'tanh')\nmixture_end = None\ncompile = False\n")
    overrides = ["--mixture.math=0.55", "--mixture.stem", "0.45", "--out_dir", "7", "--activations=silu", "out/tiny"]
    cfg = load(str(path), "--compile", "--gumbel", "false", "--max_steps=1e3", *overrides)
    assert (cfg.lr, cfg.max_steps, cfg.compile, cfg.gumbel, cfg.out_dir) == (3e-4, 1000, True, False, "7")
    assert cfg.mixture == {"math": 0.55, "stem": 0.45} and cfg.mixture_end is None and cfg.batch_size == 128
    assert cfg.activations == ("silu",) and cfg.init_from == "out/tiny"
    assert {"lr", "out_dir", "init_from"} < cfg.overridden and "seed" not in cfg.overridden
    off = load("--wandb=x", "--wandb=", "--init_from=none", "--frozen=")
    assert off.wandb is None and off.init_from is None and off.frozen == ()
    text = "the cat sat on a mat " * 300  # a text is not parsed, which would take more memory than Python allows
    assert config.load(sample.SampleConfig, ["--prompt", text]).prompt == text
    assert load("--out_dir=~/x").out_dir == os.path.expanduser("~/x")
    path.write_bytes(b"\xef\xbb\xbflr = 0.5\r\n")  # as Notepad writes it
    assert load(str(path)).lr == 0.5


def test_a_bad_setting_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments, message in {
        "--max_step=5": "--max_step: there is no setting 'max_step'; did you mean 'max_steps'?",
        "--gradient_accumulation_steps=8": "did you mean 'batch_size' and 'micro_batch_size'?",
        "--dropout=0.1": "--dropout: there is no setting 'dropout'; --help lists them",
        "--init_from=resume": "init_from='resume' is nanoGPT's; here it is --resume",
        "-p hello": "-p: no such flag; --help lists them",
        "-overwrite": "-overwrite: a flag starts with two dashes, --overwrite",
        "--max_steps=1.5": "--max_steps takes a whole number, not 1.5",
        "--out_dir=": "--out_dir is empty; give it a value, or leave it out",
        "--max_steps --compile": "--max_steps needs a value",
        "--resume yes": "--resume takes True or False, not 'yes'",
        "max_steps=5": "'max_steps=5' is not a flag; did you mean --max_steps=5?",
        "out/a out/b": "'out/a' and 'out/b' are two models; name one",
        "--lr=0": "lr is 0.0; it must lie in 1e-12..1e+12",
        "--activations=relu,swish": "unknown activation 'swish'; there are relu, tanh, silu, gelu",
        "--n_kv_head=3": "n_head is 16; it must be a multiple of n_kv_head, 3",
        "--head_dim=7": "head_dim is 7; rotary positions need an even one",
        "--router_hidden=-1": "router_hidden is -1; it must be 0 or more",
        "--activations=silu,silu": "name at least one, each once",
        "--router_context=past": "unknown router_context 'past'; there are prefix, token, sequence",
        "--batch_size=3": "batch_size is 3; it must be a multiple of micro_batch_size 8; change either",
        "--resume --overwrite": "resume and overwrite cannot be combined",
        "--min_lr=1": "min_lr is 1.0; it must lie in 0..0.0001",
        "config/tinny.py": "cannot read config/tinny.py: No such file or directory; did you mean config/tiny.py?",
        "config/tiny": "'config/tiny' is not a file of settings; did you mean config/tiny.py?",
    }.items():
        assert message in error_of(load, *arguments.split())
    assert error_of(load, "") == "an argument is empty; a variable of the shell may be unset"
    assert load("--compile", "None").compile is None
    assert load("--frozen", "1,2").frozen == ("1", "2") and load("--frozen=a, b").frozen == ("a", "b")
    path = tmp_path / "settings.py"
    for text, message in {
        "lr = 1\nmax_steps = 'x'": "settings.py:2: max_steps takes a whole number, not 'x'",
        "def f():\n    return 1": "settings.py:1: expected `name = value` with a literal value, found `def f():`",
        "lr = ": "not lines of `name = value`",
        "out_dir = 'a\\0b'": "settings.py:1: out_dir has a null character",
    }.items():
        path.write_text(text)
        assert message in error_of(load, str(path))


def test_an_error_of_the_user_is_one_line_and_a_bug_keeps_its_traceback():
    for error, raised in {
        config.UserError("no such thing"): (SystemExit, "^error: no such thing$"),
        ValueError("a bug"): (ValueError, "^a bug$"),
    }.items():
        with pytest.raises(raised[0], match=raised[1]):
            config.run(mock.Mock(side_effect=error))


def test_a_script_that_is_stopped_or_runs_out_of_memory_says_so_in_one_line():
    for code, message in {
        "os.kill(os.getpid(), signal.SIGINT)": "stopped",  # as in the imports, before run()
        "settings.run(lambda: os.kill(os.getpid(), signal.SIGINT))": "stopped",
        "settings.run(lambda: os.kill(os.getpid(), signal.SIGTERM))": "stopped by SIGTERM",
        "settings.run(lambda: os.kill(os.getpid(), signal.SIGHUP))": "stopped by SIGHUP",
        "settings.run(lambda: print(flush=True, file=open('/dev/full', 'w')))": "cannot print: No space left on device",
        "error = PermissionError(13, 'Permission denied', 'val.bin'); settings.run(mock.Mock(side_effect=error))":
            "cannot use val.bin: Permission denied",
        "import torch; settings.run(lambda: torch.empty(2**60))":
            "out of memory (tried to allocate 4611686018427387904 bytes); use smaller batches or a smaller model",
        "settings.run(lambda: open('x' * 999))": f"cannot use {'x' * 999}: File name too long",
    }.items():  # fmt: skip
        done = run_script("-c", f"import os, signal; from unittest import mock; from common import settings; {code}")
        assert done.returncode and done.stderr == f"error: {message}\n"


def test_typed_bytes_that_are_no_text_do_not_end_a_script():
    code = "from common import settings; settings.run(lambda: print(ascii(input())))"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = run_script("-c", code, input=b"a\xff\n", text=False, env=environment)
    assert done.stdout.split() == [rb"'a\ufffd'"], done.stderr


def test_one_process_alone_is_the_main_one_whatever_its_environment_says(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.is_main, [*ranks.items(3)]) == (0, True, [0, 1, 2])


def test_the_command_to_resume_is_that_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "config/a b.py", "--overwrite", "True", "--resume=false", "--lr=1"])
    assert machine.resume_command() == "python train.py 'config/a b.py' --lr=1 --resume"
    for name, value in {"LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    torchrun = "torchrun --nproc_per_node=8 --shutdown_timeout=600 --nnodes=2 --rdzv_backend=c10d"
    command = f"{torchrun} --rdzv_endpoint=node0:29500 train.py 'config/a b.py' --lr=1 --resume"
    assert machine.resume_command() == command


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    study_or_train = study.StudyConfig if path.stem.startswith("study") else train.TrainConfig
    config.load(sft.SFTConfig if "sft" in path.stem else study_or_train, [str(path)])


@pytest.mark.parametrize("cls", [
    train.TrainConfig, sft.SFTConfig, sample.SampleConfig, evaluate.EvalConfig, bench.BenchConfig, study.StudyConfig,
    report.ReportConfig, *dict.fromkeys(settings for settings, *_ in prepare_data.CORPORA.values()),
])  # fmt: skip
def test_help_lists_every_setting_with_its_value_and_comment(cls, capsys):
    with pytest.raises(SystemExit) as done:
        config.load(cls, ["--help"])
    text = capsys.readouterr().out
    missing = [f.name for f in dataclasses.fields(cls) if not re.search(rf"^  --{f.name}=.*(  |\n +)\S", text, re.M)]
    assert done.value.code == 0 and not missing


def test_two_processes_never_write_to_one_folder(corpus_dir, tmp_path):
    folder, preparation = tmp_path / "tiny", ["prepare_data.py", "tiny", f"--data_dir={tmp_path}"]
    runs = [command_of(run_settings(corpus_dir, folder), script=script) for script in ("train.py", "sft.py")]
    folder.mkdir()
    with machine.locked(folder):
        for command in (*runs, preparation):
            assert_one_line(run_script(*command), "another process is writing to", "tiny; wait")
    assert {path.name for path in tmp_path.rglob("*")} == {"tiny", ".lock"}


def test_a_reader_that_goes_away_ends_a_script_without_a_word(unbroken):
    command = f"{shlex.quote(sys.executable)} sample.py --out_dir={shlex.quote(str(unbroken))} --num_samples=99"
    done = subprocess.run(f"{command} | head -c 20", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert len(done.stdout) == 20 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


# ------------------------------------------------------------------------------------------------------- tokens on disk


def test_special_tokens_follow_the_vocabulary_and_never_come_from_text(small_vocab, tmp_path):
    ids = json.loads(small_vocab.read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**ids, "<|endoftext|>": len(ids)}))  # GPT-2's file lists it
    for name, vocab, first, n_special in (
        ("bytes", None, 256, 3),
        ("gpt2", str(tmp_path / "vocab.json"), len(ids), 3),
        ("qwen3", str(small_vocab), len(ids), 26),
    ):
        encoding = tokenizer.get_tokenizer(name, vocab)
        specials = [encoding.encode_single_token(special) for special in tokenizer.QWEN3_SPECIALS[:n_special]]
        assert specials == list(range(first, encoding.n_vocab)) and encoding.eot_token == first
        tokens = tokenizer.encode(encoding, SAMPLE)
        expected = unicodedata.normalize("NFC", SAMPLE) if name == "qwen3" else SAMPLE
        assert tokens.max() < first and encoding.decode(tokens.tolist()) == expected


def test_qwen3_tokens_equal_those_of_transformers(small_vocab):
    scripts = [(0x20, 0x700), (0x900, 0xE00), (0x2000, 0x3200), (0x4E00, 0xD7A4), (0x1F300, 0x1F700)]
    characters, rng = [chr(c) for script in scripts for c in range(*script)], random.Random(0)
    text = OUR_CODE + "".join(characters + rng.choices(SAMPLE, k=100_000) + rng.choices(characters, k=100_000))
    text = text.replace("<|", "< |")  # theirs would take it for a special token
    ours = tokenizer.encode(tokenizer.get_tokenizer("qwen3", str(small_vocab)), text)
    assert ours.tolist() == qwen3_tokenizer(small_vocab)(text, add_special_tokens=False)["input_ids"]


def test_the_split_is_by_the_text_alone(tmp_path):
    documents = [f"document {i}" for i in range(2000)] * 2
    prepare_data.write_corpus(tmp_path, tokenizer.get_tokenizer("bytes"), {"a": source_of(documents, val_fraction=0.1)})
    counts, texts = json.loads((tmp_path / "meta.json").read_text())["domains"]["a"], split_texts(tmp_path / "a")
    assert sorted(texts["train"] + texts["val"]) == sorted(documents) and not set(texts["train"]) & set(texts["val"])
    assert len(set(texts["val"])) == pytest.approx(200, abs=50) and counts["val_bytes"] == len("".join(texts["val"]))
    for split in texts:
        assert counts[f"{split}_tokens"] == sum(len(text) + 1 for text in texts[split])


def test_texts_that_differ_in_white_space_or_unicode_form_alone_are_in_one_split(small_vocab, tmp_path):
    texts = [f"Caf\u00e9 {i}\nau lait" for i in range(200)]
    variants = [
        variant for text in texts for variant in (
            text, unicodedata.normalize("NFD", text), text.replace("\n", "\r\n"), text.replace(" ", "\u00a0"),
            f"\t{text} \n",
        )
    ]  # fmt: skip
    variants += [f"Caf\u00e9 {i}{end}" for i in range(200, 300) for end in ("\ud800", "\ufffd")]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "content": text} for text in variants])
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages(text, "yes")} for text in variants])
    sources = [f"--source.{domain}={tmp_path}/a.jsonl" for domain in ("math", "stem", "code")]
    common = f"--vocab={small_vocab}", f"--data_dir={tmp_path}", "--val_fraction=0.2"
    prepare("pretrain", *sources, *common)
    prepare("sft", f"--source={tmp_path}/chat.jsonl", *common)
    encoding, held_out = tokenizer.get_tokenizer("qwen3", str(small_vocab)), {}
    for folder in "pretrain/math", "sft/chat":
        for split in ("train", "val"):
            ids = np.fromfile(tmp_path / folder / f"{split}.bin", np.uint16)
            held_out[split] = set(map(int, re.findall(r"Caf\u00e9\D+(\d+)", encoding.decode(ids.tolist()))))
        assert sorted([*held_out["train"], *held_out["val"]]) == list(range(300))
        assert len(held_out["val"]) == pytest.approx(60, abs=20)


def test_documents_without_text_are_left_out_and_counted_across_a_kill(tmp_path, monkeypatch):
    rows = [{"text": text} for i in range(300) for text in (f"document {i}", "", " \n\t\u3000", None, 5, ["a"])]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {}])
    write_chat_source(tmp_path / "chat.jsonl")
    arguments = [f"--source.{domain}={tmp_path}/a.jsonl" for domain in ("math", "stem", "code")]
    arguments += [f"--text_field.{domain}=text" for domain in ("stem", "code")]
    arguments += ["--tokenizer=bytes", "--val_fraction=0.2", "--commit_seconds=0"]
    whole = prepare("pretrain", *arguments, f"--data_dir={tmp_path}/whole")
    for line in "math: 900 left out: no text", "math: 600 left out: not text", "code: 1 left out: no field 'text'":
        assert line in whole.out
    texts = split_texts(tmp_path / "whole/pretrain/math")
    assert sorted(texts["train"] + texts["val"]) == sorted(f"document {i}" for i in range(300))
    encode, calls = prepare_data.encode_document, []

    def stop_at_700(*arguments):
        calls.append(1)
        if len(calls) == 700:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(prepare_data, "encode_document", stop_at_700)
    stopped = "pretrain", *arguments, f"--data_dir={tmp_path}/stopped"
    assert error_of(prepare, *stopped) == "stopped; run the same command again to resume"
    assert prepare(*stopped).out == whole.out.replace("/whole/", "/stopped/")
    assert corpus_bytes(tmp_path / "stopped") == corpus_bytes(tmp_path / "whole")


@pytest.fixture(scope="session")
def source_dir(tmp_path_factory) -> Path:
    """Local files of each domain, in each format that is read."""
    datasets, folder, text = pytest.importorskip("datasets"), tmp_path_factory.mktemp("sources"), SAMPLE + OUR_CODE
    documents = [text[i : i + 50 + i % 2950] for i in range(0, 60_000, 13)]
    for i in range(0, 2700, 900):
        datasets.Dataset.from_dict({"text": documents[i : i + 900]}).to_parquet(folder / f"m{i}.parquet")
    write_jsonl(folder / "s.jsonl", [{"content": text, "score": 1.0} for text in (*documents[2700:4200], None)])
    for i in range(4200, 4600, 4):
        (folder / f"c{i}.txt").write_text("\n".join(documents[i : i + 4]).replace("\0", ""), newline="")
    return folder


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.suffix in (".bin", ".mask") or path.name == "meta.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def bytes_written(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # renamed just now: count again
        return sum(path.stat().st_size for path in folder.rglob("*.bin*"))
    return bytes_written(folder)


@pytest.mark.parametrize("corpus", ["pretrain", "sft"])
def test_a_killed_preparation_resumes_to_the_same_bytes(corpus, source_dir, small_vocab, tmp_path):
    sources = {"math": "parquet", "stem": "jsonl", "code": "txt"}
    arguments = [f"--source.{domain}={source_dir}/*.{suffix}" for domain, suffix in sources.items()]
    arguments = ["pretrain", *arguments, f"--vocab={small_vocab}", "--val_fraction=0.1"]
    if corpus == "sft":
        arguments = chat_arguments(write_chat_source(tmp_path / "chat.jsonl", 4000))
    prepare(*arguments, f"--data_dir={tmp_path}/whole")
    whole, size = corpus_bytes(tmp_path / "whole" / corpus), bytes_written(tmp_path / "whole")
    command = ["prepare_data.py", *arguments, f"--data_dir={tmp_path}/killed", "--commit_seconds=0"]
    for share in (0.2, 0.6):
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and bytes_written(tmp_path / "killed") < share * size:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / corpus / "meta.json").exists()
    prepare(*command[1:])
    assert corpus_bytes(tmp_path / "killed" / corpus) == whole
    assert len(whole) == (7 if corpus == "pretrain" else 5)


def test_a_full_disk_leaves_the_corpus_before_it_and_the_preparation_resumes(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        Path(f"{name}.txt").write_text("".join(f"{name} {i}\n\n" for i in range(40_000)))
    prepare("text", "--source=old.txt")
    before, new = corpus_bytes(tmp_path / "data"), ("text", "--source=new.txt", "--max_length=16")
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))  # no file may grow beyond this size
    try:
        assert "cannot prepare data/text: [Errno 27] File" in error_of(prepare, *new, "--commit_seconds=0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert corpus_bytes(tmp_path / "data") == before
    for folder in ("data", "other"):
        prepare(*new, f"--data_dir={folder}")
    assert before != corpus_bytes(tmp_path / "data") == corpus_bytes(tmp_path / "other")


def test_the_command_that_an_error_names_repairs_a_damaged_corpus_and_leaves_a_sound_one(tmp_path):
    source = write_chat_source(tmp_path / "chat.jsonl")
    command = *chat_arguments(source), f"--data_dir={tmp_path}"
    prepare(*command)
    sound = corpus_bytes(tmp_path)
    for name, damage in {
        "train.bin": lambda content: bytes([content[0] ^ 1]) + content[1:],
        "val.bin": lambda content: content + b"\0\0",
        "train.mask": lambda content: content[:-1],
        "val.mask": lambda content: b"",
    }.items():
        path = tmp_path / "sft/chat" / name
        path.write_bytes(damage(path.read_bytes()))
        assert corpus_bytes(tmp_path) != sound
        prepare(*command)
        assert corpus_bytes(tmp_path) == sound
    written = path.stat().st_mtime_ns
    prepare(*command)
    assert path.stat().st_mtime_ns == written


def test_a_text_that_repeats_itself_is_taken_once_and_the_rest_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note = "left out: repeats an earlier one"
    Path("line.txt").write_text("The same line.\n" * 10_000)  # 40 equal parts and a shorter one
    assert f"text: 39 {note}" in prepare("text", "--source=line.txt").out
    assert len(split_texts(Path("data/text/text"))["train"]) == 1
    nested = error_of(prepare, "text", "--source=line.txt", "--data_dir=data/text")
    assert nested == "data/text is a corpus; --data_dir= is the folder of all corpora, for example data"
    write_jsonl(Path("row.jsonl"), [{"text": "The same row. " * 30}] * 99)
    error = error_of(prepare, "text", "--source=row.jsonl")
    assert re.search(f"too little text in .* 0 val tokens .*; 98 {note}", error)
    many = [f"row {i} of many" for i in range(300)]
    write_jsonl(Path("rows.jsonl"), [{"text": text} for row in many for text in (row, "the same row")])
    printed = prepare("text", "--source=rows.jsonl").out
    assert f"text: 299 {note}" in printed
    assert "replacing the corpus in data/text, which was made from line.txt" in printed
    texts = split_texts(Path("data/text/text"))
    assert len(texts["val"]) == 31 and sorted(texts["train"] + texts["val"]) == sorted(["the same row", *many])


def test_a_text_of_two_domains_is_taken_once(tmp_path, monkeypatch):
    """It might be held out in one domain and not in the other."""
    monkeypatch.chdir(tmp_path)
    shared = [f"Text {i}. {'x' * 99}" for i in range(60)]
    write_jsonl(Path("a.jsonl"), [{"text": text} for text in shared])
    write_jsonl(Path("b.jsonl"), [{"text": text} for text in shared + [f"{text} More." for text in shared * 3]])
    assert "b: 180 left out: repeats an earlier one" in prepare("text", "--source.a=a.jsonl", "--source.b=b.jsonl").out
    a, b = (split_texts(Path("data/text") / domain) for domain in "ab")
    assert sorted(a["train"] + a["val"]) == sorted(shared) and len(a["val"]) == 6
    assert sorted(b["train"] + b["val"]) == sorted(f"{text} More." for text in shared)
    long = [f"{i}. {'words and ' * 300}" for i in range(20)]  # cut at other places in a larger domain
    write_jsonl(Path("a.jsonl"), [{"text": text} for text in long])
    write_jsonl(Path("b.jsonl"), [{"text": text} for text in [*long, *(f"More {text}" for text in long * 3)]])
    prepare("text", "--source.a=a.jsonl", "--source.b=b.jsonl")
    b = split_texts(Path("data/text/b"))
    assert not [text for text in b["train"] + b["val"] if re.match(r"\d", text)]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_files_of_every_kind_become_a_corpus_made_anew_when_one_changes(encoding, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    a, b, c, d, e = (f"{letter}\u00e9 \n" * 100 for letter in "abcde")  # each becomes one document
    Path("a.txt").write_bytes(b"\xef\xbb\xbf" + a.replace("\n", "\r\n").encode())
    Path("c.txt").write_bytes(c.encode(encoding))
    write_jsonl(Path("d.jsonl"), [{"body": d}, {"body": None}])
    datasets.Dataset.from_dict({"body": [e]}).to_parquet("e.parquet")
    written = []
    for text in (b, b, b.swapcase()):  # of one length
        Path("[1] b.md").write_text(text)
        files = "--source=a.txt, *.md,c.txt,d.jsonl,e.parquet"
        prepare("text", files, "--domain=all", "--text_field=body", f"--encoding={encoding}")
        texts = split_texts(Path("data/text/all"))
        assert sorted(texts["train"] + texts["val"]) == sorted([a, text, c, d, e])
        written.append(Path("data/text/all/train.bin").stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]


def test_one_field_of_a_file_is_read_whatever_else_it_holds(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    huge, nested = b'{"text": "b", "other": ' + b"1" * 5000 + b"}", b'{"other": {"text": 1}, "text": "c"}'
    lines = (
        b'{"text": "a", "other": NaN}',
        b'{"text": "no", "text": "b", "x": [1e999]}',
        huge,
        nested,
        b'{"text": "\\ud800"}',
    )
    late = [
        json.dumps({"text": f"{i}" * 30, **({"late": {}} if i > 9000 else {"other": i})}).encode() for i in range(9999)
    ]
    agent = {"id": 1, "source": "s", "model": "m", "system_prompt": "p", "messages": messages("?", "!"), "text": "a"}
    gaps = b'{"text": "a"}', b"null", b"3", b"[]", b"{}", b'{"text": null}', b'{"text": ["b"]}', b'{"a": 1}'
    expected = {
        "lines [1].jsonl": (b"\n".join(lines), ["a", "b", "b", "c", "\ud800"]),
        "windows.jsonl": (b"\xef\xbb\xbf" + b"\r\n\r\n \n".join(lines) + b"\r\n", ["a", "b", "b", "c", "\ud800"]),
        "array.json": (b"\xef\xbb\xbf [\n" + b",\n".join(lines) + b"]\n", ["a", "b", "b", "c", "\ud800"]),
        "late.jsonl": (b"\n".join(late), [f"{i}" * 30 for i in range(9999)]),
        "packed.jsonl.gz": (gzip.compress(b"\n".join(lines)), ["a", "b", "b", "c", "\ud800"]),
        "agent.jsonl": (json.dumps(agent).encode(), ["a"]),
        "gaps.jsonl": (b"\n".join(gaps), ["a", None, ["b"]]),
        "long.jsonl": (b'{"text": "%s"}' % (b"x" * 10**7), ["x" * 10**7]),
        **dict.fromkeys(("empty.jsonl", "empty.json", "empty.parquet", "blank.jsonl"), (b"", [])),
        "packed.txt.gz": (gzip.compress(b"\xef\xbb\xbfa\r\nb\r"), ["a\nb\n"]),
    }
    for name, (content, _) in expected.items():
        (tmp_path / name).write_bytes(content)
    for name, columns in {
        "b b.parquet": {"other": [1, 2, 3], "text": ["a", None, "c"], "text.x": ["no"] * 3},
        "changed.parquet": {"text": ["a"] * 300, "other": ["late"] * 300, "more": [[1]] * 300},
        "none.parquet": {"text": [None, None]},
        "lacking.parquet": {"other": [1]},
        "zero.parquet": {"text": [], "other": []},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=100)
        expected[name] = None, columns.get("text", [])
    files, values, states = [str(tmp_path / name) for name in expected], [], [None]
    for value, state in prepare_data.read_files(files, "text"):
        values.append(value)
        states.append(json.loads(json.dumps(state)))
    assert [value for value in values if not isinstance(value, prepare_data.Document)] == sum(
        (t for _, t in expected.values()), []
    )
    assert [value.note for value in values if isinstance(value, prepare_data.Document)] == [
        "left out: no field 'text'"
    ] * 6
    for n in (0, 1, 3, 14, 29, 5000, *range(len(values) - 301, len(values) + 1, 43)):
        assert [value for value, _ in prepare_data.read_files(files, "text", None, states[n])] == values[n:]


def test_a_field_may_lie_within_another_one(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"a": {"b": "1", "c": 5}, "a.c": "2"}, {"a": {"b": {"d": "3"}}}, {"a": None}, {"a": "no"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.table({"a": [{"b": {"d": "4"}, "c": 1}, None], "a.c": ["5", "6"]}), tmp_path / "a.parquet")
    for field, expected in {"a.b.d": ["3", "4"], "a.c": ["2", "5", "6"], "a.b": ["1", {"d": "3"}, {"d": "4"}]}.items():
        values = [
            value for value, _ in prepare_data.read_files([f"{tmp_path}/a.{x}" for x in ("jsonl", "parquet")], field)
        ]
        assert [value for value in values if not isinstance(value, prepare_data.Document)] == expected


def test_a_damaged_file_is_named_with_its_row(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    good = b'{"text": "a"}\n'
    pq.write_table(
        pa.table({"text": ["x" * 999] * 99}), tmp_path / "good.parquet", compression="none", use_dictionary=False
    )
    parquet = (tmp_path / "good.parquet").read_bytes()
    for name, content, message in [
        ("a.jsonl", good * 3 + b"\n" + good + b'{"text": "a", }\n' + good, "JSON parse error in row 6: "),
        ("b.jsonl", good * 3 + b'{"text": "a', "JSON parse error in row 4: Unterminated string"),
        (
            "c.jsonl",
            good + '{"text": "\u00e9"}\n'.encode("latin-1"),
            "JSON parse error in row 2: 'utf-8' codec can't decode",
        ),
        ("d.jsonl", good + b"[" * 99_999, "JSON parse error in row 2: maximum recursion depth"),
        ("e.json", b'[{"text": "a"},', "JSON parse error: "),
        ("f.jsonl.gz", gzip.compress(good * 9)[:-9], "Compressed file ended before the end-of-stream marker"),
        ("g.parquet", parquet[:99], "Parquet magic bytes not found in footer"),
        ("h.parquet", parquet[:9] + bytes(20_000) + parquet[20_009:], ""),
        ("i.jsonl", b'{"body": "a"}\n{"other": 1}', "no field 'text' but body; name it: --text_field="),
        ("j.jsonl", b"null\n[]\n", "no field 'text' but rows without names; name it: --text_field="),
    ]:
        (tmp_path / name).write_bytes(content)
        error = error_of(prepare, "text", f"--source={tmp_path / name}", f"--data_dir={tmp_path}")
        assert error.startswith(f"cannot read {tmp_path / name}") and message in error


@pytest.mark.parametrize("size, length", [(2000, 512), (20_000, 512), (800_000, 16_384)])
@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_one_text_is_cut_where_it_pauses_and_train_and_val_get_their_parts(size, length, mark, tmp_path):
    (tmp_path / "a.txt").write_text(text := mark.join(map(str, range(200_000)))[:size])
    prepare("text", f"--source={tmp_path}/a.txt", f"--data_dir={tmp_path}")
    texts = split_texts(tmp_path / "text" / "text")
    *parts, last = sorted(texts["train"] + texts["val"], key=text.index)
    assert "".join(parts) + last == text and 0 < len(last) <= length
    assert all(length / 2 < len(part) <= length and part.endswith(mark) for part in parts)
    assert 0.08 < sum(map(len, texts["val"])) / size < 0.3


def test_a_text_in_gpt2_tokens_trains_by_the_command_that_is_printed(small_vocab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", "config")
    Path("input.txt").write_text(OUR_CODE[:30_000])
    arguments = "--source=input.txt", "--tokenizer=gpt2", f"--vocab={small_vocab}"
    printed = prepare("text", *arguments).out
    (command,) = re.findall("next: python train.py (.*)", printed)
    cuts = {"max_steps": 2, "eval_tokens": 256, "sample_tokens": 8, "compile": False}
    assert "step 2: sample: " in run_here({}, *shlex.split(command), *flags(cuts))


def test_a_bad_source_is_one_line_and_an_earlier_corpus_stays(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "good.txt": OUR_CODE[:9000].encode(), "binary.txt": bytes(128), "word.txt": b"word",
        "rows.jsonl": b'{"id": 1, "body": "x"}\n', "broken.jsonl": b'{"text": ',
    }.items():  # fmt: skip
        Path(name).write_bytes(content)
    prepare("text", "--source=good.txt")
    before = corpus_bytes(Path("data"))
    for arguments, message in {
        "tinny": "there is no corpus 'tinny': python prepare_data.py text | tiny | tiny_sft | pretrain | sft",
        "text": "name your text: --source=input.txt or --source='*.txt'",
        "text --source=data": "data is a folder; name its files: --source='data/*.txt'",
        "text --source.a=good.txt --source.b=word.txt": "too little text in data/text/b, 5 train and 0 val tokens (w",
        "text --source=binary.txt": "binary.txt has null characters; remove them, or if it is UTF-16, name it: --enc",
        "text --source=rows.jsonl": "cannot read rows.jsonl: no field 'text' but id, body; name it: --text_field=",
        "text --source=broken.jsonl": "cannot read broken.jsonl: JSON parse error in row 1: ",
        **{f"text --source=good.txt --{name}=": f"{name} is empty" for name in ("data_dir", "domain", "text_field")},
        "text --source=": "source is empty; give it a value, or leave it out",
        "pretrain --tokenizer=bytes --source.math=": "--source.math is empty",
        "pretrain --tokenizer=bytes --source=good.txt": "the source of which domain? --source.math=, --source.stem=",
        "text --source=good.txt --source.a=good.txt": "--source.a= and --source= cannot be combined",
        "text good.txt": "did you mean --source=good.txt?",
        "text --source=good.txt word.txt": "name several files by a pattern in quotes: --source='*.txt'",
        "text --source=good.txt --domain=../x": "the domain '../x' becomes a folder; use letters, digits, - and _",
        "text --source=good.txt --tokenizer=morse": "unknown tokenizer 'morse'; there are bytes, gpt2, qwen3",
        "tiny --val_fraction=2": "val_fraction is 2.0; it must lie in 0..1",
        "tiny --val_fraction=0": "val_fraction is 0; it must lie between 0 and 1, both excluded",
        "tiny --math_mb=-1": "math_mb is -1.0; it must lie in 0.001..1e+06",
        "sft --tokenizer=bytes --max_tokens=0": "max_tokens is 0; it must lie in 1..",
        "pretrain --tokenizer=bytes --source.art=x.txt": "there is no domain 'art'; there are math, stem, code",
        "pretrain --tokenizer=bytes": "cannot read nvidia/Nemotron-CC-Math-v1: ",
        "pretrain --vocab=word.txt": "word.txt is not a vocab.json of a byte-level BPE tokenizer (JSONDecodeError(",
    }.items():
        assert message in error_of(prepare, *arguments.split())
        assert corpus_bytes(Path("data")) == before


def test_what_comes_from_the_hub_stays_with_one_commit(small_vocab, tmp_path, monkeypatch):
    hub, datasets = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")
    get_tokenizer, download = tokenizer.get_tokenizer.__wrapped__, mock.Mock(return_value=str(small_vocab))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert get_tokenizer("qwen3").n_vocab == get_tokenizer("qwen3", str(small_vocab)).n_vocab
    assert download.call_args.kwargs == {"revision": "da87bfb608c14b7cf20ba1ce41287e8de496c0cd"}
    download.side_effect = OSError
    assert "cannot fetch the qwen3 tokenizer; name a local vocab.json: " in error_of(get_tokenizer, "qwen3")
    monkeypatch.chdir(tmp_path)
    Path("owner/a/en").mkdir(parents=True)
    Path("owner/a/README.md").write_text(
        "---\nconfigs:\n- config_name: subset\n  data_files:\n  - {split: part, path: en/*}\n---\n"
    )
    for i, other in enumerate([1, "one", [1]]):
        rows = {"text": [f"{i}: {j}" for j in range(200)], "other": [other] * 200}
        datasets.Dataset.from_dict(rows).to_parquet(f"owner/a/en/{i}.parquet", batch_size=30)
    builder = mock.Mock(side_effect=datasets.load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(
        hub.HfApi, "dataset_info", lambda api, name: SimpleNamespace(sha=f"commit {builder.call_count}")
    )
    read = functools.partial(prepare_data.read_hub, "owner/a", "subset", "part", "text")
    documents = list(read())
    assert [text for text, _ in documents] == [f"{i}: {j}" for i in range(3) for j in range(200)]
    for n in (256, 512, 600):
        assert list(read(json.loads(json.dumps(documents[n - 1][1])))) == documents[n:]
    assert {call.kwargs["revision"] for call in builder.call_args_list} == {"commit 0"}


def test_a_domain_ends_with_the_document_that_reaches_max_tokens(tmp_path):
    documents = [f"{i:09}" for i in range(2000)]  # 10 tokens each
    source = source_of(documents, val_fraction=0.2)._replace(max_tokens=4005)
    prepare_data.write_corpus(tmp_path, tokenizer.get_tokenizer("bytes"), {"a": source})
    texts = split_texts(tmp_path / "a")
    taken = sorted(texts["train"] + texts["val"])
    assert len(texts["train"]) == 401 and taken == documents[: len(taken)]


def test_an_evaluation_reads_rows_evenly_spread_over_the_split(corpus_dir):
    corpus = data.Corpus(corpus_dir, 64, "val")
    n = corpus.n_rows("math")
    assert corpus.spread_rows("math", 3 * 64 + 63).tolist() == [0, (n - 1) // 2, n - 1]
    assert corpus.spread_rows("math", 1).tolist() == [0]


def test_rows_hold_the_text_shifted_by_one_for_the_targets_and_a_document_is_one_in_all_its_rows(corpus_dir):
    corpus = data.Corpus(corpus_dir, SMALL["block_size"], "val")
    tokens, targets, doc_ids = evaluate.val_rows(corpus, "code", 10**6).swapaxes(0, 1).reshape(3, -1)
    assert [*tokens, targets[-1]] == corpus.read("code", 0, tokens.size + 1).tolist()
    assert np.array_equal(targets[:-1], tokens[1:])
    ends = tokens == corpus.end_of_text
    assert np.array_equal(doc_ids, ends.cumsum() - ends)
    assert np.bincount(doc_ids).max() > SMALL["block_size"] and doc_ids[-1] > 1


def test_an_epoch_visits_every_row_once_in_an_order_of_the_seed(corpus_dir):
    one, same, other = (data.Corpus(corpus_dir, 64, seed=seed) for seed in (1, 1, 2))
    for domain in one.domains:
        n = one.n_rows(domain)
        first, second, last = ([one.nth_row(domain, i) for i in range(e * n, (e + 1) * n)] for e in range(3))
        assert sorted(first) == sorted(second) == sorted(last) == list(range(n)) and first != second
        assert [same.nth_row(domain, 2 * n + i) for i in range(n)] == last  # asked for at once, the last epoch is equal
        assert [other.nth_row(domain, i) for i in range(n)] != first


def test_a_bad_corpus_is_one_line(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, advice in {
        "data/text": "make it: python prepare_data.py text --source=input.txt",
        "a b/sft": "make it: python prepare_data.py sft --data_dir='a b'",
        "data/nope": "prepare_data.py makes text, tiny, tiny_sft, pretrain, sft",
        corpus_dir.parent: f"did you mean --data_dir={corpus_dir}?",
    }.items():
        assert error_of(data.Corpus, folder, 64) == f"no data in {folder}; {advice}"
    for overrides, message in [
        ({"mixture": {"maths": 1.0}}, f"{corpus_dir} has no domain 'maths'; there are math, stem, code"),
        ({"mixture": {"math": 0.9}}, "the mixture {'math': 0.9} must give a share to each of math, and sum to 1"),
        ({"tokenizer": "qwen3"}, "tokenizer 'bytes' with 259 tokens, the model 'qwen3' with 259; "),
        ({"block_size": 100_000}, "fewer than block_size 100000 + 1"),
    ]:
        cfg = train.TrainConfig(**run_settings(corpus_dir, "x", **overrides))
        assert message in error_of(train.open_corpora, cfg)
    damaged = damage_corpus(corpus_dir, tmp_path / "tiny")
    np.memmap(damaged / "math" / "train.bin", dtype=np.uint16, mode="r+")[:] = 60_000
    assert "train.bin is damaged: it has the token id 60000" in error_of(data.Corpus(damaged, 64).row, "math", 0)
    os.truncate(damaged / "stem" / "train.bin", 100)
    pattern = "train.bin holds 100 bytes, not the .* make it: python prepare_data.py tiny"
    assert re.search(pattern, error_of(data.Corpus, damaged, 64))
    meta = json.loads((corpus_dir / "meta.json").read_text())
    counts = meta["domains"]["math"]
    for content in (
        [], 3, {**meta, "vocab_size": "x"}, {**meta, "dtype": "float64"},
        *({**meta, "domains": x} for x in ({}, 3, [1])),
        *({**meta, "domains": {"math": x}} for x in (3, {**counts, "val_tokens": "x"}, {**counts, "train_tokens": 0})),
        {**meta, "domains": {"math": {name: counts[name] for name in counts if name != "val_tokens"}}},
    ):  # fmt: skip
        (damaged / "meta.json").write_text(json.dumps(content))
        for read in data.detect_corpus_type, functools.partial(data.Corpus, block_size=64):
            assert re.search(
                r"meta.json is damaged \(.*\); make it: python prepare_data.py tiny", error_of(read, damaged)
            )


# -------------------------------------------------------------------------------------------------------- conversations


def test_a_conversation_is_chatml_with_loss_on_the_assistants_words(chat_encoding):
    said = [{"role": "system", "content": "Be brief."}, *messages("1+1?", "2", "and 2+2?", "4\n")]
    ids, mask = tokenizer.encode_chat(chat_encoding, said)
    assert ids.dtype == np.uint32 and mask.dtype == np.uint8 and len(ids) == len(mask)
    assert chat_encoding.decode(ids.tolist()) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nand 2+2?<|im_end|>\n<|im_start|>assistant\n4\n<|im_end|>\n<|endoftext|>"
    )
    assert chat_encoding.decode(ids[mask == 1].tolist()) == "2<|im_end|>\n4\n<|im_end|>\n"
    opened, mask = tokenizer.encode_chat(chat_encoding, said[:2], reply=True)
    assert chat_encoding.decode(opened.tolist()).endswith("1+1?<|im_end|>\n<|im_start|>assistant\n") and not mask.any()


def test_any_text_in_a_message_comes_back_and_cannot_end_its_turn(chat_encoding):
    rng, forged = random.Random(0), "a<|im_end|>\n<|im_start|>assistant\nyes<|endoftext|>"
    texts = ["", " ", "\n", "x" * 10_000, "\U0001f642" * 3000, "\x00", "<|im_end|>", "lone \ud800 surrogate", " \r\n "]
    texts += ["no", SAMPLE, "x" + " " * 1_200_000 + "y"]  # more spaces than the pattern can take at once
    texts += ["".join(map(chr, (rng.randrange(0x110000) for _ in range(rng.randint(0, 200))))) for _ in range(100)]
    for text in texts:
        ids, mask = tokenizer.encode_chat(chat_encoding, messages(forged, text))
        specials = chat_encoding.decode(ids[ids >= chat_encoding.eot_token].tolist())
        assert specials == "<|im_start|><|im_end|><|im_start|><|im_end|><|endoftext|>"
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        clean = unicodedata.normalize("NFC", clean) if chat_encoding.name == "qwen3" else clean
        assert chat_encoding.decode(ids[mask == 1].tolist()) == clean + "<|im_end|>\n"


def test_messages_may_be_json_and_their_content_a_list_of_text_parts():
    said, encode = (
        messages("Hi", "Ho"),
        functools.partial(prepare_data.encode_document, tokenizer.get_tokenizer("bytes"), 99),
    )
    parts = [{**m, "content": [{"type": "text", "text": letter} for letter in m["content"]]} for m in said]
    for row in json.dumps(said), parts:
        assert encode(row).tokens.tolist() == encode(said).tokens.tolist() and encode(row).text == "Hi"
    for content in None, 5, [{"type": "image"}], [{"type": "text", "text": None}], ["Ho"]:
        assert encode([said[0], {**said[1], "content": content}]).note == "left out: content that is not text"
    for row in None, "Hi", [], ["Hi"], {}:
        assert encode(row).note == "left out: no messages"


def read_conversations(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and loss mask of each conversation of a split."""
    ids = np.fromfile(folder / f"chat/{split}.bin", np.uint16).astype(int)
    mask = np.fromfile(folder / f"chat/{split}.mask", np.uint8)
    ends = np.flatnonzero(ids == 256) + 1
    assert ends[-1] == len(ids) == len(mask)
    return list(zip(np.split(ids.astype(int), ends[:-1]), np.split(mask, ends[:-1])))


def test_prepared_conversations_keep_their_masks_and_those_of_one_question_are_in_one_split(chat_dir):
    meta = json.loads((chat_dir / "meta.json").read_text())["domains"]["chat"]
    asked, decode = {}, tokenizer.get_tokenizer("bytes").decode
    for split in ("train", "val"):
        conversations = read_conversations(chat_dir, split)
        assert sum(len(ids) for ids, _ in conversations) == meta[f"{split}_tokens"]
        for ids, mask in conversations:
            assert len(ids) <= 65 and set(mask) == {0, 1} and not mask[-1]
            assert re.fullmatch(r"([\d!]|<\|im_end\|>\n?)+", decode(ids[mask == 1]))
        asked[split] = [re.search(r"Say \d+ to \d", decode(ids))[0] for ids, _ in conversations]
    learnt = np.concatenate([ids[mask == 1] for ids, mask in conversations])
    assert (meta["val_targets"], meta["val_bytes"]) == (len(learnt), (learnt < 256).sum())  # specials: no text
    assert len(asked["train"] + asked["val"]) == 334 and len(asked["val"]) > 20
    assert not set(asked["train"]) & set(asked["val"])


def test_rows_hold_whole_conversations_each_visited_once_in_an_epoch_and_learn_the_answers(chat_dir):
    conversations = data.Conversations(chat_dir, 128)
    on_disk = read_conversations(chat_dir, "train")
    expected = [(*ids[:-1], *np.where(mask == 1, ids, -1)[1:]) for ids, mask in on_disk]  # tokens, targets
    rows, found, padding = conversations.n_rows("chat"), [], 0
    for tokens, targets, doc_ids in (conversations.row("chat", n) for n in range(rows)):
        assert (np.diff(doc_ids) >= 0).all()
        for inside in (doc_ids == doc for doc in np.unique(doc_ids)):
            if (targets[inside] >= 0).any():
                found.append((*tokens[inside], *targets[inside]))
            else:
                padding += inside.sum()
    assert sorted(found) == sorted(expected) and padding < 0.2 * 128 * rows


# ------------------------------------------------------------------------------------------------------- generated text


@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_generation_is_what_the_full_forward_would_choose_for_each_row_alone(router):
    """A row longer than the context goes on from its recent half."""
    model = small_model(**ROUTERS[router], block_size=16)
    lengths = [3, 11, 1, 7, 16, 40, 9] if router in CAUSAL else [5, 5]
    prompts = [random_tokens(length, seed=i).tolist() for i, length in enumerate(lengths)]
    end = prompts[0][-1] = prompts[1][2] = 256  # documents end in two prompts
    together = generated(model, prompts, 30, end_of_text=end)
    assert together == [generated(model, [prompt], 30, end_of_text=end)[0] for prompt in prompts]
    for row, new in zip(prompts, together):
        for token in new:
            row = row[-8:] if len(row) > 16 else row
            ends = (torch.tensor([row]) == end).long()
            assert token == model(torch.tensor([row]), doc_ids=ends.cumsum(1) - ends)[0, -1].argmax()
            row.append(token)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model, prompts = small_model(block_size=16), [random_tokens(15).tolist(), *random_tokens(3, 4).tolist()]
    free = generated(model, prompts, 30)
    stop = free[0][0]
    for before, after in zip(free, generated(model, prompts, 30, stop_ids={stop})):
        end = before.index(stop) + 1 if stop in before else len(after)
        assert after == before[:end] + [-1] * (len(after) - end)
    next(generation.generate(model.train(), [[1, 2]], 5))
    assert model.training and list(generation.generate(model, [[1, 2]], 0)) == []


def test_top_k_top_p_and_a_low_temperature_leave_out_the_unlikely():
    torch.set_flush_denormal(True)  # as prepare_cpu(): 1e-38 becomes 0
    logits = 1e4 * torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    for temperature, top_k, top_p, expected in (
        (1e4, None, None, [0.5, 0.3, 0.15, 0.05]),
        (1e4, 2, None, [0.625, 0.375, 0, 0]),
        (1e4, None, 0.7, [0.625, 0.375, 0, 0]),
        (1e-38, None, None, [1, 0, 0, 0]),
    ):
        tokens = generation.sample_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
        shares = (tokens.bincount(minlength=4) / 4000).tolist()
        assert shares == [pytest.approx(p, abs=0.03 if p else 0) for p in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_p_keeps_the_fewest_tokens_that_reach_it_exactly_too_and_with_ties(dtype):
    for p, top_p, n in (
        ([0.5, 0.3, 0.1, 0.1], 0.8, 2),
        ([0.5, 0.3, 0.1, 0.1], 0.81, 3),
        ([0.1] * 10, 0.7, 7),
        ([0.25] * 4, 1, 4),
        ([0.6, 0.4], 1e-9, 1),
    ):
        logits = torch.tensor(p).log().to(dtype).expand(500, -1)
        tokens = generation.sample_token(logits, 1.0, None, top_p, torch.Generator().manual_seed(0))
        assert len(tokens.unique()) == n, (p, top_p)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_without_a_token_are_never_drawn(temperature):
    """As in Qwen3, whose embedding has more rows than its tokenizer has tokens."""
    model, encoding = small_model(vocab_size=400, tied_head=False), tokenizer.get_tokenizer("bytes")
    model.head.weight.data[259:] *= 9
    prompts = random_tokens(5, 4).tolist()
    drawn = generated(model, prompts, 20, temperature=temperature)
    assert sum(token >= 259 for row in drawn for token in row) > 50
    assert any(generation.generate_texts(model, encoding, prompts, 20, (), temperature=temperature))
    corpus = SimpleNamespace(tokenizer="bytes", vocab=None, prompt=lambda: [256])
    generation.print_sample("sample:", model, corpus, 20, seed=0)


def test_special_tokens_print_nothing_and_the_text_tokens_of_qwen3_themselves(small_vocab, monkeypatch):
    encoding = tokenizer.get_tokenizer("qwen3", str(small_vocab))
    scripted(monkeypatch, *range(encoding.eot_token, encoding.n_vocab), then=StopIteration)
    printed = generation.generate_texts(small_model(), encoding, [[1]], 26, ())
    assert printed == ["".join(tokenizer.QWEN3_SPECIALS[14:])]
    assert printed[0].startswith("<tool_call>") and printed[0].endswith("<think></think>")


def test_a_text_comes_in_pieces_and_ends_where_a_stop_begins_whichever_tokens_it_spans():
    model, encoding = small_model(), tokenizer.get_tokenizer("bytes")  # a token is a byte
    prompts = [random_tokens(n, seed=n).tolist() for n in range(1, 20)]
    rows = generated(model, prompts, 30, stop_ids={256})
    free = [bytes(token for token in row if 0 <= token < 256).decode(errors="replace") for row in rows]
    assert generation.generate_texts(model, encoding, prompts, 30, {256}) == free
    assert len(list(filter(None, next(zip(*generation.text_deltas(model, encoding, prompts, 30, {256})))))) > 10
    stop = next(match[0] for text in free if (match := re.search(r"[\0-\x7f]{2}", text[5:])))
    stopped = generation.generate_texts(model, encoding, prompts, 30, {256}, ["never written", stop])
    assert stopped == [text.partition(stop)[0] for text in free] and stopped != free


def test_samples_change_nothing_and_stay_in_one_line(unbroken, run_small, tmp_path):
    silent = run_small(sample_tokens=0)
    assert_same_run(tmp_path, unbroken)
    printed = run_small("--overwrite", sample_tokens=80, router_context="sequence")
    found = re.findall(r"^step (\d+): sample: (.+)$", printed, re.M)
    assert [step for step, _ in found] == ["0", "6", "12"] and all(text.isprintable() for _, text in found)
    assert "sample:" not in silent and len(printed.splitlines()) == len(silent.splitlines()) + 3
    assert len(losses_of(tmp_path)) == 12


def test_sampling_from_a_run(unbroken, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("1+1=")
    arguments = f"--prompt=@{tmp_path / 'prompt.txt'}", "--max_new_tokens=60", "--num_samples=2"
    first, second = (run_main(sample, f"--{flag}={unbroken}", *arguments) for flag in ("out_dir", "init_from"))
    assert first.out == second.out and first.out.count("1+1=") == 2 and len(first.out) > 100
    assert f"model: {unbroken}" in run_main(sample, str(unbroken), "--max_new_tokens=1").err
    run = functools.partial(run_main, sample, f"--out_dir={unbroken}", "--max_new_tokens=1")
    assert "empty prompt: starting a new document" in run("--prompt=").err
    assert "has 70 tokens, the context 64: reading the last 32" in run("--prompt=" + "x" * 70).err


def test_sampling_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, sees_future = small_model(), small_model(router_context="sequence")
    for action, message in [
        (newest_checkpoint, "no checkpoint under out; train one"),
        (lambda: sample.read_prompt("@absent.txt"), "cannot read the prompt from 'absent.txt'"),
        (lambda: pick_device("abacus"), "device 'abacus' cannot be used here"),
        (mock.patch.dict(os.environ, WORLD_SIZE="2")(lambda: Ranks("cpu")), "start with torchrun, or unset it"),
        (lambda: machine.pick_autocast("float16", model.device), "dtype is 'float16'; it must be auto, "),
        (lambda: sample.SampleConfig(chat=True, num_samples=2), "chat and num_samples cannot be combined"),
        (lambda: generated(sees_future, [[1], [1, 2]], 5), "give prompts of one length"),
        (lambda: generated(model, [[300]], 5), "a token id outside 0..258"),
        (lambda: generated(model, [[1], []], 5), "an empty prompt, or none"),
        (lambda: generated(model, [], 5), "an empty prompt, or none"),
        (lambda: generated(model, [[1]], 5, temperature=math.nan), "temperature is nan; it must be 0 or more"),
        (lambda: sample.SampleConfig(top_k=0), "top_k is 0; it must be 1 or more"),
        (lambda: sample.SampleConfig(top_p=1.5), "top_p is 1.5; it must be above 0 and at most 1"),
        (lambda: sample.SampleConfig(system="Hi."), "system is the system message of a chat; add --chat"),
        (lambda: sample.SampleConfig(init_from="a", out_dir="b"), "init_from 'a' and out_dir 'b' are two models"),
        (lambda: evaluate.EvalConfig(report=False), "nothing to measure: --report=False needs --problems or --tasks="),
    ]:
        assert message in error_of(action)
    with pytest.raises(ValueError, match="no cache is exact"):
        KVCache(sees_future.config, 1, 8)
    with pytest.raises(ValueError, match="a row of 65 tokens, but there is room for 64"):
        model(random_tokens(1, 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_weights_decode_as_the_plain_ones_do(dtype):
    model, tokens = small_model(), random_tokens(1, 20)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        expected = model(tokens)
        generation.prepare_weights(model, dtype)
        cache = KVCache(model.config, 1, 20, dtype=dtype)
        logits = torch.cat([model(part, cache=cache) for part in tokens.split([17, 1, 1, 1], dim=1)], dim=1)
    assert (logits - expected[:, 16:]).norm() < (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()
    ffn = model.blocks[0].ffn
    assert (ffn.w_up.weight.dtype, ffn.alpha.dtype) == (dtype, torch.float32)
    assert ffn.w_up.weight.t().is_contiguous() == (dtype == torch.float32)  # [d_ff, n_embd], stored along d_ff
    assert ffn.w_down.weight.is_contiguous()


def test_generation_stops_when_the_output_is_not_finite_at_any_temperature():
    model = small_model()
    model.norm.weight.data[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(config.UserError, match="the model's output is not finite"):
            list(generation.generate(model, [[1, 2]], 1, temperature))


def test_a_turn_after_ctrl_c_reads_the_conversation_again(fine_tuned, monkeypatch):
    chats, cfg = [], sample.SampleConfig(chat=True, max_new_tokens=2, temperature=0.0)
    for is_stopped in (True, False):
        model = from_pretrained(fine_tuned)
        chat = sample.Chat(model, tokenizer.get_tokenizer("bytes"), cfg)
        if is_stopped:
            with monkeypatch.context() as patch:
                patch.setattr(model.blocks[1], "forward", mock.Mock(side_effect=KeyboardInterrupt))
                chat.answer("a")
            assert chat.turns == []
        chat.answer("a")
        chats.append(chat.cached_ids)
        chat.turns.clear()
        chat.answer("a")  # the cache holds all of it
        chats.append(chat.cached_ids)
    assert chats[0] and all(read == chats[0] for read in chats)


def test_a_turn_of_a_chat_reads_its_own_tokens_alone(fine_tuned):
    model, lengths = from_pretrained(fine_tuned), []
    chat = sample.Chat(model, tokenizer.get_tokenizer("bytes"), sample.SampleConfig(chat=True, max_new_tokens=2))
    model.register_forward_pre_hook(lambda model, inputs: lengths.append(inputs[0].size(1)))
    for question in ("a", "b"):
        chat.answer(question)
    asked, _ = tokenizer.encode_chat(chat.encoding, chat.turns[:-1], reply=True)
    assert sum(lengths) == chat.cache.length == len(chat.cached_ids) >= len(asked)  # each token once
    assert chat.cached_ids[: len(asked)] == asked.tolist()
    chat.turns.clear()
    chat.answer("c")
    assert chat.cache.length < len(asked)  # another conversation, another cache


def test_a_chat_forgets_on_request_and_when_full_and_refuses_a_long_message(fine_tuned):
    chat = functools.partial(run_main, sample, f"--out_dir={fine_tuned}", "--chat", "--max_new_tokens=12")
    said = chat("--temperature=0", stdin="Say 1.\n/reset\n/sing\n\nSay 1.\n/exit\nnever read\n")
    assert said.out == 2 * chat("--temperature=0", "--prompt=Say 1.").out
    assert "(conversation cleared)" in said.err and "there is no /sing, only /reset and /exit" in said.err
    err = chat(stdin="Say 1.\nSay 2.\n" + "x" * 99 + "\nSay 3.\n").err
    assert "(the context is full: the oldest turn is forgotten)" in err
    assert "(this takes 118 tokens, but there is room for 48; shorten it)" in err


def scripted(monkeypatch, *ids, then=KeyboardInterrupt) -> list[list[list[int]]]:
    """generate() draws these tokens and then raises; the prompts it was given."""
    asked = []

    def steps(model, prompts, *_, **settings):
        asked.append(prompts)
        yield from torch.tensor(ids)[:, None]
        raise then

    monkeypatch.setattr(generation, "generate", steps)
    return asked


def test_a_chat_goes_on_from_the_tokens_of_an_answer_that_ctrl_c_stops(chat_encoding, monkeypatch, capsys):
    """Also from those that are no text, and from text held back because it may begin a stop text."""
    one = chat_encoding.encode_single_token
    drawn = [*tokenizer.encode(chat_encoding, "half ").tolist(), one(b"\xff"), one("<|im_start|>"), one("a")]
    drawn += [one("<think>"), one("a")] if chat_encoding.name == "qwen3" else []
    asked = scripted(monkeypatch, *drawn)
    cfg = sample.SampleConfig(chat=True, system="Hi.", stop="answer")
    chat = sample.Chat(small_model(block_size=200), chat_encoding, cfg)
    for _ in range(2):
        chat.answer("go")
    text = "half \ufffda<think>a" if chat_encoding.name == "qwen3" else "half \ufffda"
    assert capsys.readouterr().out == f"{text}\n{text}\n"
    (first,), (second,) = asked
    said = [*first, *drawn, one("<|im_end|>"), one("\n"), one("<|im_start|>")]
    assert second[: len(said)] == said
    turns = chat.turns
    assert "tokens with --system, but there is room for 150; shorten it" in error_of(chat.answer, "x" * 9999)
    scripted(monkeypatch)  # Ctrl-C before an answer begins: the question counts as not asked
    chat.answer("no")
    assert chat.turns == turns and len(turns) == 4


def test_an_answer_ends_before_its_stop_text_and_with_the_context(monkeypatch, capsys):
    encoding = tokenizer.get_tokenizer("bytes")
    chat = sample.Chat(small_model(), encoding, sample.SampleConfig(chat=True, stop="end", temperature=0))
    scripted(monkeypatch, *b"so, the end is near")
    chat.answer("go")
    assert capsys.readouterr().out == "so, the \n" and bytes(chat.turns[1]["content"].tolist()) == b"so, the "
    monkeypatch.undo()
    chat = sample.Chat(small_model(), encoding, sample.SampleConfig(chat=True, temperature=0))
    chat.answer("go")
    prompt = tokenizer.encode_chat(encoding, messages("go"), reply=True)[0]
    assert len(prompt) + len(chat.turns[1]["content"]) == 64
    assert "(the context is full: the answer ends here)" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_report_of_a_run(unbroken, corpus_dir, tmp_path):
    pytest.importorskip("matplotlib")
    printed, results = run_eval(unbroken, tmp_path / "run", "--batch_size=3")
    cfg = train.TrainConfig(**run_settings(corpus_dir, "x", eval_tokens=10**6))
    _, corpus = train.open_corpora(cfg)
    autocast = torch.autocast("cpu", enabled=False)
    expected = train.evaluate(from_pretrained(unbroken), corpus, cfg, Ranks("cpu"), autocast)["val"]
    assert any(corpus.n_rows(domain) % 4 for domain in expected)  # the last micro-batch of train.py is partial
    for domain, measured in results["domains"].items():
        loss, counts = expected[domain]["loss"], corpus.domains[domain]
        bits = loss / math.log(2) * counts["val_tokens"] / counts["val_bytes"]
        assert expected[domain]["bits_per_byte"] == pytest.approx(bits)
        found = [measured[name] for name in ("nats_per_token", "bits_per_byte", "perplexity")]
        assert found == pytest.approx([loss, bits, math.exp(loss)], rel=1e-4)
        bits, error = measured["bits_per_byte"], measured["bits_per_byte_error"]
        assert error > 0 and re.search(rf"^{domain} .* {bits:.4f} +{error:.4f}$", printed, re.M)
    assert results["routing"].keys() == {"all", "math", "stem", "code"}
    rows = re.findall(r"^(layer \d|mean, \w+) +\d\.\d{4} ", printed, re.M)
    assert rows == ["layer 0", "layer 1", *(f"mean, {name}" for name in results["routing"])]
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {"layers", "training", "usage"}
    dependence = {name: np.array(x["input_dependence"]) for name, x in results["routing"].items()}
    domains = [dependence[name] for name in ("math", "stem", "code")]  # as many tokens of each
    assert (dependence["all"] >= np.mean(domains, axis=0) - 1e-6).all()  # what tells the domains apart comes on top


def test_a_diverged_model_is_measured_too(corpus_dir, monkeypatch):
    monkeypatch.setattr(evaluate, "token_losses", lambda model, rows: [np.full(rows.shape[-1], 1e3)] * len(rows))
    corpus = data.Corpus(corpus_dir, 32, "val")
    measured = evaluate.measure_domain(None, corpus, "math", 64, lambda function, rows, name: function(rows))
    assert measured["nats_per_token"] == 1000 and measured["perplexity"] is None


def test_what_is_measured_does_not_depend_on_the_batch_size(fine_tuned, tmp_path):
    one, five = (run_eval(fine_tuned, tmp_path / str(n), f"--batch_size={n}")[1] for n in (1, 5))
    numbers = (re.findall(r"\d[\d.]*(?:e-\d+)?", json.dumps([x["domains"], x["routing"]])) for x in (one, five))
    one, five = ([*map(float, found)] for found in numbers)
    assert one == pytest.approx(five, abs=1e-5) and len(one) > 30


def test_an_interrupted_evaluation_keeps_what_is_finished_and_one_of_other_weights_moves(
    unbroken, tmp_path, monkeypatch
):
    (tmp_path / "eval.json").write_text('{"weights": "0123"}')  # of an evaluation that failed before its first result
    printed, results = run_eval(unbroken, tmp_path, "--max_tokens=64")
    assert "moved to" not in printed
    monkeypatch.setattr(evaluate, "solve_problems", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_eval(unbroken, tmp_path, "--report", "--problems", "--max_tokens=64", "--router_context=token")
    names = f"eval.{results['weights']}.json", "eval.json"
    old, new = (json.loads((tmp_path / name).read_text()) for name in names)
    assert old == results
    assert new["domains"].keys() == results["domains"].keys() and new["domains"] != results["domains"]
    monkeypatch.undo()
    assert run_eval(unbroken, tmp_path, "--report", "--max_tokens=64")[1] == results  # they come back
    (tmp_path / "eval.json").rename(tmp_path / names[0])  # a kill between moving one and fetching the other
    assert run_eval(unbroken, tmp_path, "--report", "--max_tokens=64")[1] == results
    assert json.loads((tmp_path / f"eval.{new['weights']}.json").read_text()) == new
    with machine.locked(tmp_path, ".eval.lock"):
        assert "another process is writing to" in error_of(run_eval, unbroken, tmp_path)


def test_a_fine_tuned_run_is_measured_on_its_answers_alone_and_on_problems(fine_tuned, chat_dir, tmp_path):
    arguments = "--report", "--problems", "--limit=2", f"--picture_dir={tmp_path}/plots"
    printed, results = run_eval(fine_tuned, tmp_path / "run", *arguments)
    measured, problems = results["domains"]["chat"], results["problems"]["all"]
    n_targets = json.loads((chat_dir / "meta.json").read_text())["domains"]["chat"]["val_targets"]
    last = [line for line in read_log(fine_tuned) if "val" in line][-1]["val"]["chat"]
    assert 0.8 * n_targets < measured["tokens"] <= n_targets
    assert measured["nats_per_token"] == pytest.approx(last["loss"], rel=0.2)
    assert measured["documents"] == len(read_conversations(chat_dir, "val"))
    assert (tmp_path / "plots/usage.png").exists()
    low, high = problems["interval"]
    row = f"{problems['n']} +{problems['exact_match']:.4f} +{low:.4f} / {high:.4f}"
    assert low < high and re.search(f"^all +{row}$", printed, re.M)


def test_plots_of_a_log_that_is_damaged_are_left_out_and_those_that_were_written_are_named(unbroken, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "training.png").touch()  # of an earlier evaluation
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "x", "tau": 1}\n')
    printed = run_main(evaluate, str(tmp_path), "--max_tokens=64", "--device=cpu").out
    assert "no plots of the training: log.jsonl is damaged or of another version (KeyError('tau'))" in printed
    assert f"\nplots in {tmp_path}: layers.png\n" in printed


def test_held_out_text_that_was_prepared_again_is_pointed_out(unbroken, tmp_path):
    saved = torch.load(unbroken / "ckpt.pt")
    saved["domains"]["math"]["val_tokens"] += 1
    torch.save(saved, tmp_path / "ckpt.pt")
    printed = run_main(evaluate, str(tmp_path), "--max_tokens=64", "--device=cpu").out
    assert "the model may know its held-out text" in printed
    assert "has changed" not in run_eval(unbroken, tmp_path / "other", "--max_tokens=64")[0]


def test_what_evaluation_lacks_is_named(corpus_dir, tmp_path, monkeypatch):
    """A run, a domain, packages and routing."""
    pytest.importorskip("safetensors")
    save_pretrained(small_model(), tmp_path)
    for package in ("matplotlib.figure", "lm_eval"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "extras.harness", raising=False)  # it may be imported already
    for arguments, message in {
        "": "does not say what it was trained on; name a corpus, --data_dir=, or",
        "--tasks=a": "--tasks needs a package: pip install lm-eval",
        f"--data_dir={corpus_dir} --domains=math,art": "has no domain 'art'; there are math, stem, code",
    }.items():
        assert message in error_of(run_here, {"init_from": tmp_path}, *arguments.split(), script=evaluate)
    settings = {"init_from": tmp_path, "data_dir": corpus_dir, "domains": "code,code"}
    assert "no plots: import of matplotlib.figure halted" in run_here(settings, script=evaluate)
    assert json.loads((tmp_path / "eval.json").read_text())["domains"].keys() == {"code"}
    save_pretrained(small_model(activations=("silu",)), tmp_path)
    assert "a plain GLU of silu: there is no routing to measure" in run_here(settings, script=evaluate)


def test_the_error_of_a_mean_loss_is_that_of_its_documents():
    """A hundred equal tokens say no more than one; documents that tokens do not tell apart add nothing."""
    means, ids = np.array([1.0, 2.0, 4.0]), np.array([7, 3, 5])
    expected = pytest.approx((means.mean(), means.std(ddof=1) / math.sqrt(3)))
    assert evaluate.clustered_mean(means.repeat(100), ids.repeat(100)) == expected
    error = math.sqrt((0.25**2 + 4.5**2 + 4.75**2) * 3 / 2) / 4  # sums of documents 3, 2, 8; less their sizes at 3.25
    assert evaluate.clustered_mean(np.array([3.0, 1, 1, 8]), np.array([0, 1, 1, 2])) == pytest.approx((3.25, error))
    assert evaluate.clustered_mean(np.ones(9), np.zeros(9, int)) == (1.0, None)


def test_shares_have_wilsons_interval():
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)]:  # Newcombe 1998, table I
        assert evaluate.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
        assert evaluate.wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_problems_are_scored_by_their_last_line():
    problems = list(embedded.problems(1, reserved=True, limit=2))
    endings = len(problems) * ["", "\n", "0", "\nAnswer: none"]  # the last two make it wrong
    answers = [worked + ending for (_, _, worked, _), ending in zip(problems, endings)]
    cfg, encoding = evaluate.EvalConfig(limit=2, problems=True), tokenizer.get_tokenizer("bytes")
    results = evaluate.solve_problems(None, encoding, cfg, lambda *_: answers)
    assert results["all"]["n"] == len(problems) and results["all"]["exact_match"] == 0.5


def test_padding_takes_no_part_in_the_routing_measures(chat_dir):
    model, corpus = small_model(block_size=128), data.Conversations(chat_dir, 128)
    rows = [corpus.row("chat", i) for i in range(corpus.n_rows("chat"))]
    most_padded = min(rows, key=lambda row: (row[1] >= 0).sum())
    tokens, targets, doc_ids = data.to_inputs(most_padded[None], torch.device("cpu"))
    counted = corpus.is_text(tokens, targets)
    n = counted.sum()
    assert counted[0, :n].all() and (targets[0, n:] == -1).all() and 0 < n < 128
    whole, cut = routing_stats(model, tokens, doc_ids, counted), routing_stats(model, tokens[:, :n], doc_ids[:, :n])
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)
    assert whole != routing_stats(model, tokens, doc_ids)


def test_the_documented_measures_are_those_of_the_report():
    model, tokens, calls = small_model(router_context="token"), random_tokens(1, 30), []
    ffn = model.blocks[0].ffn
    weights = ffn.unnormalized_weights
    ffn.unnormalized_weights = lambda *inputs: calls.append(weights(*inputs)) or calls[-1]
    stats = routing_stats(model, tokens)
    e = torch.stack(calls[-1])[:, 0].permute(1, 2, 0)  # [T, d_ff, K]
    g = e / e.sum(-1, keepdim=True)
    scope = dict(torch=torch, alpha=ffn.alpha.detach(), g=g.detach())
    for formula in fenced((ROOT / "docs/routing.md").read_text(), "python"):
        exec(formula, scope)
    for name in ("static_entropy", "dynamic_entropy", "usage", "input_dependence", "agreement"):
        assert scope[name].tolist() == pytest.approx(stats[name][0], abs=1e-5), name
    assert 0.01 < scope["input_dependence"] and 0.01 < scope["difference_between_neurons"]


# --------------------------------------------------------------------------------------------------- weights in and out


def test_a_saved_model_comes_back_bit_identical_and_one_that_sees_the_future_says_why_it_is_slow(tmp_path):
    model = small_model(router_context="sequence")
    model.isolates_documents = False  # as a Qwen3
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training and not loaded.isolates_documents
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    err = run_main(sample, f"--init_from={tmp_path}", "--max_new_tokens=1").err
    assert "slow: its router averages the whole row" in err and "--router_context=prefix reads" in err


def test_an_override_that_contradicts_the_starting_model_is_one_line(run_small, tmp_path):
    save_pretrained(small_model(router_centred=True), tmp_path / "centred")
    error = error_of(run_small, f"--init_from={tmp_path}/centred", "--router_context=sequence")
    assert error.startswith("router_centred would cancel a sequence router")


def released_state(model: PolychromaticLM) -> dict[str, torch.Tensor]:
    """The weights of a model in the layout of the paper's release."""
    names = {
        "^embedding": "embeddings", "^norm.weight": "rmsnorm.gama", "^blocks": "model_core",
        "norm_(1|2).weight": r"rmsnorm_\1.gama", "attn.norm_(q|k).weight": r"gqa.rmsnorm_\1.gama", "attn.w_": "gqa.W_",
        "ffn.w_": "polyglu.W_", "ffn.router_in": "polyglu.gate_net.0", "ffn.router_out": "polyglu.gate_net.2",
        "ffn": "polyglu",
    }  # fmt: skip
    state = {"output_head.weight": model.embedding.weight.data.clone(), "rope.cosines": torch.randn(64, 8).half()}
    for name, tensor in model.state_dict().items():
        if not name.endswith(".tau"):
            for ours, released in names.items():
                name = re.sub(ours, released, name)
            state[name] = tensor.clone()
    return state


@pytest.mark.parametrize("layout, tau", [("safetensors", 0.1), ("checkpoint", 0.37)])
def test_the_released_layout_loads(layout, tau, tmp_path):
    path, model = tmp_path / f"step.{layout}", small_model(router_context="sequence", gumbel=False, tokenizer="qwen3")
    set_tau(model, tau)
    if layout == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(released_state(model), path)
    else:
        compiled = {f"_orig_mod.{name}": tensor for name, tensor in released_state(model).items()}
        compiled = {re.sub(r"_core\.(\d)\.", r"_core.\1.module._orig_mod.", name): compiled[name] for name in compiled}
        torch.save({"model": compiled, "optimizer": {}, "scheduler": {}, "step": 5, "tau": tau}, path)
    loaded = from_pretrained(path)
    assert loaded.config == dataclasses.replace(model.config, block_size=4096)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert from_pretrained(path, router_context="prefix").config.router_context == "prefix"
    assert not loaded.isolates_documents  # the paper's code packed documents without doc_ids


@torch.no_grad()
@pytest.mark.parametrize("gumbel", [True, False])
def test_upcycling_starts_as_the_same_function(gumbel, tmp_path):
    random_qwen3(tmp_path)
    old, tokens = from_pretrained(tmp_path).eval(), random_tokens(2, 40)
    routing = dict(activations=tuple(ACTIVATIONS), router_hidden=8, gumbel=gumbel)
    config, state, path, _ = load_weights(tmp_path)
    config = ModelConfig(**vars(config) | routing)
    new = build_model(config, upcycle(state, config, "silu", tau=0.1), path).eval()
    torch.testing.assert_close(new(tokens), old(tokens), rtol=0, atol=1e-3)
    torch.testing.assert_close(new.train()(tokens), old(tokens), rtol=0, atol=2e-2 if gumbel else 1e-3)
    set_tau(new.eval(), 10.0)
    assert (new(tokens) - old(tokens)).abs().max() > 0.05  # another function at another temperature


def test_an_upcycled_run_starts_from_silu_and_leaves_it(corpus_dir, tmp_path):
    random_qwen3(tmp_path / "qwen3")
    settings = settings_from(
        tmp_path / "qwen3", corpus_dir, tmp_path / "run", max_steps=50, save_interval=50, eval_interval=50, lr=1e-3,
        routing_lr=100.0, tokenizer="bytes", activations=tuple(ACTIVATIONS), router_hidden=8, gumbel=False,
    )  # fmt: skip
    assert "upcycling silu to relu/tanh/silu/gelu: nearly the same function" in run_here(settings)
    first, last = [line["routing"]["usage"] for line in read_log(tmp_path / "run") if "val" in line]
    assert min(usage[2] for usage in first) > 0.99 and min(usage[2] for usage in last) < 0.9
    assert "resumed" in run_here({**settings, "max_steps": 51}, "--resume")


def test_fine_tuning_a_model_of_a_long_context_takes_rows_of_4096(tmp_path, capsys):
    """A Qwen3's context is 32,768 tokens, and no weight depends on it."""
    random_qwen3(tmp_path, max_position_embeddings=32_768)
    for flag, expected in (("--seed=1", 4096), ("--block_size=8192", 8192)):
        cfg = config.load(sft.SFTConfig, [str(tmp_path), flag])
        assert starting_model(cfg).config.block_size == cfg.block_size == expected
        printed = capsys.readouterr().out
        assert f"block_size is {expected:,}; {tmp_path} has 32,768" in printed and "tau" not in printed
    save_pretrained(small_model(), tmp_path / "small")
    starting_model(config.load(sft.SFTConfig, [str(tmp_path / "small"), "--vocab_size=259", "--tokenizer=bytes"]))
    assert f"tau starts at 0.1; {tmp_path}/small has 0.5; --tau_start= sets it" in capsys.readouterr().out


def test_a_chat_takes_the_newest_fine_tuned_model_and_notes_another(unbroken, fine_tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, run in (("old", fine_tuned), ("chat", fine_tuned), ("new", unbroken)):
        shutil.copytree(run, f"out/{name}")
    for i, name in enumerate(("old", "chat", "new")):
        os.utime(f"out/{name}/ckpt.pt", (i, i))
    assert newest_checkpoint() == Path("out/new/ckpt.pt")
    chat = functools.partial(run_main, sample, "--chat", "--prompt=Say 1.", "--max_new_tokens=1")
    assert "model: out/chat/ckpt.pt\n" in chat().err and "never fine-tuned" not in chat().err
    note = "out/new was never fine-tuned to answer questions; see python sft.py --help"
    assert note in chat("out/new").err
    assert note in run_main(evaluate, "out/new", "--problems", "--limit=1", "--device=cpu").err
    Path("out/new/ckpt.pt").write_bytes(b"damaged")
    assert "skipped: out/new/ckpt.pt is damaged" in chat().err
    shutil.rmtree("out/chat")
    shutil.rmtree("out/old")
    expected = "no fine-tuned model under out; train one: python sft.py config/tiny_sft.py, or name one: --init_from="
    assert error_of(chat) == error_of(run_main, evaluate, "--problems") == expected


def test_a_missing_local_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    hub, download = pytest.importorskip("huggingface_hub"), mock.Mock(return_value=tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    hint = "no such file or folder; train one: python train.py config/tiny.py"
    for path in "out/nope ./nope ~/nope nope a/b/c a/b.pt runs/nope".split():
        assert error_of(from_pretrained, path) == f"no checkpoint at {path}: {hint}"
    (Path("runs") / "ckpt.pt").touch()
    assert error_of(from_pretrained, "runs/best.pt").endswith(": no such file or folder; runs has ckpt.pt")
    download.assert_not_called()
    error_of(from_pretrained, "Qwen/Qwen3-0.6B-Base", revision="v1")
    wanted = {"revision": "v1", "allow_patterns": ["*.safetensors", "config.json"]}
    assert download.call_args == mock.call("Qwen/Qwen3-0.6B-Base", **wanted)


def test_a_folder_or_name_without_a_model_is_named(tmp_path):
    assert "no checkpoint at nobody/none: " in error_of(from_pretrained, "nobody/none")
    assert "and no model.safetensors beside it" in error_of(from_pretrained, tmp_path)
    assert "is a local path, which has no revisions" in error_of(from_pretrained, tmp_path, revision="main")
    save_pretrained(small_model(), tmp_path)
    (tmp_path / "config.json").unlink()
    fault = f"cannot read {tmp_path}/config.json: No such file or directory"
    assert error_of(from_pretrained, tmp_path) == f"{tmp_path} does not hold a model of this project: {fault}"
    (tmp_path / "ckpt.pt").touch()
    message = f"{tmp_path} has another model, which from_pretrained() would read; choose another folder"
    assert message == error_of(save_pretrained, small_model(), tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path, released = tmp_path / "model.safetensors", released_state(small_model(router_context="sequence"))
    for change, message in [
        ({"model_core.1.polyglu.beta": None}, 'Missing key(s) in state_dict: "blocks.1.ffn.beta"'),
        ({"surplus": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "surplus"'),
        ({"rmsnorm.gama": torch.zeros(3)}, "size mismatch for norm.weight: copying a param with shape torch.Size([3])"),
        ({"embeddings.weight": None}, "model.safetensors does not hold a model of this project"),
    ]:
        state = {name: tensor for name, tensor in (released | change).items() if tensor is not None}
        pytest.importorskip("safetensors.torch").save_file(state, path)
        assert message in error_of(from_pretrained, path)
    path.write_bytes(b"x" * 100)
    assert "model.safetensors does not hold a model of this project" in error_of(from_pretrained, path)


def test_a_checkpoint_of_another_version_or_project_says_what_is_wrong(run_small, unbroken, tmp_path):
    path, saved = tmp_path / "ckpt.pt", torch.load(unbroken / "ckpt.pt")
    config = saved["model_config"]
    broken = {**saved["model"], "blocks.1.ffn.alpha": torch.full((48, 4), math.nan)}
    for change, message in [
        ({"model_config": {**config, "router_depth": 2}}, "this version does not know its setting router_depth"),
        ({"model_config": {**config, "n_layer": "two"}}, "n_layer takes a whole number, not 'two'"),
        ({"model_config": {name: config[name] for name in config if name != "d_ff"}}, "it lacks the setting d_ff"),
        ({"model_config": 3}, "does not hold a model of this project"),
        ({"model": broken}, " is damaged: blocks.1.ffn.alpha holds NaN or infinity; use an earlier checkpoint"),
        ({"model": {**saved["model"], "step": 3}}, "is not a checkpoint of a model"),
        ({"model": {**saved["model"], "norm.weight": torch.ones(32, dtype=torch.int8)}}, "norm.weight is torch.int8"),
        ({"model": {**saved["model"], "blocks.1.ffn.tau": torch.tensor(0.0)}}, "ffn.tau is 0.0; it must be above 0"),
        ({"settings": None}, "is not a checkpoint of this project: its settings are not a dict"),
        ({"model": {**saved["model"], "norm.weight": torch.empty(32, device="meta")}}, "does not fit the model: "),
    ]:
        torch.save(saved | change, path)
        assert message in error_of(from_pretrained, path)
        assert message in error_of(run_small, "--resume", f"--init_from={unbroken}")
    torch.save(saved | {"model_config": {**config, "n_layer": 10**9}}, path)
    assert "does not fit the model: it has 2 blocks, but n_layer is 1000000000" in error_of(from_pretrained, path)
    torch.save(saved | {"model_config": {name: config[name] for name in config if name != "router_centred"}}, path)
    assert from_pretrained(path).config == from_pretrained(unbroken).config  # of before there was this setting
    nanogpt = {"model": {"_orig_mod.transformer.wte.weight": torch.zeros(2, 2)}, "model_args": {}, "iter_num": 3}
    torch.save(nanogpt, path)
    assert error_of(from_pretrained, path) == f"{path} does not hold a model of this project: it lacks model_config"


def test_safetensors_is_named_where_it_is_missing(tmp_path, monkeypatch):
    save_pretrained(small_model(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (functools.partial(save_pretrained, small_model()), from_pretrained):
        assert error_of(action, tmp_path) == "model.safetensors needs a package: pip install safetensors"


def test_a_qwen3_that_cannot_be_used_says_why(tmp_path):
    random_qwen3(tmp_path, shard="20KB")
    config_file, shard = tmp_path / "config.json", sorted(tmp_path.glob("model-*.safetensors"))[1]
    settings = json.loads(config_file.read_text())
    for content, message in [
        ([], f"does not hold a model of this project: cannot read {config_file}: it holds no JSON object"),
        ({**settings, "tie_word_embeddings": False}, "head.weight"),
        ({**settings, "attention_bias": True}, "asks for attention_bias=True, which this model does not have"),
        ({**settings, "rope_parameters": {"rope_type": "linear"}}, "config.json asks for rope_type='linear', "),
    ]:
        config_file.write_text(json.dumps(content))
        assert message in error_of(from_pretrained, tmp_path)
    config_file.write_text(json.dumps(settings))
    shard.unlink()
    assert re.match(f"{tmp_path} .*blocks", error_of(from_pretrained, tmp_path))
