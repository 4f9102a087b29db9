"""
Train SmolLM2-135M, or a small sibling of it, from scratch. Every checkpoint is a Hugging Face model folder.

$ python train.py                                            # tiny on a CPU, 135m on a GPU; Ctrl-C it, run it again
$ python train.py --size=135m --batch_size=4 --max_iters=100 # any value of the config block can be given like this
$ torchrun --standalone --nproc_per_node=8 train.py          # eight GPUs: the same batches, the same losses
"""
import atexit, csv, ctypes, functools, importlib.util, json, math, os, shutil, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
if os.name == "posix": import fcntl
import numpy as np
import torch, torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import distributed as dist, nn
from tqdm import tqdm
from prepare import configure, explained, fail, fingerprint, prepare

# ----------------------------------------------------------------------------------------------------------- config
# a 0 or auto that RECIPE names, and a -1, mean: as in the checkpoint that is resumed, else as SIZES or the comment says
out_dir = "out"                  # checkpoints, log.csv and loss.png of one run
data_dir = "data"                # what prepare.py wrote; if there is none, input.txt is prepared
init_from = "auto"               # auto (resume if there is a checkpoint), scratch, resume, or a model folder or hub id
eval_interval = 250              # 1 to 1e9 iterations between evaluations, each with a checkpoint and a sample
log_interval = 10                # 1 to 1e9 iterations between rows of log.csv
eval_only = False                # evaluate once and end
wandb_log = False                # log to Weights & Biases too
batch_size = 0                   # sequences in a micro-batch, at most
gradient_accumulation_steps = 0  # times batch_size: sequences in an iteration, over all processes
block_size = 0                   # tokens in a sequence: the context length
size = "auto"                    # auto | tiny | 135m | 360m | 1.7b (auto: 135m on a GPU, tiny on a CPU)
n_layer = 0                      # layers
n_head = 0                       # query heads
n_kv_head = 0                    # key and value heads; divides n_head
n_embd = 0                       # channels
intermediate_size = 0            # channels inside the MLP
vocab_size = 0                   # rows of the embedding; of tiny, as many as the tokenizer has ids
rope_theta = 0.0                 # base of the rotary embedding
norm_eps = 0.0                   # added inside RMSNorm
dropout = 0.0                    # 0 to 0.9999, probability, on the embedding and on both branches of a layer
optimizer = "auto"               # auto | adamw | muon (Muon for the layers' matrices, AdamW for the rest)
learning_rate = 0.0              # peak, of AdamW; Muon takes 0.6 of it
max_iters = 0                    # iterations: optimizer updates
weight_decay = -1.0              # -1 to 1e3, of matrices; -1: 1 for tiny, else 0.1
beta1 = 0.9                      # 0 to 0.9999, of AdamW
beta2 = 0.0                      # 0 to 0.9999, of AdamW
grad_clip = 1.0                  # largest norm of the gradient; 0: no limit
schedule = "cosine"              # cosine | wsd (constant, then linear over the last fifth)
warmup_iters = -1                # -1 to 1e9, linear warm-up; -1: a twentieth of max_iters, but not over 2000
lr_decay_iters = -1              # -1 to 1e9, iteration from which on the rate is min_lr; -1: max_iters at the start
min_lr = -1.0                    # -1 to 1e9; -1: a tenth of learning_rate
gradient_checkpointing = False   # recompute layers in the backward pass: less memory, more time
seed = 1337                      # of weights, data order and dropout
device = "auto"                  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                   # auto | float32 | bfloat16 | float16, of matrix products
compile = "auto"                 # auto | true | false (auto: on GPUs, and from 512 channels on)
# ------------------------------------------------------------------------------------------------------ model sizes
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (bool, int, float, str))]
HF_NAMES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                n_embd="hidden_size", intermediate_size="intermediate_size", vocab_size="vocab_size",
                rope_theta="rope_theta", norm_eps="rms_norm_eps")  # the shape, and what config.json calls it
RECIPE = (*HF_NAMES, "block_size", "batch_size", "gradient_accumulation_steps", "max_iters", "optimizer",
          "learning_rate", "beta2")
SIZES = {name: dict(zip(RECIPE, row)) for name, row in {  # shapes of SmolLM2 (arXiv:2502.02737), and a tiny one
    "tiny": (4, 2, 1, 128, 384, 0, 1e5, 1e-5, 128, 16, 1, 500, "muon", 1.3e-2, 0.99),
    "135m": (30, 9, 3, 576, 1536, 49152, 1e5, 1e-5, 2048, 16, 16, 10_000, "adamw", 3e-3, 0.95),
    "360m": (32, 15, 5, 960, 2560, 49152, 1e5, 1e-5, 2048, 8, 32, 10_000, "adamw", 3e-3, 0.95),
    "1.7b": (24, 32, 32, 2048, 8192, 49152, 1.3e5, 1e-5, 2048, 4, 64, 10_000, "adamw", 5e-4, 0.95)}.items()}
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}  # a second: dense, 16 bits, by data sheet

def fill(automatic, before, **defaults):
    """Give each setting in `defaults` that is still `automatic` its value in `before`, else the default."""
    globals().update({key: before.get(key, value) for key, value in defaults.items() if globals()[key] in automatic})

# ------------------------------------------------------------------------------------------------------------ model
def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer, arXiv:2104.09864) of x (B, heads, T, head_dim), paired in halves."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, n, bias=False) for n in (q_size, kv_size, kv_size))
        self.o_proj = nn.Linear(q_size, C, bias=False)

    def forward(self, x, rope, cache, position):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # two tensors (B, n_kv_head, places, head_dim), the first `position` places filled
            for kept, new in zip(cache, (k, v)): kept[:, :, position:position + T] = new
            k, v = (kept[:, :, :position + T] for kept in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(C, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None, position=0):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache, position))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))

def slice_loss(x, weight, targets):
    """Summed cross-entropy, in nats, of logits x @ weight.T (N, V) against targets (N,), where these are not -1."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="sum")

def sliced_loss(x, weight, targets):
    """slice_loss by slices of 128 MiB of logits, the gradient of each taken at once (Liger Kernel, arXiv:2410.10989)"""
    step, total, training = max(1, 2 ** 25 // len(weight)), 0.0, torch.is_grad_enabled()
    a, b = (tensor.detach().requires_grad_(training) for tensor in (x, weight))
    for part, some_targets in zip(a.split(step), targets.split(step)):
        loss = slice_loss(part, b, some_targets)
        if training: loss.backward()
        total = total + loss.detach()
    if not training: return total
    product = torch.dot(x.flatten(), a.grad.flatten()) + torch.dot(weight.flatten(), b.grad.flatten())
    return total + (product - product.detach())  # which is total, and has those gradients

class Llama(nn.Module):
    """Hugging Face's LlamaForCausalLM, tensor for tensor; `config` holds what its config.json does."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings: self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.arange(config.max_position_embeddings)[:, None] * torch.cat((-frequency, frequency))  # -sin, sin
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)
        for name, p in self.named_parameters():  # what the layers add up keeps its size in the sum (GPT-2)
            summands = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            if p.dim() == 2: nn.init.normal_(p, std=config.initializer_range / math.sqrt(summands))  # norms are ones

    def forward(self, tokens, targets=None, cache=None, position=0):
        """Logits (B, T, V) of tokens (B, T), or with targets their summed loss; with a cache, only the last logits."""
        x = F.dropout(self.model.embed_tokens(tokens), dropout, self.training)
        rope = self.rope[:, position:position + tokens.shape[1]].to(x.dtype)  # (2, T, head_dim)
        for i, layer in enumerate(self.model.layers):
            if gradient_checkpointing and self.training:
                layer = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
            x = layer(x, rope, cache and cache[i], position)
        x = self.model.norm(x if cache is None else x[:, -1:])
        weight = getattr(self, "lm_head", self.model.embed_tokens).weight
        return F.linear(x, weight) if targets is None else sliced_loss(x.flatten(0, 1), weight, targets.flatten())

# ------------------------------------------------------------------------------------------------------------- data
@functools.lru_cache(1)
def epoch_order(epoch, windows):
    """Offset of an epoch's first window, and the order of its windows; ten million take half a second and 80 MB."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(block_size), rng.permutation(windows)

def training_batch(iteration, meta, rank, world, device):
    """This process's inputs and targets. An epoch has each window of block_size tokens once, in an order of its own."""
    share, windows = batch_size * gradient_accumulation_steps // world, meta["train_tokens"] // block_size - 1
    first = (iteration * world + rank) * share
    places = [(*epoch_order(i // windows, windows), i % windows) for i in range(first, first + share)]
    return get_windows("train", [offset + order[i] * block_size for offset, order, i in places], device)

def get_windows(split, starts, device):
    """The tokens from each of `starts` on, and those after them, both (len(starts), block_size); -1 past the end."""
    data = np.memmap(Path(data_dir, f"{split}.bin"), "<u2", "r")  # mapped anew, or all that was read stays in memory
    at = np.add.outer(starts, np.arange(block_size + 1))
    batch = torch.from_numpy(np.where(at < len(data), data.take(at, mode="clip").astype(int), -1))
    if batch.max() >= vocab_size: fail(f"{data_dir}/{split}.bin has the id {batch.max()}: run prepare.py again")
    batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
    return batch[:, :-1].clamp(min=0), batch[:, 1:]

# ------------------------------------------------------------------------------------------- optimizer and schedule
def make_optimizers(model):
    """[AdamW for everything], or [AdamW for embedding and norms, Muon (Jordan, 2024) for the layers' matrices]."""
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    tables = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." not in name]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": tables + hidden * (optimizer == "adamw")}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 1.0, (beta1, beta2), weight_decay=weight_decay, fused=True)
    muon = torch.optim.Muon(hidden, 0.6, weight_decay, adjust_lr_fn="match_rms_adamw")  # as arXiv:2502.16982
    return [adamw] if optimizer == "adamw" else [adamw, muon]

class Float32(torch.overrides.TorchFunctionMode):
    """Keeps .bfloat16() from rounding: unrounded, torch's Muon is as exact as the rest, and faster on most CPUs."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))

def scheduled_rate(iteration):
    """The learning rate of the update that follows `iteration` others."""
    if iteration < warmup_iters: return learning_rate * (iteration + 1) / (warmup_iters + 1)
    cosine = 0.5 - 0.5 * math.cos(math.pi * max(0, lr_decay_iters - iteration) / max(1, lr_decay_iters - warmup_iters))
    wsd = min(1, 5 * max(0, 1 - iteration / max(1, lr_decay_iters)))  # warm-up, stable, decay (arXiv:2404.06395)
    return min_lr + (learning_rate - min_lr) * (wsd if schedule == "wsd" else cosine)

# ------------------------------------------------------------------------------------------------------- checkpoint
def save_checkpoint(model, val_loss, **trainer):
    """Write out_dir/step-<iteration>, which appears whole or not at all; then keep only the newest and the best."""
    path, tmp, eos = Path(out_dir, f"step-{trainer['iteration']:07d}"), Path(out_dir, "tmp"), model.config.eos_token_id
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights of {path} are not finite, and so not saved: resume with a lower --learning_rate")
    shutil.rmtree(tmp, ignore_errors=True)  # of a run that was killed
    tmp.mkdir()
    save_file(model.state_dict(), tmp / "model.safetensors", {"format": "pt"})
    torch.save(trainer | {"settings": {key: globals()[key] for key in config_keys}}, tmp / "trainer.pt")
    word = Tokenizer.from_file(shutil.copy(f"{data_dir}/tokenizer.json", tmp)).id_to_token(eos)
    files = {"config": vars(model.config) | {"val_loss": val_loss}, "generation_config": {"eos_token_id": eos},
             "tokenizer_config": dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=word, eos_token=word)}
    for name, content in files.items(): Path(tmp, f"{name}.json").write_text(json.dumps(content, indent=2))
    flush(*tmp.iterdir(), tmp)
    tmp.rename(path)
    flush(out_dir)
    for _, _, old in sample.checkpoints(out_dir)[:-1]:  # renamed first, so that no step- folder is ever half there
        if old != sample.find_model(out_dir): shutil.rmtree(old.rename(tmp))

def flush(*paths):
    """Bring files, or folders' lists of files, to the disk itself."""
    for fd in (os.open(path, os.O_RDONLY) for path in paths if os.name == "posix"):
        os.fsync(fd)
        os.close(fd)

# ----------------------------------------------------------------------------------- memory, evaluation and records
def fit_micro_batch(model, inputs, targets, autocast, say):
    """The most sequences, up to batch_size, that memory suffices for; on the way, the model is compiled or not."""
    micro = min(batch_size, len(inputs))
    while micro:
        try:
            reserve = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # for AdamW and DDP, later
            with autocast: model(inputs[:micro], targets[:micro]).backward()
            return micro
        except torch._dynamo.exc.TorchDynamoException as error:
            say(f"warning: not compiled, so slower: {str(error).splitlines()[0]}")
            torch.compiler.set_stance("force_eager")
        except RuntimeError as error:
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")): raise  # GPU, CPU
            reserve, micro = None, micro // 2
            say(f"out of memory: micro-batches of {micro} sequences, the same tokens per iteration")
    fail(f"no memory for one sequence: lower --block_size={block_size}, or try --gradient_checkpointing=true")

def evaluate(model, meta, micro, rank, world, device):
    """Loss over the whole validation split, in fixed windows that the processes share, as columns of log.csv."""
    total, count = torch.zeros((), dtype=torch.float64), meta["val_tokens"] - 1
    for first in range(rank, math.ceil(count / block_size), micro * world):
        total += model(*get_windows("val", (first + np.arange(micro) * world) * block_size, device)).cpu()
    if world > 1: dist.all_reduce(total)
    loss, bits = total.item() / count, total.item() / math.log(2)
    return {"val_loss": loss, "val_bpb": bits / meta["val_bytes"], "val_perplexity": math.exp(min(loss, 700))}

def open_log(rows):
    """Functions that add a row to `rows`, log.csv and Weights & Biases. Locks out_dir, and writes log.csv anew."""
    with explained(f"cannot use --out_dir={out_dir}: choose another, or wait for the run that uses it"):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(out_dir, "log.csv"), "a", newline="", buffering=1)
        if os.name == "posix": fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        log = csv.DictWriter(file, ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second",
                                    "val_perplexity", "mfu"), lineterminator="\n")
        log.writeheader()
        log.writerows(rows)
    atexit.register(shutil.rmtree, Path(out_dir, "tmp"), ignore_errors=True)  # of a save that failed
    if not wandb_log: return [rows.append, log.writerow]
    with explained("--wandb_log=true does not work: pip install wandb, and wandb login"):
        import wandb
        wandb.init(project="smollm2", name=out_dir, config={key: globals()[key] for key in config_keys})
    return [rows.append, log.writerow, lambda row: wandb.log(row, step=row["iter"])]

def draw_curve(rows):
    """Draw the rows of log.csv as out_dir/loss.png."""
    from matplotlib.figure import Figure
    figure = Figure((8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for axes, key, style in (losses, "train_loss", "-"), (losses, "val_loss", "o-"), (rates, "lr", "-"):
        axes.plot(*zip(*((row["iter"], row[key]) for row in rows if key in row)), style, label=key, markersize=3)
    loss, at = min((row["val_loss"], row["iter"]) for row in rows if "val_loss" in row)
    losses.plot(at, loss, "r*", markersize=12, label=f"best val_loss: {loss:.4f} at {at:,}")
    losses.legend()
    losses.set(ylabel="nats per token", yscale="log")
    rates.set(ylabel="learning rate", xlabel="iteration")
    figure.savefig(Path(out_dir, "loss.png"), dpi=120)

# ------------------------------------------------------------------------------------------------------------- main
def main():
    configure(globals(), sys.argv[1:])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = sample.choose_device(globals()["device"])
    cuda, say = device.type == "cuda", tqdm.write if rank == 0 else lambda line: None
    if world > 1: dist.init_process_group()  # nccl between GPUs, gloo between CPUs
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    if sys.platform == "linux" and not cuda:  # free() keeps all memory: getting it anew took a tenth of an iteration
        for name, value in (-1, -1), (-4, 0): ctypes.CDLL(None).mallopt(name, value)  # M_TRIM_THRESHOLD, M_MMAP_MAX
    # where to start: the newest checkpoint of this run, another model, or scratch
    saved, trainer = sample.checkpoints(out_dir), {"iteration": 0, "rows": [], "settings": {}, "optimizers": []}
    if saved and init_from == "scratch" or not saved and init_from == "resume":
        fail(f"--init_from={init_from}, but {out_dir} holds {'a' if saved else 'no'} run: choose another --out_dir")
    source = saved[-1][2] if saved else None if init_from in ("auto", "scratch") else sample.find_model(init_from)
    with explained(f"{source}/trainer.pt is damaged: move {source} away to resume from an older checkpoint"):
        if saved: trainer = torch.load(source / "trainer.pt", "cpu", weights_only=True)  # which runs no code
    raw, iteration, rows = sample.load_model(source) if source else None, trainer["iteration"], trainer["rows"]
    before = trainer["settings"] | {key: getattr(raw.config, name) for key, name in HF_NAMES.items() if raw}
    fill(("auto",), before, size="135m" if cuda else "tiny")
    fill((0, "auto"), before, **SIZES[size])
    fill((-1,), before, lr_decay_iters=max_iters, min_lr=learning_rate / 10, warmup_iters=min(max_iters // 20, 2000),
         weight_decay=1.0 if size == "tiny" else 0.1)
    changed = {key: f"--{key}={globals()[key]} (was {old})" for key, old in before.items() if globals()[key] != old}
    for key in changed.keys() & {*HF_NAMES, "optimizer"}: fail(f"{source} cannot take {changed[key]}: leave it out")
    # the data, made of input.txt if there is none, and whether everything fits together
    if rank == 0 and not Path(data_dir, "train.bin").exists():
        prepare(data_dir=data_dir, **({"tokenizer": str(source)} if source else {}))
    if world > 1: dist.barrier()
    with explained(f"cannot train on {data_dir}: run python prepare.py --data_dir={data_dir} on your text again"):
        meta = json.loads(Path(data_dir, "meta.json").read_text())
        found = {f"{split}_tokens": os.path.getsize(f"{data_dir}/{split}.bin") // 2 for split in ("train", "val")}
        found["tokenizer_sha256"] = fingerprint(f"{data_dir}/tokenizer.json")
        if meta | found != meta: fail(f"the files in {data_dir} are not those of its meta.json: run prepare.py again")
        if source and fingerprint(f"{source}/tokenizer.json") != found["tokenizer_sha256"]:
            fail(f"{source} has another tokenizer than {data_dir}: prepare with --tokenizer={source}")
    fill((0,), {}, vocab_size=meta["vocab_size"])
    if meta["train_tokens"] < 2 * block_size: fail(f"{data_dir} has too few tokens for --block_size={block_size}")
    if n_embd % (2 * n_head): fail(f"--n_embd={n_embd} / --n_head={n_head} is not even, as the rotary embedding needs")
    if n_head % n_kv_head: fail(f"--n_head={n_head} is no multiple of --n_kv_head={n_kv_head}")
    if batch_size * gradient_accumulation_steps % world: fail(f"{world} processes cannot share --batch_size equally")
    if not 0 <= min_lr <= learning_rate: fail(f"--min_lr={min_lr} is not from 0 to --learning_rate={learning_rate}")
    if warmup_iters > min(max_iters, lr_decay_iters): fail(f"--warmup_iters={warmup_iters} is more than all iterations")
    torch.manual_seed(seed)
    raw = raw or Llama(SimpleNamespace(**sample.ONLY, **{name: globals()[key] for key, name in HF_NAMES.items()},
        architectures=["LlamaForCausalLM"], head_dim=n_embd // n_head, max_position_embeddings=block_size,
        tie_word_embeddings=True, initializer_range=n_embd ** -0.5, eos_token_id=meta["eos_token_id"]))
    if block_size > (limit := raw.config.max_position_embeddings): fail(f"--block_size={block_size} is over {limit:,}")
    logs, signals = open_log(rows) if rank == 0 and not eval_only else [], []
    def ask_to_stop(number, frame):  # a second signal ends at once; but torchrun repeats the Ctrl-C that it shares
        if signals and (world == 1 or time.time() > signals[0] + 2): os._exit(128 + number)
        signals.append(time.time())
    for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, ask_to_stop)
    # how to compute: precision, optimizers, compiler, micro-batches, processes
    wide = cuda or n_embd >= 512  # CPUs gain from bfloat16 and compiling once the model is wide
    bf16 = torch.cuda.get_device_capability(device)[0] >= 8 if cuda else wide and torch.cpu._is_avx512_bf16_supported()
    precision = getattr(torch, dtype if dtype != "auto" else "bfloat16" if bf16 else "float16" if cuda else "float32")
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, 4096.0, enabled=precision == torch.float16)
    optimizers = make_optimizers(raw.to(device))
    for one, state in zip(optimizers, trainer["optimizers"]): one.load_state_dict(one.state_dict() | {"state": state})
    if trainer.get("scaler"): scaler.load_state_dict(trainer["scaler"])
    compiled = compile == "true" or compile == "auto" and wide
    for layer in raw.model.layers if compiled else (): layer.compile(dynamic=False)  # all share the code of the first
    if compiled: globals()["slice_loss"] = torch.compile(slice_loss, dynamic=False)
    inputs, targets = training_batch(iteration, meta, rank, world, device)
    micro = fit_micro_batch(raw, inputs, targets, autocast, say)
    model = nn.parallel.DistributedDataParallel(raw) if world > 1 else raw
    # what is going to happen
    kinds = "embed", "attn", "mlp", "norm", "lm_head"
    parts = {kind: sum(p.numel() for name, p in raw.named_parameters() if kind in name) for kind in kinds}
    tokens, n_params, starts = targets.numel() * world, sum(parts.values()), range(0, len(inputs), micro)
    flops = 6 * n_params + 12 * n_layer * n_embd * block_size  # a token, forward and backward (PaLM, arXiv:2204.02311)
    chip = torch.cuda.get_device_name(device) if cuda else device.type
    peak = next((peak * world for name, peak in PEAK_FLOPS.items() if name in chip), None)
    say(f"device     {world} x {chip}, {str(precision)[6:]}, {'' if compiled else 'not '}compiled")
    say(f"model      {size}, {n_params:,} parameters: {', '.join(f'{part} {n:,}' for part, n in parts.items())}")
    say(f"data       {meta['train_tokens']:,} tokens, {meta['val_tokens']:,} for validation; "
        f"{max_iters * tokens / meta['train_tokens']:.1f} epochs in {max_iters:,} iterations")
    say(f"iteration  {tokens:,} tokens of {flops:.3g} FLOPs: {world} x {len(starts)} micro-batches x {micro} sequences")
    say(", ".join((f"start      {source or 'scratch'}, iteration {iteration:,} of {max_iters:,}", *changed.values())))
    if not (drawing := importlib.util.find_spec("matplotlib")): say("no loss.png: pip install matplotlib")
    tokenizer = Tokenizer.from_file(f"{data_dir}/tokenizer.json")
    options = {key: getattr(sample, key) for key in sample.OPTIONS} | {"max_new_tokens": 100, "seed": seed}
    bar = tqdm(total=max_iters, initial=iteration, disable=None if rank == 0 else True, dynamic_ncols=True)
    row, due, skipped, stopping = {"iter": iteration}, eval_only or not saved, 0, False  # is an evaluation due?
    while True:  # evaluate, log, save, stop, update
        if due:
            with autocast, torch.no_grad(): row |= evaluate(raw.eval(), meta, micro, rank, world, device)
        if len(row) > 1:
            facts = ", ".join(f"{key} {value:{',' if isinstance(value, int) else '.5g'}}" for key, value in row.items())
            say(facts) if bar.disable or due else bar.set_postfix_str(facts)
        with explained(f"cannot write to {out_dir}: make room and run again; the checkpoints there are whole"):
            for log in logs if len(row) > 1 else (): log(row)
            if logs and (due or stopping):
                save_checkpoint(raw, row.get("val_loss"), iteration=iteration, rows=rows, scaler=scaler.state_dict(),
                                optimizers=[one.state_dict()["state"] for one in optimizers])
                if drawing: draw_curve(rows)
        if logs and due:
            with torch.compiler.set_stance("force_eager"):
                say("".join(new for new, in sample.stream(raw.eval(), tokenizer, [meta["eos_token_id"]], 1, **options)))
        if eval_only or stopping or iteration >= max_iters: break
        began, rate, loss = time.time(), scheduled_rate(iteration), torch.zeros((), device=device)
        torch.manual_seed(seed + iteration * world + rank)  # so that dropout, too, depends on the iteration alone
        raw.train().zero_grad()
        for start in starts:
            model.require_backward_grad_sync = start == starts[-1]  # of DDP: once an iteration
            with autocast: part = model(inputs[start:start + micro], targets[start:start + micro]) / targets.numel()
            scaler.scale(part).backward()
            loss += part.detach()
        for one in optimizers: scaler.unscale_(one)
        norm = nn.utils.clip_grad_norm_(raw.parameters(), grad_clip or math.inf)
        stats = torch.stack((loss, norm, loss.new_tensor(len(signals))))
        text, (inputs, targets) = inputs[0, :20], training_batch(iteration + 1, meta, rank, world, device)
        if world > 1: dist.all_reduce(stats)
        loss, norm, stopping = (stats / world).tolist()  # here the device is waited for
        skipped = 0 if math.isfinite(loss + norm) else skipped + 1
        if skipped: say(f"iteration {iteration:,}: loss {loss}, gradient norm {norm}: update skipped")
        if skipped == 5: fail(f"no finite gradient in 5 iterations up to {iteration:,}, learning rate {rate:.3g}, on "
                              f"text like {tokenizer.decode(text.tolist())!r}: run again with a lower --learning_rate")
        for one in optimizers if not skipped else ():
            for group in one.param_groups: group["lr"] = rate * one.defaults["lr"]  # of AdamW 1, of Muon 0.6
            with Float32(): scaler.step(one)
        scaler.update()
        iteration, row = iteration + 1, {"iter": iteration + 1}
        bar.update()
        due = iteration % eval_interval == 0 or iteration >= max_iters
        if due or iteration % log_interval == 0:
            row |= dict(train_loss=loss, lr=rate, grad_norm=norm, tokens_per_second=int(tokens / (time.time() - began)))
            if peak: row["mfu"] = row["tokens_per_second"] * flops / peak
    if logs:
        loss, bits, best = min((row["val_loss"], row["val_bpb"], row["iter"]) for row in rows if "val_loss" in row)
        say(f"best validation loss {loss:.4f}, {bits:.4f} bits per byte, in {out_dir}/step-{best:07d}\n"
            f"sample it: python sample.py --model={out_dir}\non a page: python sample.py --model={out_dir} --web=true")
    if world > 1: dist.destroy_process_group()

if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # what sample.py imports is this file, with its settings
    import sample
    main()
