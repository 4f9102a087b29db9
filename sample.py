"""
Sample from a checkpoint of train.py, or from any Hugging Face Llama that this model is equal to.

$ python sample.py                                           # the best checkpoint in out, from an end of text on
$ python sample.py --prompt="ROMEO:" --num_samples=3         # or --prompt=FILE:play.txt
$ python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt="Gravity is" --temperature=0
$ python sample.py --web=True                                # a page to play with, at http://127.0.0.1:7860
"""
import itertools, json, math, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders

import train
from prepare import configure, explained, fail

# ----------------------------------------------------------------------------------------------------------- config
model = "out"             # an out folder (its best checkpoint), a checkpoint, a Hugging Face Llama folder or hub id
prompt = ""               # text, or FILE:path; empty: start from an end of text
num_samples = 1           # 1 to 10000, made together, as one batch
max_new_tokens = 300      # 1 to 1e9, of each sample
temperature = 0.8         # 0 to 100; 0: always the likeliest token
top_k = 0                 # choose among the k likeliest tokens; 0: among all
top_p = 1.0               # 1e-9 to 1, among the likeliest tokens that together have this probability
min_p = 0.0               # 0 to 1, among the tokens at least this share as likely as the likeliest
repetition_penalty = 1.0  # 0.01 to 100, divides the score of tokens that have been used; 1: off
seed = 1337               # the same seed, the same text
device = "auto"           # auto, cpu, cuda, mps
dtype = "auto"            # auto | float32 | bfloat16 | float16 (auto: bfloat16 where the hardware has it)
web = False               # serve a page instead (needs gradio)
port = 7860               # 1 to 65535, of the page, on 127.0.0.1
# ------------------------------------------------------------------------------------------------------------- load
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # Llamas known here
OPTIONS = "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"  # of generate

def checkpoints(folder):
    """[(iteration, validation loss or inf, path)] of the checkpoints in an out folder, the newest last."""
    found = []
    for path in Path(folder).glob("step-*"):
        with explained(f"{path} is damaged: move it away, and the others will be used"):
            loss = json.loads((path / "config.json").read_text())["val_loss"]  # null: saved without an evaluation
            found.append((int(path.name[5:]), math.inf if loss is None else loss, path))
    return sorted(found)

def find_model(name):
    """The model folder that a name means: an out folder's best checkpoint, a folder, or a hub id's cached download."""
    saved = checkpoints(name)
    if saved or Path(name).is_dir():
        return min(saved, key=lambda entry: entry[1])[2] if saved else Path(name)
    with explained(f"no model in {name}: no folder here has that name, and the hub has none to give"):
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "config.json", "tokenizer.json"]))

def load_model(folder):
    """The Llama of a Hugging Face folder, float32, on the CPU. What it has and train.Llama lacks is refused by name."""
    file, weights = Path(folder, "config.json"), {}
    with explained(f"{file} is damaged or missing"):
        config = {key: value for key, value in json.loads(file.read_text("utf-8")).items() if value is not None}
        config |= config.get("rope_parameters", {})  # where transformers 5 puts rope_theta
        for key, ours in (ONLY | {"rope_scaling": None, "rope_type": "default"}).items():
            if config.get(key, ours) != ours: fail(f"{file} has {key} = {config[key]}, but the model knows {ours}")
        heads = config["num_attention_heads"]
        defaults = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, "rope_theta": 10000.0,
                    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "eos_token_id": None}
        llama = train.Llama(SimpleNamespace(**defaults | config))
        llama(torch.tensor([end_ids(llama) or [0]]))  # numbers that do not fit together end here
    for file in sorted(Path(folder).glob("*.safetensors")) or [Path(folder, "model.safetensors")]:
        with explained(f"{file} is damaged or missing"): weights |= load_file(file)
    if llama.config.tie_word_embeddings: weights.pop("lm_head.weight", None)
    with explained(f"{folder}/*.safetensors do not fit config.json"): llama.load_state_dict(weights)
    return llama

def choose_device(name):
    """The torch.device that --device names, once it has been seen to work."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explained(f"--device={name} cannot be used here, --device={best} can"):
        return torch.zeros(1, device=best if name == "auto" else name).device

# --------------------------------------------------------------------------------------------------------- generate
@torch.inference_mode()
def generate(llama, tokens, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed):
    """Yield the (B, 1) tokens that follow tokens (B, T), one position after the other, until all sequences have ended.
    Random numbers are its own. When all positions of the model are used, its last half is kept as the context."""
    config, device, new, position, ended = llama.config, tokens.device, tokens, 0, False
    limit, generator = config.max_position_embeddings, torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(end_ids(llama), device=device)
    shape = (len(tokens), config.num_key_value_heads, min(limit, tokens.shape[1] + max_new_tokens), config.head_dim)
    cache = [[torch.zeros(shape, dtype=llama.model.norm.weight.dtype, device=device) for _ in "kv"]
             for _ in range(config.num_hidden_layers)]
    for _ in range(max_new_tokens):
        if position + new.shape[1] > limit: new, position = tokens[:, -limit // 2:], 0
        with torch.backends.mkldnn.flags(enabled=new.numel() > 1, allow_tf32=None):  # one row is faster without
            logits = llama(new, cache=cache, position=position)[:, -1].float()
        position += new.shape[1]
        new = choose(logits, tokens, temperature, top_k, top_p, min_p, repetition_penalty, generator)
        tokens = torch.cat((tokens, new), dim=1)
        yield new
        if (ended := ended | torch.isin(new, ends)).all(): return

def end_ids(llama):
    """The list of token ids that end a text."""
    ids = llama.config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]

def choose(logits, tokens, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """Draw tokens (B, 1) after `tokens` by logits (B, V): penalty (arXiv:1909.05858), then transformers' filters."""
    if repetition_penalty != 1:
        used = logits.gather(1, tokens)
        logits = logits.scatter(1, tokens, torch.where(used < 0, used * repetition_penalty, used / repetition_penalty))
    if temperature == 0: return logits.argmax(1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]: logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(1).sort(descending=True)
        unlikely = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, ordered.cumsum(1) - ordered >= top_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    probs = logits.softmax(1)
    return torch.multinomial(probs.where(probs >= min_p * probs.amax(1, keepdim=True), 0), 1, generator=generator)

def stream(llama, tokenizer, ids, count, **options):
    """Yield what is new in the texts of `count` samples after the token ids, position by position: a list of strings
    of whole characters. A sample that has come to its end of text adds no more."""
    texts = [decoders.DecodeStream(ids, skip_special_tokens=True) for _ in range(count)]
    for new in generate(llama, torch.tensor([ids] * count, device=llama.rope.device), **options):
        new = new[:, 0].tolist()
        texts = [text if token not in end_ids(llama) else None for text, token in zip(texts, new)]
        yield [(text and text.step(tokenizer, token)) or "" for text, token in zip(texts, new)]

def encode(tokenizer, text, llama, max_new_tokens):
    """Token ids of a prompt, as transformers has them; of an empty one, an end of text."""
    ids, limit = tokenizer.encode(text).ids or end_ids(llama)[:1], llama.config.max_position_embeddings
    if not ids or max(ids) >= llama.config.vocab_size:
        fail("the tokenizer has ids that the model has not" if ids else "the model has no end of text: give a prompt")
    if len(ids) > limit: fail(f"the prompt has {len(ids)} tokens, the model's context only {limit}: shorten it")
    if len(ids) + max_new_tokens > limit:
        print(f"note: past {limit} tokens, each sample goes on from its last {(limit + 1) // 2}", file=sys.stderr)
    return ids

# ------------------------------------------------------------------------------------------------------------- page
def serve(llama, tokenizer, folder, facts):
    """Serve a page, to this machine alone, until Ctrl-C. Each request has its own generator; they wait in a queue."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: the page needs no network
    with explained("--web=True needs gradio: pip install gradio"): import gradio
    bounds = {"max_new_tokens": (1, 2000, 1), "temperature": (0, 2, .05), "top_p": (.05, 1, .05), "top_k": (0, 200, 1)}

    def answer(text, *values):
        config = dict(globals())
        try:
            configure(config, [f"--{key}={value}" for key, value in zip((*bounds, "seed"), values)])
            ids = encode(tokenizer, text, llama, config["max_new_tokens"])
        except SystemExit as error:
            raise gradio.Error(str(error))
        options = {key: config[key] for key in OPTIONS}
        yield from itertools.accumulate((new for new, in stream(llama, tokenizer, ids, 1, **options)), initial=text)

    sliders = [gradio.Slider(*ends, globals()[key], step=step, label=key) for key, (*ends, step) in bounds.items()]
    asked = [gradio.Textbox(prompt, label="prompt", lines=3), *sliders, gradio.Number(seed, label="seed", precision=0)]
    with gradio.Blocks(title="sample.py") as page, gradio.Row():
        with gradio.Column(scale=2):
            gradio.Interface(answer, asked, gradio.Textbox(label="text", lines=24, max_lines=999), description=facts,
                             submit_btn="Generate", clear_btn=None, flagging_mode="never")
        if (curve := Path(folder).resolve().parent / "loss.png").is_file():
            gradio.Image(str(curve), show_label=False, buttons=[])
    print(f"http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it", file=sys.stderr)
    with explained(f"cannot serve at --port={port}"):
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, ssr_mode=False, footer_links=[])

# ------------------------------------------------------------------------------------------------------------- main
def main():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C: no stack trace
    configure(globals(), sys.argv[1:])
    target, folder = choose_device(device), find_model(model)
    native = target.type == "cuda" or target.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    precision = getattr(torch, dtype if dtype != "auto" else "bfloat16" if native else "float32")
    llama = load_model(folder).eval().to(target, precision)
    with explained(f"{folder}/tokenizer.json is damaged or missing"):
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    facts = f"{folder}: {sum(p.numel() for p in llama.parameters()):,} parameters, {target}, {str(precision)[6:]}"
    if web: return serve(llama, tokenizer, folder, facts)
    with explained(f"cannot use --prompt={prompt}"):
        text = Path(prompt[5:]).read_text("utf-8-sig") if prompt.startswith("FILE:") else prompt
        ids = encode(tokenizer, text, llama, max_new_tokens)
    print(f"{facts}; seed {seed}, {len(ids)} tokens of prompt", file=sys.stderr)
    texts, steps, clock = [text] * num_samples, 0, 0
    print(text, end="", flush=True)
    try:
        for pieces in stream(llama, tokenizer, ids, num_samples, **{key: globals()[key] for key in OPTIONS}):
            print(pieces[0], end="", flush=True)  # the first sample as it is made, the others when they are whole
            texts = [text + piece for text, piece in zip(texts, pieces)]
            clock, steps = clock or time.perf_counter(), steps + 1
    finally:  # a Ctrl-C comes here, too
        print("", *texts[1:], sep=f"\n{'-' * 20}\n")
    speed = (steps - 1) * num_samples / (time.perf_counter() - clock)  # without the prompt and the first token
    print(f"{steps} tokens x {num_samples}, {speed:.1f} tokens/s", file=sys.stderr)

if __name__ == "__main__":
    main()
