"""Evaluate a trained model: its loss on each domain, what its routing does, and benchmarks.

python eval.py                              newest model under out/: loss of each domain, and the routing report
python eval.py out/tiny                     the same for another model
python eval.py --problems                   held-out arithmetic, for a model fine-tuned by sft.py
python eval.py --tasks=hellaswag,arc_easy   benchmarks, through EleutherAI's lm-evaluation-harness

Writes all numbers to eval.json beside the checkpoint, with plots of the routing and of the training.
"""

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# before torch: it sets environment variables that torch reads, and makes Ctrl-C during the imports one line
from common import settings  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import run as runtime
from common.data import Conversations, Corpus, detect_corpus_type, to_inputs
from common.generate import generate_texts
from common.routing import routing_stats
from common.settings import UserError, check_range
from common.tokenizer import encode_chat, get_tokenizer, stop_tokens
from common.weights import newest_checkpoint, open_model
from model import ModelConfig, PolychromaticLM


@dataclass
class EvalConfig:
    """Settings of an evaluation."""

    # model
    init_from: str | None = None  # run folder, checkpoint or any other model that loads; None: the newest under out/
    revision: str | None = None  # commit of a model on the hub
    router_context: str | None = None  # what the router reads: prefix, token or sequence; None: as trained
    # loss, routing and plots
    report: bool | None = None  # measure domain loss and routing; by default unless problems or tasks are given
    data_dir: str | None = None  # corpus whose validation files to read; None: the one the model was trained on
    domains: tuple[str, ...] = ()  # of the corpus; none: all of them
    max_tokens: int | None = None  # tokens of each validation file, evenly spread; None: the whole file
    picture_dir: str | None = None  # folder of the plots; None: beside the checkpoint
    # problems and tasks
    problems: bool = False  # ask the generated problems that are held out of all training data
    tasks: tuple[str, ...] = ()  # of the harness, for example hellaswag,arc_easy; finished ones are skipped
    task_dir: str | None = None  # folder of additional task files for the harness
    chat: bool = False  # put the prompts of the tasks into the chat format of sft.py
    limit: int | None = None  # problems of each family (None: 40), documents of each task (None: all)
    batch_size: int | None = None  # rows at once; None: as many as hold 16,384 tokens
    seed: int = 1  # of the generated problems
    # machine
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32 (TF32 on CUDA)

    def __post_init__(self):
        check_range(self, 1, 2**40, "max_tokens", "limit", "batch_size")
        if self.report is None:
            self.report = not (self.problems or self.tasks)
        if not (self.report or self.problems or self.tasks):
            raise UserError("nothing to measure: --report=False needs --problems or --tasks=")


def in_batches(function: Callable[[Sequence], list], items: Sequence, name: str, batch_size: int) -> list:
    """The results of function(batch), one for each item, in order."""
    starts = tqdm(range(0, len(items), batch_size), desc=name)
    return [result for start in starts for result in function(items[start : start + batch_size])]


def print_table(title: str, results: dict[str, dict]):
    """Print results by name, {column: value}, one a line."""

    def cell(value) -> str:
        values = value if isinstance(value, list) else [value]
        return " / ".join(f"{x:.4f}" if isinstance(x, float) else "-" if x is None else str(x) for x in values)

    table = [["", *next(iter(results.values()))]]
    table += [[name, *map(cell, row.values())] for name, row in results.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for name, *cells in table:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


# --------------------------------------------------------------------------------------------------- losses and routing


def read_run(source: Path) -> dict:
    """A run's checkpoint, its weights unread; empty for weights without a run."""
    try:
        checkpoint = runtime.load_checkpoint(source, verify=False)
    except UserError:
        return {}
    return checkpoint if {"settings", "progress", "domains"} <= checkpoint.keys() else {}


def open_corpus(cfg: EvalConfig, source: Path, config: ModelConfig) -> Corpus:
    """The validation text of cfg's corpus, else of the one that the model was trained on."""
    trained = read_run(source)
    theirs = trained.get("settings", {}).get("data_dir")
    folder = cfg.data_dir or theirs
    if not folder:
        advice = "name a corpus, --data_dir=, or --report=False"
        raise UserError(f"{source} does not say what it was trained on; {advice}")
    corpus = detect_corpus_type(folder)(folder, config.block_size, "val", cfg.domains)
    if corpus.tokenizer != config.tokenizer or corpus.vocab_size > config.vocab_size:
        ours = f"the model {config.tokenizer!r} with {config.vocab_size:,}"
        raise UserError(f"{folder} has tokenizer {corpus.tokenizer!r} with {corpus.vocab_size:,} tokens, {ours}")
    if theirs and corpus.folder.resolve() == Path(theirs).resolve() and corpus.has_changed_since(trained):
        print(f"{folder} has changed since {source} was trained: the model may know its held-out text")
    return corpus


def val_rows(corpus: Corpus, domain: str, max_tokens: int) -> np.ndarray:
    """Rows evenly spread over a domain's val.bin, [n, 3, block_size] int64. A document has one id in all its rows."""
    chosen = corpus.spread_rows(domain, max_tokens)
    rows = np.stack([corpus.row(domain, index) for index in chosen])
    starts = chosen * corpus.block_size
    if isinstance(corpus, Conversations):
        first_ids = starts  # no conversation spans rows, and each row has fewer than block_size of them
    else:
        ends = np.flatnonzero(corpus.tokens[domain] == corpus.end_of_text)
        first_ids = np.searchsorted(ends, starts)  # number of documents that end before the row
    rows[:, 2] += first_ids[:, None]
    return rows


def token_losses(model: PolychromaticLM, rows: np.ndarray) -> list[np.ndarray]:
    """Loss in nats of every token of val_rows(), 0 where there is no target: [block_size] for each row."""
    tokens, targets, doc_ids = to_inputs(rows, model.device)
    losses = []
    for hidden, target in zip(model.hidden(tokens, doc_ids), targets):  # a row at a time: its logits fill gigabytes
        logits = F.linear(hidden, model.head_weight).float()
        losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction="none").cpu().double().numpy())
    return losses


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None]:
    """Mean of values [n] and its standard error (None for one cluster). clusters [n] int: ids of independent groups.

    Linearized variance of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    mean, n = values.mean(), len(np.unique(clusters))
    deviations = np.bincount(clusters, values - mean)  # of each cluster's sum
    error = math.sqrt((deviations**2).sum() * n / (n - 1)) / len(values) if n > 1 else None
    return float(mean), error


def measure_domain(model: PolychromaticLM, corpus: Corpus, domain: str, max_tokens: int, batcher: Callable) -> dict:
    """The loss on a domain's held-out text."""
    rows = val_rows(corpus, domain, max_tokens)
    losses = np.stack(batcher(functools.partial(token_losses, model), rows, domain))
    is_target = rows[:, 1] >= 0
    documents = rows[:, 2][is_target]
    nats, error = clustered_mean(losses[is_target], documents)
    return {
        "documents": len(np.unique(documents)), "tokens": len(documents),
        "nats_per_token": nats, "perplexity": math.exp(nats) if nats < 700 else None,  # exp() would overflow
        "bits_per_byte": corpus.bits_per_byte(domain, nats),
        "bits_per_byte_error": error and corpus.bits_per_byte(domain, error),
    }  # fmt: skip


def report(model: PolychromaticLM, corpus: Corpus, cfg: EvalConfig, batcher: Callable, folder: Path) -> dict:
    """Measure and print the losses and the routing, and save the plots."""
    from extras.plots import save_plots

    max_tokens, activations = cfg.max_tokens or 2**40, model.config.activations
    domains = {domain: measure_domain(model, corpus, domain, max_tokens, batcher) for domain in corpus.domains}
    print_table("Loss on held-out text; the standard error treats documents, not tokens, as independent", domains)
    routing = {}  # by domain, and of "all", a mixture of them
    if len(activations) > 1:
        samples = {domain: val_rows(corpus, domain, min(max_tokens, 2**15)) for domain in corpus.domains}
        samples["all"] = np.concatenate(list(samples.values()))
        for name, rows in samples.items():
            tokens, targets, doc_ids = to_inputs(rows, model.device)
            routing[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
        measures = [name for name in routing["all"] if not name.endswith("_entropy")]  # entropies as shares of ln K
        table = {f"layer {i}": {x: routing["all"][x][i] for x in measures} for i in range(model.config.n_layer)}
        for domain, stats in routing.items():
            table[f"mean, {domain}"] = {x: np.mean(stats[x], axis=0).tolist() for x in measures}
        print_table(f"Routing, see docs/routing.md; usage of {' / '.join(activations)}", table)
    else:
        print(f"a plain GLU of {activations[0]}: there is no routing to measure")
    save_plots(Path(cfg.picture_dir or folder), routing, activations, runtime.read_log(folder))
    return {"data_dir": str(corpus.folder), "max_tokens": cfg.max_tokens, "domains": domains, "routing": routing}


# --------------------------------------------------------------------------------------------------- problems and tasks


def wilson_interval(successes: int, n: int) -> list[float]:
    """95% interval of a share of n independent trials (Wilson, 1927); unlike a standard error, not zero at 0 of n."""
    z = 1.959964
    center = (successes + z**2 / 2) / (n + z**2)
    half_width = z / (n + z**2) * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    return [max(0.0, center - half_width), min(1.0, center + half_width)]


def solve_problems(model: PolychromaticLM, encoding, cfg: EvalConfig, batcher: Callable) -> dict[str, dict]:
    """Exact match of greedy answers by family: {family: {"n", "exact_match", "interval"}}, "all" last."""
    from extras.embedded import problems

    def answer(batch: list[list[int]]) -> list[str]:
        room = max(1, model.config.block_size - max(map(len, batch)))
        return generate_texts(model, encoding, batch, room, stop_tokens(encoding))

    held_out = list(problems(cfg.seed, reserved=True, limit=cfg.limit or 40))
    chats = [[{"role": "user", "content": question}] for _, question, _, _ in held_out]
    prompts = [encode_chat(encoding, chat, reply=True)[0].tolist() for chat in chats]
    outcomes = defaultdict(list)
    for (family, _, _, expected), text in zip(held_out, batcher(answer, prompts, "problems")):
        last_line = text.rstrip().rpartition("\n")[2]
        outcomes[family].append(last_line == f"Answer: {expected}")
    outcomes["all"] = sum(outcomes.values(), [])
    return {
        family: {"n": len(x), "exact_match": sum(x) / len(x), "interval": wilson_interval(sum(x), len(x))}
        for family, x in outcomes.items()
    }


def weights_hash(model: PolychromaticLM) -> str:
    """Identifies a model's settings and weights."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def read_results(file: Path, weights: str) -> dict:
    """The results in an eval.json, if they are of these weights (a hash).

    Another model's results move to a file beside it, and come back when that model is evaluated again.
    """
    ours = file.with_suffix(f".{weights}.json")
    if not file.exists() and ours.exists():
        with runtime.name_write_errors(file):
            ours.replace(file)
    if not file.exists():
        return {"weights": weights}
    try:
        saved = runtime.read_json(file)
        if not isinstance(saved.get("tasks", {}), dict) or not str(saved.get("weights", "old")).isalnum():
            raise UserError(f"{file} is damaged")
    except UserError as e:
        raise UserError(f"{e}; delete it to measure everything again") from None
    if saved.get("weights") == weights:
        return saved
    if saved.keys() == {"weights"}:  # stopped before its first result
        return {"weights": weights}
    theirs = file.with_suffix(f".{saved.get('weights', 'old')}.json")
    print(f"{file} is of other weights or settings: moved to {theirs.name}")
    with runtime.name_write_errors(theirs):
        file.replace(theirs)
    return read_results(file, weights)


def main():
    cfg = settings.load(EvalConfig)
    runtime.prepare_cpu()
    fine_tuned = cfg.problems or cfg.chat
    source = Path(cfg.init_from or newest_checkpoint(fine_tuned=fine_tuned))
    device = runtime.pick_device(cfg.device)
    autocast = runtime.pick_autocast(cfg.dtype, device, training=False)
    model = open_model(source, device, cfg.revision, cfg.router_context, fine_tuned)
    folder = source if source.is_dir() else source.parent if source.exists() else Path("out") / source  # a hub name
    corpus = open_corpus(cfg, source, model.config) if cfg.report else None
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab) if cfg.problems or cfg.tasks else None
    # a "sequence" router would read the padding, so it gets one row at a time
    batch_size = 1 if model.config.sees_future else cfg.batch_size or max(1, 2**14 // model.config.block_size)
    batcher = functools.partial(in_batches, batch_size=batch_size)
    file = folder / "eval.json"
    with runtime.locked(folder, ".eval.lock"), torch.no_grad(), autocast:
        results = read_results(file, weights_hash(model))
        runtime.write_json(file, results)  # fails now rather than after hours
        if corpus:
            results["step"] = read_run(source).get("progress", {}).get("step")
            results |= report(model, corpus, cfg, batcher, folder)
            runtime.write_json(file, results)
        if cfg.problems:
            results["problems"] = solve_problems(model, encoding, cfg, batcher)
            print_table("Held-out problems; 95% intervals", results["problems"])
            runtime.write_json(file, results)
        if cfg.tasks:
            from extras.harness import run_tasks, task_row

            finished = results.setdefault("tasks", {})
            for name, result in run_tasks(model, encoding, batcher, cfg, str(autocast.fast_dtype), finished):
                finished[name] = result
                runtime.write_json(file, results)  # a killed run resumes after the last finished task
            rows = {name: task_row(name, finished[name]) for name in cfg.tasks}
            print_table("Benchmark tasks; the scores of the other models are the paper's", rows)
    print(f"numbers: {file}")


if __name__ == "__main__":
    settings.run(main)
