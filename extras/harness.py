"""Adapter to EleutherAI's lm-evaluation-harness, for eval.py --tasks."""

import difflib
import functools
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator

import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.generate import document_end, document_ids, generate_texts
from common.settings import UserError, reason
from common.tokenizer import CHAT_SPECIALS, ROLES, encode, stop_tokens
from model import PolychromaticLM

try:
    import lm_eval
    from datasets.exceptions import DatasetBuildError
    from jinja2 import TemplateError
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("--tasks needs a package: pip install lm-eval") from None

# The paper's tasks: metric, and in percent the paper's base model, its SFT model, Qwen3-0.6B-Base, guessing.
REFERENCES = {
    "hellaswag": ("acc_norm", 28.51, 27.84, 41.10, 25),
    "arc_easy": ("acc_norm", 41.04, 36.11, 65.60, 25),
    "arc_challenge": ("acc_norm", 22.27, 24.15, 33.90, 25),
    "piqa": ("acc_norm", 58.87, 54.52, 70.00, 50),
    "winogrande": ("acc", 52.17, 52.72, 58.50, 50),
    "boolq": ("acc", 61.13, 55.63, 69.70, 50),
    "sciq": ("acc_norm", 61.20, 52.70, None, 25),
    "openbookqa": ("acc_norm", 29.00, 26.80, None, 25),
    "mmlu_stem": ("acc", 25.28, 28.42, None, 25),
    "lambada_openai": ("acc", 15.35, 7.01, None, 0),
    "gsm8k": ("exact_match", None, None, None, 0),
}
SHOTS = {"mmlu_stem": 5}  # few-shot examples, as in the paper; other tasks use their own default, mostly 0

# The harness passes chats as text. A random mark, which no real text contains, stands for each special token.
MARKS = {name: f"{name[2:-2]}-{uuid.uuid4().hex}" for name in CHAT_SPECIALS}


@torch.no_grad()
def log_likelihoods(
    model: PolychromaticLM, requests: list[tuple[list[int], list[int]]], end_of_text: int = -1,
    vocab_size: int | None = None,
) -> list[tuple[float, bool]]:  # fmt: skip
    """For (context, continuation) token ids: log-probability of the continuation in nats, and whether it is greedy.

    Requests of more than block_size + 1 tokens are truncated on the left. end_of_text and vocab_size: as in generate(),
    whose choice at temperature 0 is the greedy one.
    """
    T, device = model.config.block_size, model.device
    rows = [tuple((context + continuation)[-T - 1 : -1]) for context, continuation in requests]
    unique = list(dict.fromkeys(rows))  # one-token continuations of a context share a row
    padded = pad_sequence([torch.tensor(row, device=device) for row in unique], batch_first=True)
    doc_ids = document_ids(padded == end_of_text)
    hidden = model.hidden(padded, doc_ids if doc_ids.any() else None)
    hidden = dict(zip(unique, hidden))  # causal: padding on the right changes nothing before it
    totals, greedy = [], []
    for row, (_, continuation) in zip(rows, requests):
        targets = torch.tensor(continuation[-T:], device=device)
        logits = F.linear(hidden[row][len(row) - len(targets) : len(row)], model.head_weight).float()
        totals.append(logits.log_softmax(-1).gather(1, targets[:, None]).sum())
        greedy.append((logits[:, :vocab_size].argmax(-1) == targets).all())
    return list(zip(torch.stack(totals).tolist(), torch.stack(greedy).tolist()))


class HarnessModel(TemplateLM):
    """A model as the harness sees it. batcher(function, requests, name) runs a function on batches of requests."""

    eot_token_id = tokenizer_name = None  # abstract in the base class

    def __init__(self, model: PolychromaticLM, encoding: tiktoken.Encoding, batcher: Callable):
        super().__init__()
        self.model = model
        self.encoding = encoding
        self.batcher = batcher
        self.eot_token_id = encoding.eot_token
        self.tokenizer_name = encoding.name
        self.stop_tokens = {encoding.eot_token}

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Token ids of a text; the marks of apply_chat_template() become special tokens."""
        # encode_chat() encodes a role and its newline separately, so split after them.
        roles = "|".join(f"(?<={MARKS['<|im_start|>']}{role}\n)" for role in ROLES)
        specials = {mark: self.encoding.encode_single_token(name) for name, mark in MARKS.items()}
        ids = []
        for piece in filter(None, re.split(f"({'|'.join(MARKS.values())})|{roles}", string)):
            ids += [specials[piece]] if piece in specials else encode(self.encoding, piece).tolist()
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages in the format of encode_chat(), as text. Without the generation prompt, the last one stays open."""
        self.stop_tokens = stop_tokens(self.encoding)
        start, end = MARKS["<|im_start|>"], MARKS["<|im_end|>"]
        text = "".join(f"{start}{message['role']}\n{message['content']}{end}\n" for message in chat_history)
        return f"{text}{start}assistant\n" if add_generation_prompt else text.removesuffix(f"{end}\n")

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        if empty := [context for context, continuation in (request.args for request in requests) if not continuation]:
            raise UserError(f"a task has an empty choice, with no tokens to score, after {empty[0][-50:]!r}")
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, split from one encoding, or of each alone if that leaves the continuation none."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            context_ids, continuation_ids = self.tok_encode(context), self.tok_encode(continuation)
        return context_ids or [self.eot_token_id], continuation_ids

    def _loglikelihood_tokens(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        if n_long := sum(len(a) + len(b) > self.model.config.block_size + 1 for a, b in pairs):
            tqdm.write(f"{n_long:,} of {len(pairs):,} requests exceed the context: truncated on the left")
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        longest_first = [pairs[i] for i in order]
        settings = {"end_of_text": document_end(self.model, self.encoding), "vocab_size": self.encoding.n_vocab}
        score = functools.partial(log_likelihoods, self.model, **settings)
        results = self.batcher(score, longest_first, "log-likelihoods")
        return [result for _, result in sorted(zip(order, results))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        windows = []
        for i, request in enumerate(requests):
            ids, block_size = self.tok_encode(request.args[0]), self.model.config.block_size
            overlapping = get_rolling_token_windows(ids, self.eot_token_id, block_size, context_len=1)
            windows += [(i, *window) for window in map(make_disjoint_window, overlapping)]
        totals = [0.0] * len(requests)
        for (i, _, _), (nats, _) in zip(windows, self._loglikelihood_tokens(windows)):
            totals[i] += nats
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        prompts = [request.args for request in requests]  # (text, generation settings)
        order = Collator(prompts, lambda x: (-len(x[0]), x[0]), lambda x: x[1], group_by="gen_kwargs")
        results = []
        for group in order.get_batched(n=len(requests)):
            results += self.batcher(self.generate_batch, group, "generations")
        return order.get_original(results)

    def generate_batch(self, batch: list[tuple[str, dict]]) -> list[str]:
        """Continuations of (prompt, generation settings), all with the same settings. Truncates prompts on the left."""
        settings, T = normalize_gen_kwargs(batch[0][1]), self.model.config.block_size
        length = settings["max_gen_toks"]
        prompts = [self.tok_encode(text)[-max(T // 2, T - length) :] or [self.eot_token_id] for text, _ in batch]
        temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
        return generate_texts(
            self.model, self.encoding, prompts, length, self.stop_tokens, settings["until"], temperature,
            settings.get("top_k") or None, settings.get("top_p"),  # a top_k of 0 turns it off
        )  # fmt: skip


def run_tasks(
    model: PolychromaticLM, encoding: tiktoken.Encoding, batcher: Callable, cfg, dtype: str, finished: dict[str, dict]
) -> Iterator[tuple[str, dict]]:
    """Run the tasks of cfg (an EvalConfig) one after another; yields the name and result of each.

    Skips tasks that ran with the same settings in `finished`, the earlier results.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if cfg.task_dir and not os.path.isdir(cfg.task_dir):
        raise UserError(f"task_dir {cfg.task_dir!r} is not a folder")
    manager = TaskManager(include_path=cfg.task_dir)
    known = set(manager.all_tasks) - set(manager.all_tags)  # a tag stands for several tasks
    for name in cfg.tasks:
        if name not in known:
            suggestions = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {suggestions[0]!r}?" if suggestions else ""
            raise UserError(f"the harness has no single task {name!r}{hint}")
    for name in cfg.tasks:
        settings = {"limit": cfg.limit, "chat": cfg.chat, "num_fewshot": SHOTS.get(name), "dtype": dtype}
        if name in finished and finished[name]["settings"] == settings:
            print(f"{name}: already done with these settings; delete eval.json to run it again")
            continue
        try:
            output = lm_eval.simple_evaluate(
                HarnessModel(model, encoding, batcher), tasks=[name], task_manager=manager, log_samples=False,
                limit=cfg.limit, num_fewshot=SHOTS.get(name), apply_chat_template=cfg.chat,
            )  # fmt: skip
        except (OSError, DatasetBuildError) as e:
            raise UserError(f"cannot get the data of task {name!r}: {reason(e)}") from None
        except TemplateError as e:
            raise UserError(f"cannot make the prompts of task {name!r}: {reason(e)}") from None
        metrics = {**output["results"], **output.get("groups", {})}[name]
        n = sum(counts["effective"] for counts in output["n-samples"].values())
        yield name, {"settings": settings, "n": n, "metrics": metrics, "lm_eval": lm_eval.__version__}


def task_row(name: str, result: dict) -> dict:
    """A task's main metric, with the harness's standard error, beside the paper's scores."""
    main_metric, *percents = REFERENCES.get(name, (None,) * 5)
    metrics = {key: value for key, value in result["metrics"].items() if isinstance(value, float)}
    key = next((key for key in metrics if key.split(",")[0] == main_metric), next(iter(metrics), "none"))
    error = metrics.get(key.replace(",", "_stderr,"))
    scores = {"metric": key, "n": result["n"], "this model": metrics.get(key), "standard error": error}
    others = ("paper, base", "paper, SFT", "Qwen3-0.6B-Base", "guess")
    return scores | {model: None if percent is None else percent / 100 for model, percent in zip(others, percents)}
