"""Load and save models: our checkpoints, the paper's release, Qwen3, model folders, on disk or on the hub; upcycling.

from common.weights import from_pretrained
model = from_pretrained("Qwen/Qwen3-0.6B-Base")
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.run import build_model, load_checkpoint, write_json
from common.settings import UserError
from model import ACTIVATIONS, ModelConfig, PolychromaticLM

# Tensor names of other layouts: (pattern of their name, our name).
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


def from_pretrained(
    source: str | Path, revision: str | None = None, router_context: str | None = None
) -> PolychromaticLM:
    """A float32 model on the CPU in evaluation mode, from any of four layouts, recognized by their tensor names.

    - a checkpoint of train.py or sft.py, or a run folder that holds one
    - config.json and model.safetensors of save_pretrained()
    - the paper's released weights: .safetensors, or their training checkpoint. They have a "sequence" router and no
      noise; tau is the file's, or 0.1
    - a Qwen3 (config.json, .safetensors, sharded or not): a model with one activation, K = 1
    source: a local path, or owner/name of a model on the hub, at a revision. router_context replaces the model's own.
    Raises UserError naming the file and the fault.
    """
    config, state, path = load_weights(source, revision)
    if router_context:
        config = dataclasses.replace(config, router_context=router_context)
    return build_model(config, state, path).eval()


def open_model(
    source: str | Path, device: torch.device, revision: str | None = None, router_context: str | None = None
) -> PolychromaticLM:
    """Load a model for inference onto a device. Notes about it go to stderr: stdout is for generated text."""
    model = from_pretrained(source, revision, router_context)
    print(f"model: {source}", file=sys.stderr)
    if model.config.sees_future:
        print(
            "slow: its router averages the whole sequence, so every token is computed again from the start; "
            "--router_context=prefix reads only the past, with a cache",
            file=sys.stderr,
        )
    return model.to(device)


def load_weights(source: str | Path, revision: str | None = None) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """Configuration, tensors under our names, and file of a model; arguments and errors as from_pretrained()'s."""
    path = Path(source) if Path(source).exists() else download(str(source), revision)
    if revision and path == Path(source):
        raise UserError(f"{source} is a local path, which has no revisions")
    path = find_weights(path) if path.is_dir() else path
    settings = read_json(path.parent / "config.json")
    is_checkpoint = not path.name.endswith((".safetensors", ".index.json"))
    saved = load_checkpoint(path) if is_checkpoint else {"model": load_safetensors(path)}
    try:
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in saved["model"].items()}
        if "embedding.weight" in state:
            settings = saved.get("model_config", settings)
            if not settings:
                raise ValueError("there is no config.json beside it")
            config = ModelConfig(**settings)
        elif "embeddings.weight" in state:  # the paper's release; its rotary tables are recomputed
            state = renamed({name: t for name, t in state.items() if not name.startswith("rope.")}, RELEASED_NAMES)
            config = ModelConfig(**shape_of(state), router_context="sequence", gumbel=False)
            state.setdefault("tau", torch.tensor(float(saved.get("tau", 0.1))))
        elif "model.embed_tokens.weight" in state:
            if not settings.get("tie_word_embeddings", True) and "lm_head.weight" not in state:
                raise KeyError("lm_head.weight")
            state = renamed(state, QWEN3_NAMES) | {"tau": torch.tensor(1.0)}
            config = ModelConfig(**shape_of(state), **qwen3_settings(settings, path.parent / "config.json"))
        else:
            raise ValueError(f"no known layout; its first tensor is {next(iter(state), 'missing')}")
        return config, state, path
    except KeyError as e:
        raise UserError(f"{path} lacks the tensor {e.args[0]}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise UserError(f"{path} does not hold a model of this project: {' '.join(str(e).split())[:300]}") from None


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder."""
    candidates = [folder / name for name in ("ckpt.pt", "model.safetensors.index.json", "model.safetensors")]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"no checkpoint at {candidates[0]}, and no model.safetensors beside it")


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no file."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e})") from None


def renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """state under our names; other names stay. A head equal to the embedding is left out."""
    found = {}
    for theirs, tensor in state.items():
        ours = (re.sub(pattern, name, theirs) for pattern, name in names if re.fullmatch(pattern, theirs))
        found[next(ours, theirs)] = tensor
    if "head.weight" in found and torch.equal(found["head.weight"], found["embedding.weight"]):
        del found["head.weight"]
    return found


def shape_of(state: dict[str, Tensor]) -> dict:
    """ModelConfig settings read from the tensors' shapes. Raises KeyError for a missing tensor."""
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


def qwen3_settings(settings: dict, path: Path) -> dict:
    """Settings of ModelConfig in a Qwen3's config.json; raises ValueError for an unsupported setting."""
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
        raise ValueError(f"{path} asks for {', '.join(named)}, which this model does not have")
    return {
        "block_size": settings.get("max_position_embeddings", 32_768),
        "rope_theta": float(settings.get("rope_theta") or rope.get("rope_theta", 1_000_000.0)),
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "activations": (settings.get("hidden_act", "silu"),),
    }


def download(name: str, revision: str | None) -> Path:
    """The folder of a model on the hub, in the hub's cache.

    Only owner/name can be on the hub: one slash, no file's suffix, and an owner that is no folder here and not "out".
    """
    owner, is_file = name.partition("/")[0], name.endswith((".pt", ".safetensors"))
    if is_file or owner == "out" or Path(owner).is_dir() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        newest_first = sorted(Path("out").glob("**/ckpt.pt"), key=lambda path: -path.stat().st_mtime)
        runs = ", ".join(str(path.parent) for path in newest_first[:5])
        hint = f"the newest runs are {runs}" if runs else "train one: python train.py config/tiny.py"
        raise UserError(f"no checkpoint at {name}: no such file or folder; {hint}")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as e:  # the package, the model, the revision or the network is missing: each raises its own kind
        reason = " ".join(str(e).split())[:150]
        raise UserError(f"no checkpoint at {name}, and no such model on the hub ({reason})") from None


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of all files that an index.json names."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("reading .safetensors needs a package: pip install safetensors") from None
    try:
        names = [path.name]
        if path.suffix == ".json":
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"it names {outside[0]!r}, a file outside its folder")
        tensors = {}
        for name in names:
            path = path.with_name(name)  # an error names the file that failed
            tensors.update(load_file(path))
        return tensors
    except FileNotFoundError:
        raise UserError(f"no weights at {path}") from None
    except Exception as e:
        raise UserError(f"{path} is damaged ({e})") from None


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The most recently written checkpoint under root."""
    paths = list(root.glob("**/ckpt.pt"))
    if not paths:
        raise UserError(
            f"no checkpoint under {root}; train one (python train.py config/tiny.py) or name it with --init_from="
        )
    return max(paths, key=lambda path: path.stat().st_mtime)


# ------------------------------------------------------------------------------------------------ a run's first weights


def inherit_shape(cfg, shape: dict, source: str | Path):
    """Copy the starting model's shape into cfg. Raises UserError for an override that contradicts its weights."""
    free = {"block_size", "gumbel", "router_context", "router_centred", "tokenizer"}  # no weight depends on these
    if len(shape["activations"]) == 1 and set(shape["activations"]) <= set(cfg.activations):
        free |= {"activations", "router_hidden"}  # upcycling
    for name, theirs in shape.items():
        ours = getattr(cfg, name)
        if name not in cfg.overridden:
            setattr(cfg, name, theirs)
        elif ours != theirs and name not in free:
            raise UserError(f"{source} has {name}={theirs!r}, not {ours!r}")


def starting_model(cfg) -> PolychromaticLM:
    """The model that cfg.init_from names, upcycled if cfg has more activations. Copies its shape into cfg."""
    config, state, path = load_weights(cfg.init_from, cfg.revision)
    inherit_shape(cfg, dataclasses.asdict(config), cfg.init_from)
    tau = next(tensor for name, tensor in state.items() if name.endswith("tau")).item()
    if cfg.activations != config.activations:
        print(f"upcycling {'/'.join(config.activations)} to {'/'.join(cfg.activations)}: the same function")
        torch.manual_seed(cfg.seed)
        state = upcycle(state, cfg.model_config(), config.activations[0], cfg.tau_start)
    elif len(config.activations) > 1 and abs(tau - cfg.tau_start) > 1e-6:
        print(f"the routing goes from tau {tau:g} of {cfg.init_from} to {cfg.tau_start:g}")
    print(f"starting from the model of {cfg.init_from}")
    return build_model(cfg.model_config(), state, path)


def upcycle(state: dict[str, Tensor], config: ModelConfig, activation: str, tau: float) -> dict[str, Tensor]:
    """Weights with routing that at temperature tau give the same function as the plain GLU of this activation.

    The activation gets e^10 times the weight of each other one, in every neuron; the router's output starts at zero.
    With noise, which a low tau does not reduce, alpha is at least 10, so that training starts from that function too.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("tau")} | {"tau": torch.tensor(tau)}
    R, K = config.router_hidden, len(config.activations)
    alpha = torch.zeros(config.d_ff, K)
    alpha[:, config.activations.index(activation)] = 10 * (max(tau, 1.0) if config.gumbel else tau)
    for i in range(config.n_layer):
        routing = {"alpha": alpha}
        if R:
            routing |= {
                "beta": torch.ones(K),
                "router_out.weight": torch.zeros(K, R),
                "router_out.bias": torch.zeros(K),
            }
            w1 = 0.02 * torch.randn(R, config.n_embd)
            routing |= {"router_in.weight": w1, "router_in.bias": torch.zeros(R)}
        state |= {f"blocks.{i}.ffn.{name}": tensor for name, tensor in routing.items()}
    return state


def freeze(model: PolychromaticLM, parts: tuple[str, ...]):
    """Freeze parameters whose names contain one of the parts. Raises UserError if a part matches none."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.|\.weight$", "", name) for name in names)
            raise UserError(f"frozen: no parameter has {part!r} in its name; there are {', '.join(kinds)}")
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in parts))
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"frozen: {','.join(parts)} leaves nothing to train")


def save_pretrained(model: PolychromaticLM, directory: str | Path):
    """Write config.json and model.safetensors; from_pretrained() reads them back bit for bit.

    Raises UserError if the safetensors package is not installed, or if the folder holds another model.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("writing .safetensors needs a package: pip install safetensors") from None
    directory = Path(directory)
    for name in ("ckpt.pt", "model.safetensors.index.json"):
        if (directory / name).exists():
            message = f"{directory} has a {name}, which from_pretrained() would read instead"
            raise UserError(f"{message}; choose another folder")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", dataclasses.asdict(model.config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "model.partial")
    (directory / "model.partial").replace(directory / "model.safetensors")
