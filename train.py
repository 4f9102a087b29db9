"""
Train SmolLM2-135M, or a smaller Llama. Each checkpoint is a Hugging Face model folder.

$ python train.py                                    # the small model: minutes on two CPU cores
$ python train.py --max_iters=1000                   # any setting below can be given like this
$ python train.py --size=135m --data_dir=data-web --out_dir=out-135m
$ python train.py --init_from=HuggingFaceTB/SmolLM2-135M --data_dir=data-tuned --out_dir=out-tuned
$ torchrun --standalone --nproc_per_node=8 train.py --out_dir=out-8    # on eight GPUs

The first two make their data of input.txt; the others need what prepare.py has made.
Ctrl-C saves and exits; the same command resumes.
"""
import contextlib
import csv
import ctypes
import functools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import prepare
from prepare import BOOLEANS, Data, explained, read_json, require, say, tolerated

if __name__ == "__main__":  # no stack trace on Ctrl-C while torch loads
    prepare.on_signal(signal.SIG_DFL, "SIGINT")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # AdamW would do it later, and keep the process group alive to the end
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

# -------------------------------------------------------------------------------------- settings
# run
out_dir = "out"                  # checkpoints, log.csv and loss.png
init_from = "auto"               # auto (resume if there is a run), scratch, resume, or a model
eval_interval = 50               # iterations between evaluations, each with a checkpoint
log_interval = 10                # iterations between rows of log.csv
eval_only = False                # evaluate once and end
wandb_log = False                # log to Weights & Biases too
# model
size = "tiny"                    # tiny (the values below), 135m, 360m or 1.7b (see SIZES)
n_layer = 4
n_head = 2                       # query heads
n_kv_head = 1                    # key and value heads, each shared by n_head / n_kv_head queries
n_embd = 128                     # channels
intermediate_size = 384          # channels inside the MLP
vocab_size = 0                   # rows of the embedding; 0: the tokenizer's vocabulary size
rope_theta = 100_000.0           # base of the rotary embedding
norm_eps = 1e-5                  # added inside RMSNorm
dropout = 0.0                    # on the embedding and on both branches of a layer
# data
data_dir = "data"                # made by prepare.py; "data" is made of input.txt if missing
block_size = 128                 # tokens in a sequence
batch_size = 16                  # sequences in a micro-batch, at most
gradient_accumulation_steps = 1  # times batch_size: sequences in an update, over all processes
seed = 1337                      # of weights, data order, dropout and samples
# optimizer
optimizer = "muon"               # adamw, or muon (for the layers' matrices; AdamW for the rest)
max_iters = 500                  # iterations; each is one update
learning_rate = 1.3e-2           # peak, for AdamW; Muon's is MUON_SCALE times this
weight_decay = 1.0               # of matrices
beta1 = 0.9                      # of AdamW
beta2 = 0.99                     # of AdamW
grad_clip = 1.0                  # largest norm of the gradient; 0: no limit
schedule = "cosine"              # cosine, or wsd (constant, then linear over the last fifth)
warmup_iters = -1                # linear warm-up; -1: a twentieth of max_iters, at most 2000
lr_decay_iters = -1              # when the rate reaches min_lr; -1: max_iters of the run's start
min_lr = -1.0                    # -1: a tenth of learning_rate
# machine
device = "auto"                  # auto, cpu, cuda, cuda:1 or mps
dtype = "auto"                   # of matrix products: auto, float32, bfloat16 or float16
compile = "auto"                 # auto (on CUDA, and elsewhere from 512 channels), true or false
gradient_checkpointing = False   # recompute layers in the backward pass: less memory, more time
deterministic = False            # bit-exact resume on GPUs too; slower

# ------------- what --size and --init_from change at once: it wins over the block, flags over it
RECIPE = dict(  # SmolLM2's rates (arXiv:2502.02737), with half a million tokens an update
    vocab_size=49152, block_size=2048, batch_size=16, gradient_accumulation_steps=16,
    optimizer="adamw", max_iters=10_000, learning_rate=3e-3, weight_decay=0.1, beta2=0.95,
    eval_interval=250)
SIZES = {
    "tiny": {},
    "135m": RECIPE | dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, intermediate_size=1536),
    "360m": RECIPE | dict(n_layer=32, n_head=15, n_kv_head=5, n_embd=960, intermediate_size=2560,
                          batch_size=8, gradient_accumulation_steps=32),
    "1.7b": RECIPE | dict(n_layer=24, n_head=32, n_kv_head=32, n_embd=2048, intermediate_size=8192,
                          batch_size=4, gradient_accumulation_steps=64, learning_rate=5e-4,
                          rope_theta=130_000.0),
}
FINE_TUNING = dict(optimizer="adamw", learning_rate=1e-4, weight_decay=0.1, beta2=0.95,
                   batch_size=4, gradient_accumulation_steps=4,
                   block_size=512)  # or the model's context, if that is shorter
NO_MODEL = ("auto", "scratch", "resume")  # values of init_from that name no model
SHAPE = dict(  # the settings that make the shape: their names in config.json
    n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
    n_embd="hidden_size", intermediate_size="intermediate_size", vocab_size="vocab_size",
    rope_theta="rope_theta", norm_eps="rms_norm_eps")


def presets(flags):
    """The settings that --size and --init_from=MODEL stand for; other flags override them."""
    name = flags.get("size", size)
    source = flags.get("init_from", init_from)
    require(name in SIZES, f"--size={name} must be one of {', '.join(SIZES)}")
    if source in NO_MODEL:
        return SIZES[name]
    out = flags.get("out_dir", out_dir)  # a run there has its shape, and the source may be gone
    config = read_config(find_model(out if checkpoints(out) else source))
    shape = {ours: getattr(config, theirs) for ours, theirs in SHAPE.items()}
    shape["size"] = Path(source).name
    for key, value in shape.items():
        require(flags.get(key, value) == value, f"the model has {key}={value}: leave out --{key}")
    shape["block_size"] = min(FINE_TUNING["block_size"], config.max_position_embeddings)
    return FINE_TUNING | shape


def check_settings():
    """Refuse invalid settings."""
    choices = {"optimizer": "adamw, muon", "schedule": "cosine, wsd",
               "dtype": "auto, float32, bfloat16, float16"}
    for name, known in choices.items():
        value = globals()[name]
        require(value in known.split(", "), f"--{name}={value} must be one of {known}")
    require(str(compile).lower() in ("auto", *BOOLEANS),
            f"--compile={compile} must be auto, true or false")
    for name in ("n_layer n_head n_kv_head n_embd intermediate_size rope_theta block_size "
                 "batch_size gradient_accumulation_steps max_iters eval_interval "
                 "log_interval").split():
        require(globals()[name] >= 1, f"--{name}={globals()[name]} must be 1 or more")
    for name in ("out_dir", "data_dir"):
        require(globals()[name], f"--{name}= is empty: name a folder")
    require(seed < 2 ** 63, f"--seed={seed} must be below 2 ** 63")
    for name in ("dropout", "beta1", "beta2"):
        require(globals()[name] < 1, f"--{name}={globals()[name]} must be below 1")
    require(n_head % n_kv_head == 0, f"--n_head={n_head} must be a multiple of {n_kv_head=}")
    require(warmup_iters <= max_iters, f"--warmup_iters={warmup_iters} is above {max_iters=}")
    require(min_lr == -1 or 0 <= min_lr <= learning_rate,
            f"--min_lr={min_lr} must be from 0 to --learning_rate={learning_rate}")


# ----------------------------------------------------------------------------------------- model
def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, positions=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        if cache is not None:
            keys, values = cache  # (B, heads, limit, head_dim) each
            k = keys.index_copy_(2, positions, k)
            v = values.index_copy_(2, positions, v)
            if T == 1:  # the queries of a key head become rows of one product: much faster on CPUs
                q = q.view(B, k.shape[1], -1, self.head_dim)
        if x.is_cuda and v.dtype != torch.bfloat16:  # some GPUs lack a fast grouped-query kernel
            groups = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2)  # (B, T, heads, head_dim) again
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *attention_args):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), *attention_args))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def slice_loss(x, weight, targets):
    """Summed cross-entropy (nats) of logits x @ weight.T (N, V); ignores targets (N,) of -1."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="sum")


LOGITS_AT_ONCE = 2 ** 25  # in a slice, on GPUs four times as many; those of a batch take gigabytes


class SlicedLoss(torch.autograd.Function):
    """slice_loss by slices; forward takes the gradients, too (Liger Kernel, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, x, weight, targets, loss_of_slice):
        at_once = 4 * LOGITS_AT_ONCE if x.is_cuda else LOGITS_AT_ONCE
        slices = math.ceil(len(x) * len(weight) / at_once)
        rows = 128 * math.ceil(len(x) / slices / 128)  # a multiple of 128 is fast
        training = ctx.needs_input_grad[0]
        x, weight = (tensor.detach().requires_grad_(training) for tensor in (x, weight))
        summed = 0.0
        with torch.set_grad_enabled(training):
            for some_x, some_targets in zip(x.split(rows), targets.split(rows)):
                loss = loss_of_slice(some_x, weight, some_targets)
                if training:
                    loss.backward()
                summed = summed + loss.detach()
        if training:
            ctx.save_for_backward(x.grad, weight.grad)
        return summed

    @staticmethod
    def backward(ctx, scale):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * scale, weight_grad * scale, None, None


class Llama(nn.Module):
    """Hugging Face's LlamaForCausalLM, tensor for tensor; `config` is what config.json holds."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(
                Block(config, dropout) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.gradient_checkpointing = False
        self.loss_of_slice = slice_loss  # main() may compile this,
        self.decode = self.last_logits   # and sample.py this

        # rotary embedding (RoFormer, arXiv:2104.09864) of the channels i and i + head_dim / 2
        frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.outer(torch.arange(config.max_position_embeddings), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)  # (positions, head_dim)
        self.register_buffer("sin", angle.sin(), persistent=False)

        # the projections into the residual stream start smaller, so that it does not grow (GPT-2)
        for name, p in self.named_parameters():
            std = config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * config.num_hidden_layers)
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif not name.endswith("norm.weight"):  # which stay at 1
                raise ValueError(f"no initial values are chosen for {name}")

    def head(self):
        """The matrix (V, C) that makes logits; a tied model uses the embedding's."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def hidden(self, tokens, caches=None, positions=None):
        """Hidden states (B, T, C) of tokens (B, T), at `positions` (T,) of the caches, if any."""
        x = self.dropout(self.model.embed_tokens(tokens))
        if caches is None:
            mask = None
            caches = [None] * len(self.model.layers)
            positions = torch.arange(tokens.shape[1], device=x.device)
        else:
            mask = positions[:, None] >= torch.arange(caches[0].shape[3], device=x.device)
        cos = self.cos[positions].to(x.dtype)
        sin = self.sin[positions].to(x.dtype)
        for layer, cache in zip(self.model.layers, caches):
            if self.gradient_checkpointing and self.training:
                x = recompute_in_backward(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, positions)
        return self.model.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V) of tokens (B, T)."""
        return F.linear(self.hidden(tokens), self.head())

    def loss(self, tokens, targets):
        """Summed loss (nats) of predicting targets (B, T) from tokens (B, T); -1 is ignored."""
        x = self.hidden(tokens).flatten(0, 1)
        return SlicedLoss.apply(x, self.head(), targets.flatten(), self.loss_of_slice)

    def last_logits(self, tokens, caches, positions):
        """Logits (B, V) for the token after the last one."""
        return F.linear(self.hidden(tokens, caches, positions)[:, -1], self.head())

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens, choose):
        """Yield the next ids (B, 1) after tokens (B, T), as choose(logits (B, V), tokens) picks."""
        limit = min(self.config.max_position_embeddings, tokens.shape[1] + max_new_tokens)
        shape = (2, len(tokens), self.config.num_key_value_heads, limit, self.config.head_dim)
        caches = [self.head().new_zeros(shape) for _ in self.model.layers]  # keys and values
        new = tokens
        position = 0
        for _ in range(max_new_tokens):
            if position + new.shape[1] > limit:  # the context is full: keep its last half
                new = tokens[:, -math.ceil(limit / 2):]
                position = 0
            positions = torch.arange(position, position + new.shape[1], device=tokens.device)
            position += new.shape[1]
            step = self.decode if new.shape[1] == 1 else self.last_logits
            # a row times a matrix is nearly twice as fast without oneDNN; None: tf32 as it is
            with torch.backends.mkldnn.flags(enabled=new.numel() > 1, allow_tf32=None):
                logits = step(new, caches, positions)
            new = choose(logits.float(), tokens)
            tokens = torch.cat((tokens, new), dim=1)
            yield new


# ------------------------------------------------------------------------ optimizer and schedule
MOMENTUM = 0.95   # of Muon
MUON_SCALE = 0.6  # its learning rate, as a share of AdamW's


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum (Jordan, 2024), with updates as large as AdamW's (arXiv:2502.16982)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # the matrices of one shape, stepped together as a stack
            rate = MUON_SCALE * group["lr"]
            updates = []
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                updates.append(p.grad.lerp(momentum, MOMENTUM))  # Nesterov
            for p, update in zip(group["params"], orthogonal(torch.stack(updates))):
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(update, alpha=rate * 0.2 * max(p.shape) ** 0.5)  # 0.2: the size of AdamW's


def orthogonal(matrices):
    """Matrices (n, rows, columns), their singular values brought near 1 by Newton-Schulz steps."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model):
    """[AdamW], or [AdamW for the rest, Muon for the layers' matrices]. update() sets the rates."""
    norms, matrices = [], []
    stacks = {}  # the layers' matrices, by shape
    for name, p in model.named_parameters():
        if p.dim() == 1:
            norms.append(p)
        elif p.dim() != 2:
            raise ValueError(f"no optimizer is chosen for {name}, of shape {tuple(p.shape)}")
        elif optimizer == "muon" and ".layers." in name:
            stacks.setdefault(p.shape, []).append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
    if optimizer == "adamw":
        return [adamw]
    groups = [{"params": stack} for stack in stacks.values()]
    return [adamw, Muon(groups, {"weight_decay": weight_decay})]


def learning_rate_at(iteration):
    """The learning rate of an iteration (from 0): linear warm-up, then down to min_lr."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr
    left = lr_decay_iters - iteration
    span = lr_decay_iters - warmup_iters
    if schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * (1 - left / span)))
    else:  # warm-up, stable, decay (arXiv:2404.06395)
        fall = min(lr_decay_iters / 5, span)  # iterations
        height = min(1, left / fall)
    return min_lr + height * (learning_rate - min_lr)


# ------------------------------------------------------------------------ models and checkpoints
SUPPORTED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)


def checkpoints(folder):
    """The checkpoints in an out folder, the newest last."""
    return sorted(Path(folder).glob("step-" + 7 * "[0-9]"))


def saved_run(checkpoint):
    """What run.json says of a checkpoint; {} if there is none."""
    file = checkpoint / "run.json"
    return read_json(file) if file.exists() else {}


def saved_loss(checkpoint):
    """A checkpoint's validation loss on the text that the newest one has; inf if not known."""
    saved = saved_run(checkpoint)
    newest = saved_run(checkpoints(checkpoint.parent)[-1])
    loss = saved.get("val_loss")
    if loss is None or saved.get("data") != newest.get("data"):
        return math.inf
    return loss


def find_model(name):
    """The model folder of a name: the best in an out folder, the folder itself, or the hub's."""
    if checkpoints(name):
        return min(reversed(checkpoints(name)), key=saved_loss)  # on a tie, the newest
    if Path(name).is_dir() or "/" not in str(name):  # a name on the hub has one
        is_model = Path(name, "config.json").exists()
        require(is_model, f"there is no model in {name}: run python train.py first")
        return Path(name)
    return prepare.from_hub(name, "*.safetensors", "*.json")


def read_config(folder):
    """The config.json of a Hugging Face Llama; options that this model lacks are an error."""
    file = Path(folder, "config.json")
    config = {key: value for key, value in read_json(file).items() if value is not None}
    config |= config.get("rope_parameters", {})  # where transformers 5 keeps rope_theta
    for key, value in (SUPPORTED | {"rope_scaling": None, "rope_type": "default"}).items():
        found = config.get(key, value)
        require(found == value, f"{file}: {key}={found} is not supported, only {value}")
    heads = config.get("num_attention_heads")
    config = {"num_key_value_heads": heads, "rope_theta": 1e4, "rms_norm_eps": 1e-6} | config
    numbers = {key: config.get(key) for key in (*SHAPE.values(), "max_position_embeddings")}
    for key, value in numbers.items():
        good = isinstance(value, (int, float)) and value > 0
        require(good, f"{file}: {key}={value} is not a number above 0")
    stops = config.get("eos_token_id", [])  # one id or several
    return SimpleNamespace(
        **SUPPORTED, **numbers, head_dim=config.get("head_dim", config["hidden_size"] // heads),
        initializer_range=config.get("initializer_range", 0.02),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_id=stops if isinstance(stops, list) else [stops])


def load_model(folder, dropout=0.0):
    """The Llama of a Hugging Face folder, in float32 on the CPU."""
    model = Llama(read_config(folder), dropout)
    weights = {}
    problem = f"{folder} is damaged or incomplete: replace it, or move it away"
    with explained(problem, OSError, SafetensorError, RuntimeError):
        for file in Path(folder).glob("*.safetensors"):
            weights |= load_file(file)
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        model.load_state_dict(weights)
    return model


@dataclass
class Run:
    """The progress of a run."""

    iteration: int = 0
    sequences: int = 0  # trained on so far; the next batch begins after them
    rows: dict = field(default_factory=dict)  # of log.csv, by iteration
    wandb_id: str = None

    def record(self, **columns):
        """Add columns to this iteration's row of log.csv."""
        self.rows.setdefault(self.iteration, {"iter": self.iteration}).update(columns)

    @property
    def val_loss(self):
        """The validation loss of these weights; None if not evaluated, or not finite."""
        loss = self.rows.get(self.iteration, {}).get("val_loss", math.nan)
        return loss if math.isfinite(loss) else None


def save_checkpoint(model, data, run, optimizers, machine):
    """Write out_dir/step-<iteration> aside, then rename it; keep only the newest and the best."""
    path = Path(out_dir, f"step-{run.iteration:07d}")
    tmp = Path(out_dir, ".unfinished")
    finite = all(p.isfinite().all() for p in model.parameters())
    require(finite, f"{path}: weights that are not finite are not saved: lower --learning_rate")
    ids = {"bos_token_id": data.start[0], "eos_token_id": data.eot}
    marks = {name.removesuffix("_id"): data.tokenizer.id_to_token(ids[name]) for name in ids}
    for_transformers = {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    json_files = {
        "config": vars(model.config) | ids | for_transformers,
        "generation_config": ids,
        "tokenizer_config": marks | {"tokenizer_class": "PreTrainedTokenizerFast"},
        "run": {"iteration": run.iteration, "val_loss": run.val_loss, "wandb_id": run.wandb_id,
                "settings": prepare.settings_of(globals()), "data": data.meta}}
    trainer = {"run": vars(run), "scaler": machine.scaler.state_dict(),
               "optimizers": [opt.state_dict()["state"] for opt in optimizers]}

    problem = f"cannot save {path}; earlier checkpoints are intact"
    with explained(problem, OSError, RuntimeError, SafetensorError):
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed run
        tmp.mkdir()
        for name, values in json_files.items():
            (tmp / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")
        (tmp / "tokenizer.json").write_text(data.tokenizer.to_str(pretty=True), "utf-8")
        save_file(model.state_dict(), tmp / "model.safetensors", {"format": "pt"})
        shutil.copymode(tmp / "run.json", tmp / "model.safetensors")  # else the owner's alone
        with open(tmp / "trainer.pt", "wb") as file:
            torch.save(trainer, file)
        flush(*tmp.iterdir(), tmp)
        if path.exists():  # saved at Ctrl-C, and evaluated only now: the weights are the same
            for file in tmp.iterdir():
                file.replace(path / file.name)
        else:
            tmp.rename(path)
        flush(path, out_dir)
        for old in set(checkpoints(out_dir)[:-1]) - {find_model(out_dir)}:
            shutil.rmtree(tmp, ignore_errors=True)
            old.rename(tmp)  # so that no incomplete step- folder is left if this is killed
            shutil.rmtree(tmp)


def flush(*paths):
    """fsync files and folders, where the system can."""
    if os.name != "posix":
        return
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        with tolerated("fsync", OSError):
            os.fsync(file)
        os.close(file)


def restore(checkpoint, optimizers, machine):
    """The Run of a checkpoint. Also restores the state of the optimizers and the scaler."""
    file = checkpoint / "trainer.pt"
    problem = f"{file} is damaged or of an older train.py: move {checkpoint} away"
    kinds = OSError, EOFError, RuntimeError, TypeError, LookupError, pickle.UnpicklingError
    with explained(problem, *kinds):
        trainer = torch.load(file, machine.device, weights_only=True)  # a pickle could run code
        run = Run(**trainer["run"])
        states = trainer["optimizers"]
    for opt, state in zip(optimizers, states, strict=True):
        opt.load_state_dict(opt.state_dict() | {"state": state})  # the rates are this command's
    if trainer["scaler"]:
        machine.scaler.load_state_dict(trainer["scaler"])
    return run


# -------------------------------------------------------------------------------------- machine
TOKENS_AT_ONCE = 4096  # on CPUs, and to evaluate: more are no faster, and take gigabytes


def choose_device(name):
    """The torch.device that --device names, after a test that it works."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    name = best if name == "auto" else name
    with explained(f"use --device={best}: {name} does not work", RuntimeError, AssertionError):
        return torch.zeros(1, device=name).device


def best_dtype(device):
    """The 16-bit type of which the device has fast matrix products, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if is_fast else "float32"


def set_up_machine():
    """Join the other processes, if any. Returns where and how to compute, as a namespace."""
    rank, world = prepare.process_rank()
    name = device
    if world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(gpu < gpus, f"there are {gpus} GPUs here: use --nproc_per_node={gpus}")
        torch.cuda.set_device(gpu)
        name = f"cuda:{gpu}"
    where = choose_device(name)
    cuda = where.type == "cuda"
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32

    sequences = batch_size * gradient_accumulation_steps
    share = sequences // world
    require(sequences % world == 0, f"{world} processes cannot share {sequences} sequences: "
                                    "change --batch_size or --gradient_accumulation_steps")
    micro_batch = min(batch_size, share)
    if where.type == "cpu":
        keep_freed_memory()
        micro_batch = min(micro_batch, max(1, TOKENS_AT_ONCE // block_size))

    wide = cuda or n_embd >= 512  # on CPUs bfloat16 and compiling help wide models alone
    precision = dtype
    if dtype == "auto":
        precision = best_dtype(where) if wide else "float32"
    autocast = torch.autocast(where.type, getattr(torch, precision), enabled=precision != "float32")
    scaler = torch.amp.GradScaler(where.type, init_scale=4096.0, enabled=precision == "float16")
    return SimpleNamespace(
        device=where, rank=rank, world=world, dtype=precision, autocast=autocast, scaler=scaler,
        sequences=sequences,      # of an iteration
        share=share,              # of them, this process's
        micro_batch=micro_batch,  # of its share, at a time
        compile=BOOLEANS.get(str(compile).lower(), wide),
        hide_bar=True if rank > 0 else None)  # None: shown if there is a terminal


def keep_freed_memory():
    """Let glibc keep freed memory: asking the kernel for it again took a tenth of the time."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def compiles(device):
    """Whether torch.compile works on a device; a warning says why not."""
    say("compiling, which takes up to a minute ...", sys.stderr)
    with tolerated("compiling", Exception):  # a compiler's, a driver's or a cache folder's
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, 64, device=device))
        return True
    return False


def total(number, machine):
    """A number summed over all processes."""
    if machine.world == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=machine.device)
    add_up(tensor)
    return tensor.item()


def add_up(tensor):
    """Sum a tensor over all processes, in place."""
    with explained("another process has failed", RuntimeError):
        dist.all_reduce(tensor)


# -------------------------------------------------------------------------- starting or resuming
def find_start():
    """(model folder to start from or None, run.json of the run to resume or {})."""
    if found := checkpoints(out_dir):
        require(init_from != "scratch", f"{out_dir} holds a run: choose another --out_dir")
        saved = saved_run(found[-1])
        require(saved, f"{out_dir} is of an older train.py: start from its weights, "
                       f"--init_from={out_dir} --out_dir=NEW")
        return found[-1], saved
    if init_from not in NO_MODEL:
        return find_model(init_from), {}
    needed = eval_only or init_from == "resume"
    require(not needed, f"{out_dir} holds no run: leave out --init_from=resume and --eval_only")
    return None, {}


def open_data(source, machine):
    """The Data of data_dir, whose tokenizer must be that of `source`. Makes the default one."""
    if not Path(data_dir).exists():
        require(data_dir == "data" and machine.world == 1,
                f"there is no {data_dir}: run python prepare.py --input=TEXT --data_dir={data_dir}")
        prepare.prepare(tokenizer=str(source or "bpe"))
    data = Data(data_dir)
    if source:
        known = prepare.fingerprint(prepare.load_tokenizer(source))
        require(known == data.meta["tokenizer_sha256"],
                f"{data_dir} has a different tokenizer: run python prepare.py --input=TEXT "
                f"--tokenizer={source} --data_dir=NEW and train with --data_dir=NEW, or choose "
                "another --out_dir for another model")
    tokens = data.meta["train_tokens"]
    require(tokens >= 2 * block_size,
            f"{data_dir} has only {tokens:,} tokens to train on: lower --block_size={block_size}")
    return data


def resolve_settings(saved, data):
    """Fill in the settings at 0 or -1; refuse those that differ from the run to resume."""
    global vocab_size, warmup_iters, lr_decay_iters, min_lr
    old = saved.get("settings", {})
    if vocab_size == 0:
        vocab_size = data.meta["vocab_size"]
    if warmup_iters == -1:
        warmup_iters = old.get("warmup_iters", min(max_iters // 20, 2000))
    if lr_decay_iters == -1:
        lr_decay_iters = old.get("lr_decay_iters", max_iters)
    if min_lr == -1:
        min_lr = learning_rate / 10

    now = prepare.settings_of(globals())
    changed = {key: value for key, value in old.items() if now.get(key, value) != value}
    if init_from in NO_MODEL and changed.get("init_from") in NO_MODEL:
        del changed["init_from"]

    # another model is refused; init_from and size, which set the others, are named alone
    for keys in (["init_from"], ["size"], [*SHAPE, "optimizer"]):
        fit = " ".join(f"--{key}={changed[key]}" for key in keys if key in changed)
        require(not fit, f"{out_dir} holds another run: add {fit}, or choose another --out_dir")
    same_text = saved.get("data", data.meta) == data.meta
    require(same_text or "data_dir" in changed,
            f"{data_dir} is not the text that {out_dir} began with: prepare that one again, or "
            f"start from its weights with --init_from={out_dir} --out_dir=NEW")
    for key, value in changed.items():
        say(f"changed: {key} = {now[key]} (was {value})")


def make_model(source, data):
    """The Llama of a model folder, or a new one, which fits the settings and the data."""
    torch.manual_seed(seed)
    if source:
        model = load_model(source, dropout)
    else:
        even = n_embd % (2 * n_head) == 0
        require(even, f"--n_embd={n_embd} must be a multiple of {2 * n_head}, twice --n_head")
        shape = {theirs: globals()[ours] for ours, theirs in SHAPE.items()}
        model = Llama(SimpleNamespace(
            **SUPPORTED, **shape, head_dim=n_embd // n_head, max_position_embeddings=block_size,
            initializer_range=n_embd ** -0.5, tie_word_embeddings=True), dropout)
    longest = model.config.max_position_embeddings
    require(block_size <= longest, f"--block_size={block_size} exceeds the model's {longest:,}")
    least = data.meta["vocab_size"]
    require(vocab_size >= least, f"--vocab_size={vocab_size} must be {least} or more")
    model.gradient_checkpointing = gradient_checkpointing
    return model


# ------------------------------------------------------------------------------------- reporting
def report(flags, model, data, run, machine, source):
    """Print what is about to happen, before anything that takes long."""
    for key, value in flags.items():
        say(f"overriding: {key} = {value}")
    parameters = sum(p.numel() for p in model.parameters())
    tokens = data.meta["train_tokens"]
    epochs = max_iters * machine.sequences * block_size / tokens
    say(f"device     {machine.world} x {machine.device}, {machine.dtype}")
    say(f"model      {size}, {n_layer} layers x {n_embd}, {parameters:,} parameters")
    say(f"data       {data_dir}: {tokens:,} tokens, {data.meta['val_tokens']:,} for validation")
    say(f"iteration  {machine.sequences} sequences of {block_size} tokens, "
        f"{machine.micro_batch} at a time")
    say(f"optimizer  {optimizer}, {warmup_iters:,} iterations of warm-up to {learning_rate:g}")
    say(f"schedule   {schedule} to {min_lr:g} at iteration {lr_decay_iters:,}")
    say(f"start      {source or 'scratch'}")
    say(f"run        {out_dir}, iterations {run.iteration:,} to {max_iters:,}, {epochs:.1f} epochs")
    if run.iteration >= max_iters and not eval_only:
        say(f"nothing left to do: --max_iters={2 * run.iteration} goes on at min_lr")
    if machine.device.type == "cpu":
        report_memory(parameters, machine)
    if not run.rows:
        say("evaluating before the first iteration ...")


@tolerated("reading how much memory is free", OSError, LookupError)
def report_memory(parameters, machine):
    """Print what a step needs on a CPU, where the system kills a process that takes too much."""
    tokens = machine.micro_batch * block_size
    state = 16 * parameters  # bytes: weights, gradients and two moments
    logits = 12 * min(LOGITS_AT_ONCE, tokens * vocab_size)  # and their gradients
    layers = 4 * tokens * n_layer * (16 * n_embd + 4 * intermediate_size)  # for the backward pass
    needed = (state + logits + layers) / 1e9
    say(f"memory     about {needed:.1f} GB for a step")
    if sys.platform == "linux":
        _, _, line = Path("/proc/meminfo").read_text().partition("MemAvailable:")
        free = int(line.split()[0]) / 1e6 / machine.world
        if needed > free:
            say(f"warning: only {free:.1f} GB are free, the system may kill this process: lower "
                "--batch_size or --block_size, or try --gradient_checkpointing=true")


@tolerated("writing log.csv", OSError)
def write_log(run):
    """Rewrite log.csv with every column that occurs; send wandb the last row."""
    rows = list(run.rows.values())
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(f"{out_dir}/log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if wandb_log:
        import wandb
        with tolerated("logging to wandb", Exception):
            wandb.log(rows[-1], step=rows[-1]["iter"])


def start_wandb(run):
    """Begin a run of Weights & Biases, or resume the one that this run had before."""
    problem = "--wandb_log does not work: pip install wandb, then wandb login"
    with explained(problem, Exception):  # missing, not logged in, no network
        import wandb
        wandb.init(project="smollm2", name=out_dir, id=run.wandb_id, resume="allow",
                   config=prepare.settings_of(globals()))
    run.wandb_id = wandb.run.id


@tolerated("drawing loss.png", Exception)
def draw_curve(run, data):
    """Draw the losses and the learning rate of log.csv as out_dir/loss.png."""
    from matplotlib.figure import Figure
    figure = Figure((7, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(4, 1))

    def points(name):
        found = [(row["iter"], row[name]) for row in run.rows.values() if name in row]
        return np.array(found).reshape(-1, 2).T

    x, y = points("train_loss")
    reach = len(y) // 40
    smooth = [y[max(0, i - reach):i + reach + 1].mean() for i in range(len(y))]
    losses.plot(x, y, "tab:blue", alpha=0.25)
    losses.plot(x, smooth, "tab:blue", label="training, smoothed")
    x, y = points("val_loss")
    best = np.nanargmin(y)
    losses.plot(x, y, "o-", color="tab:orange", markersize=3, label="validation")
    losses.plot(x[best], y[best], "r*", markersize=12, label=f"best: {y[best]:.4f}")
    rates.plot(*points("lr"), "tab:gray")

    # bits per byte of one nat per token
    bits = (data.meta["val_tokens"] - 1) / data.meta["val_bytes"] / math.log(2)
    right = losses.secondary_yaxis("right", (lambda y: y * bits, lambda y: y / bits))
    right.set_ylabel("bits per byte, validation")
    losses.set(title=f"{size}: {n_layer} layers x {n_embd}, on {data_dir}", ylabel="nats per token")
    losses.grid(alpha=0.3)
    losses.legend()
    rates.set(ylabel="learning rate", xlabel="iteration")
    figure.savefig(f"{out_dir}/loss.png", dpi=120)


def show_sample(model, data, run):
    """Print a text that the model writes, of at most 100 tokens."""
    if run.val_loss is None:
        return  # it is not finite: there are no probabilities to draw from
    start = torch.tensor([data.start], device=model.head().device)
    generator = torch.Generator(start.device).manual_seed(seed)
    temperature = 0.8

    def choose(logits, tokens):
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

    with torch.compiler.set_stance("force_eager"):
        ids = [new.item() for new in model.eval().generate(start, 100, choose)]
    if data.eot in ids:
        ids = ids[:ids.index(data.eot)]
    text = prepare.printable(data.tokenizer.decode(ids)).strip()
    rule = f"--- iteration {run.iteration:,}, temperature {temperature} ".ljust(60, "-")
    say(rule + f"\n{text}\n" + 60 * "-")


# -------------------------------------------------------------------------------------- training
stop_signals = []  # the times at which they arrived


def is_due(run):
    """Whether these weights are to be evaluated now, and have no finite loss yet."""
    at_interval = run.iteration % eval_interval == 0 or run.iteration >= max_iters
    return at_interval and run.val_loss is None


def ask_to_stop(run, machine, number, frame):
    """At a signal, finish this iteration or leave the evaluation, and save; at a second, quit."""
    if stop_signals:
        if machine.world > 1 and time.monotonic() < stop_signals[0] + 2:  # seconds
            return  # torchrun forwards the Ctrl-C that this process already got
        os._exit(128 + number)
    stop_signals.append(time.monotonic())
    doing = f"finishing iteration {min(run.iteration + 1, max_iters):,}"
    if is_due(run):
        doing = "leaving the evaluation"
    with contextlib.suppress(OSError):  # the terminal may be closed
        if machine.rank == 0:
            os.write(2, f"\n{doing}, then saving; Ctrl-C again quits at once\n".encode())


def stop_requested(machine):
    """Whether a signal has reached any process."""
    return total(len(stop_signals), machine) > 0


@torch.no_grad()
def evaluate(model, data, machine):
    """Print the loss over all of validation. Returns columns of log.csv, or None when stopped."""
    model.eval()
    count = data.meta["val_tokens"] - 1
    at_once = max(1, TOKENS_AT_ONCE // block_size)
    nats = 0.0
    firsts = range(0, math.ceil(count / block_size), at_once * machine.world)
    # shows a bar, if it takes long
    for first in tqdm(firsts, "evaluating", leave=False, delay=3, disable=machine.hide_bar):
        if stop_requested(machine):
            return None
        starts = (first + machine.rank * at_once + np.arange(at_once)) * block_size
        windows = np.stack(data.windows("val", starts, block_size))
        inputs, targets = torch.tensor(windows, device=machine.device)
        with machine.autocast:
            nats += model.loss(inputs, targets).item()
    nats = total(nats, machine)
    loss = nats / count
    bpb = nats / math.log(2) / data.meta["val_bytes"]
    perplexity = math.exp(min(loss, 700))  # exp(710) overflows
    say(f"validation loss {loss:.4f}, {bpb:.4f} bits per byte, perplexity {perplexity:.2f}")
    return {"val_loss": loss, "val_bpb": bpb, "val_perplexity": perplexity}


def add_gradients(model, batch, machine):
    """Add this process's part of the gradient of the mean loss. Returns that part of the loss."""
    all_tokens = batch[1].numel() * machine.world
    loss = 0.0
    for inputs, targets in batch.split(machine.micro_batch, dim=1):
        with machine.autocast:
            part = model.loss(inputs, targets) / all_tokens
        machine.scaler.scale(part).backward()
        loss = loss + part.detach()
    return loss


def update(model, optimizers, batch, rate, machine, dropout_seed):
    """Train on a batch. Returns its mean loss and the gradient's norm; no step unless finite."""
    batch = torch.tensor(np.stack(batch), device=machine.device)  # (inputs and targets, B, T)
    loss = None
    while loss is None:
        torch.manual_seed(dropout_seed)
        model.train().zero_grad()
        try:
            loss = add_gradients(model, batch, machine)
        except torch.OutOfMemoryError:
            require(machine.micro_batch > 1, f"out of memory: lower --block_size={block_size}")
            machine.micro_batch //= 2
            say(f"out of memory: {machine.micro_batch} sequences at a time now, of the same batch")

    if machine.world > 1:
        for p in model.parameters():
            add_up(p.grad)
    for opt in optimizers:
        machine.scaler.unscale_(opt)
        for group in opt.param_groups:
            group["lr"] = rate
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    loss = total(loss.item(), machine)
    if math.isfinite(loss + norm):
        with explained("no memory to step in: use a smaller --size", torch.OutOfMemoryError):
            for opt in optimizers:
                machine.scaler.step(opt)
    machine.scaler.update()
    return loss, norm


def log_iteration(run, bar, began, loss, norm, rate, machine):
    """Show an iteration on the bar and, at intervals and at the end, record it for log.csv."""
    speed = machine.sequences * block_size / max(time.perf_counter() - began, 1e-9)
    bar.set_postfix_str(f"loss {loss:.2f}, {speed / 1000:.1f}k tok/s", refresh=False)
    bar.update()
    if run.iteration % log_interval == 0 or run.iteration >= max_iters:
        run.record(train_loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed))
        if bar.disable:
            say(f"iteration {run.iteration:,}: training loss {loss:.4f}, {speed:,.0f} tok/s")


def say_goodbye(run):
    """Print how the run ended, and what to do next."""
    if run.iteration < max_iters or "val_loss" not in run.rows.get(run.iteration, {}):
        again = "--init_from=resume" if init_from == "scratch" else "the same command"
        kept = f"saved; {again} goes on" if run.iteration else "nothing to save yet"
        return say(f"stopped at {run.iteration:,} of {max_iters:,}, {kept}")
    best = find_model(out_dir)
    iteration = saved_run(best)["iteration"]
    say(f"best: validation loss {saved_loss(best):.4f}, at iteration {iteration:,}\n"
        f"sample it: python sample.py --model={out_dir}\n"
        f"in a browser: python sample.py --model={out_dir} --web=true")


def leave(machine):
    """Wait for the other processes, so that all end together."""
    total(0, machine)
    if machine.world > 1:
        dist.destroy_process_group()


def main():
    prepare.steady_output()
    flags = prepare.configure(globals(), sys.argv[1:], presets)
    check_settings()
    machine = set_up_machine()
    if machine.rank == 0 and not eval_only:
        prepare.lock(out_dir)
    source, saved = find_start()
    data = open_data(source, machine)
    resolve_settings(saved, data)

    model = make_model(source, data).to(machine.device)
    optimizers = make_optimizers(model)
    run = restore(source, optimizers, machine) if saved else Run()
    report(flags, model, data, run, machine, source)
    if machine.compile and compiles(machine.device):
        for layer in model.model.layers:
            layer.compile(dynamic=False)  # all of them use the first one's graph
        model.loss_of_slice = torch.compile(slice_loss, dynamic=False)
    if eval_only:
        evaluate(model, data, machine)
        return leave(machine)
    ask = functools.partial(ask_to_stop, run, machine)
    prepare.on_signal(ask, "SIGINT", "SIGTERM", "SIGHUP")
    if wandb_log and machine.rank == 0:
        start_wandb(run)

    skipped = 0  # updates skipped in a row
    bar = tqdm(total=max_iters, initial=run.iteration, dynamic_ncols=True, disable=machine.hide_bar,
               bar_format="{percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}")
    while True:
        # at intervals and at the end evaluate, save and sample; at a stop signal only save
        scores = evaluate(model, data, machine) if is_due(run) else None
        stopping = stop_requested(machine)
        if scores:
            run.record(**scores)
        if machine.rank == 0:
            if run.iteration in run.rows:
                write_log(run)
            if run.iteration > 0 and (scores or stopping):
                save_checkpoint(model, data, run, optimizers, machine)
            if scores:
                draw_curve(run, data)
                show_sample(model, data, run)
        if stopping or run.iteration >= max_iters:
            break

        # one update, by the mean loss over the tokens of all processes
        began = time.perf_counter()
        dropout_seed = seed + run.iteration * machine.world + machine.rank
        first = run.sequences + machine.rank * machine.share
        batch = data.training_batch(first, machine.share, block_size, seed)
        rate = learning_rate_at(run.iteration)
        loss, norm = update(model, optimizers, batch, rate, machine, dropout_seed)
        run.iteration += 1
        run.sequences += machine.sequences
        log_iteration(run, bar, began, loss, norm, rate, machine)
        skipped = 0 if math.isfinite(loss + norm) else skipped + 1
        if skipped:
            say(f"iteration {run.iteration:,}: update skipped, loss {loss}, gradient norm {norm}")
            require(skipped < 5, "no finite gradient in 5 iterations: lower --learning_rate")

    bar.close()
    if machine.rank == 0:
        say_goodbye(run)
    leave(machine)


if __name__ == "__main__":
    main()
