"""
Sample from a checkpoint of train.py, or from a Llama of the Hugging Face hub.

$ python sample.py                                           # from the best checkpoint in out
$ python sample.py --prompt="Old Cenzo:" --num_samples=3     # or --prompt=FILE:play.txt
$ python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt="Gravity is" --temperature=0
$ python sample.py --web=true                                # a page, at http://127.0.0.1:7860
"""
import functools
import random
import sys
import time
from pathlib import Path

import prepare
from prepare import explained, require

if __name__ == "__main__":  # no stack trace on Ctrl-C, from here on
    prepare.on_signal(lambda *_: sys.exit(130), "SIGINT")

import numpy as np
import torch
from tokenizers import decoders

from train import best_dtype, choose_device, compiles, find_model, load_model

# -------------------------------------------------------------------------------------- settings
model = "out"             # an out folder (its best checkpoint), a model folder or a hub id
prompt = ""               # text, or FILE:path; empty: begin as a document begins
num_samples = 1           # generated together, as one batch
max_new_tokens = 300      # of each sample; when the context is full, its last half is kept
temperature = 0.8         # 0: always the likeliest token
top_k = 0                 # keep only this many of the likeliest tokens; 0: all
top_p = 1.0               # keep the likeliest tokens that together have this probability
min_p = 0.0               # keep tokens with at least this fraction of the top probability
repetition_penalty = 1.0  # above 1: tokens that occurred already become less likely
seed = 1337               # the same seed, the same text; the page has its own
device = "auto"           # auto, cpu, cuda, cuda:1 or mps
dtype = "auto"            # auto, float32, bfloat16 or float16
compile = False           # compile the decoding step: 10 to 60 s once, then faster
web = False               # serve a web page instead (pip install gradio)
port = 7860               # of the page, on 127.0.0.1


def check_settings():
    """Refuse invalid settings."""
    ranges = {"num_samples": (1, torch.inf), "max_new_tokens": (1, torch.inf), "top_p": (1e-6, 1),
              "min_p": (0, 1), "repetition_penalty": (1e-6, torch.inf), "seed": (0, 2 ** 63 - 1),
              "port": (1, 65535)}
    for name, (least, most) in ranges.items():
        value = globals()[name]
        require(least <= value <= most, f"--{name}={value} must be from {least} to {most}")
    require(dtype in ("auto", "float32", "bfloat16", "float16"),
            f"--dtype={dtype} must be auto, float32, bfloat16 or float16")


# ----------------------------------------------------------------------------- choosing the tokens
def chooser(values, device):
    """A choose(logits (B, V), tokens (B, T)) for Llama.generate, following the settings."""
    generator = torch.Generator(device).manual_seed(values["seed"])
    penalty = values["repetition_penalty"]  # of CTRL, arXiv:1909.05858

    def choose(logits, tokens):
        used = logits.gather(1, tokens)
        logits = logits.scatter(1, tokens, torch.where(used < 0, used * penalty, used / penalty))
        if values["temperature"] < 1e-6:  # or 0
            return logits.argmax(1, keepdim=True)
        probs = (logits / values["temperature"]).softmax(1)
        probs = filtered(probs, values["top_k"], values["top_p"], values["min_p"])
        return torch.multinomial(probs, 1, generator=generator)

    return choose


def filtered(probs, top_k, top_p, min_p):
    """Probabilities (B, V), with 0 for the tokens that one of the three filters removes."""
    if 0 < top_k < probs.shape[1]:
        least = probs.topk(top_k).values[:, -1:]
        probs = probs.where(probs >= least, 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(1) - ordered  # the probability of all likelier tokens
        kept = ordered.where(before < top_p * ordered.sum(1, keepdim=True), 0)
        probs = probs.scatter(1, order, kept)
    return probs.where(probs >= min_p * probs.amax(1, keepdim=True), 0)


def prompt_ids(tokenizer, text, llama):
    """Token ids of a prompt, which begins as the documents in training do."""
    ids = prepare.prefix_ids(tokenizer) + tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        ids = llama.config.eos_token_id[:1]
    limit = llama.config.max_position_embeddings
    require(ids, "this model has no end of text to begin with: give a --prompt")
    require(max(ids) < llama.config.vocab_size, "the tokenizer has ids that the model has not")
    require(len(ids) <= limit,
            f"the prompt has {len(ids):,} tokens, the model's context {limit:,}: shorten it")
    return ids


def stream(llama, tokenizer, ids, values):
    """Write num_samples texts after ids: after every token yield (each text so far, a status)."""
    count = values["num_samples"]
    texts = [""] * count
    going = {i: decoders.DecodeStream(ids, skip_special_tokens=True) for i in range(count)}
    tokens = torch.tensor([ids] * count, device=llama.cos.device)
    choose = chooser(values, tokens.device)
    written = 0
    began = time.perf_counter()
    for new in llama.generate(tokens, values["max_new_tokens"], choose):
        for i, token in enumerate(new[:, 0].tolist()):
            if token in llama.config.eos_token_id:
                going.pop(i, None)
            if i in going:
                texts[i] += going[i].step(tokenizer, token) or ""  # None: within a character
        written += len(going)
        speed = written / max(time.perf_counter() - began, 1e-9)
        yield texts, f"{written} tokens, {speed:.1f} tokens/s"
        if not going:
            return


# ------------------------------------------------------------------------------------------ page
SLIDERS = {  # (label, what it does, lowest, highest, step)
    "max_new_tokens": ("Length", "How many tokens to write at most.", 1, 2000, 1),
    "temperature": ("Temperature", "Higher is bolder; 0 is always the likeliest.", 0, 2, 0.05),
    "top_p": ("Top-p", "Only the likeliest tokens of this total probability.", 0.05, 1, 0.05),
    "top_k": ("Top-k", "Only so many of the likeliest tokens; 0 is all.", 0, 200, 1),
    "min_p": ("Min-p", "Only tokens this share as likely as the likeliest.", 0, 1, 0.01),
    "repetition_penalty": ("Repetition penalty", "Above 1, less of what was there.", 1, 2, 0.05),
}


def first_words(folder):
    """The first words of three documents that a checkpoint was trained on."""
    try:
        data = prepare.Data(prepare.read_json(folder / "run.json")["settings"]["data_dir"])
    except (prepare.Refusal, KeyError):  # it was not trained here, or the text has gone
        return []
    [ids], _ = data.windows("train", [0], min(2 ** 16, data.meta["train_tokens"]))
    ends = np.flatnonzero(ids == data.eot)
    texts = [data.tokenizer.decode(document) for document in np.split(ids, ends)]
    return [" ".join(text.split()[:4]) for text in texts if text.strip()][:3]


def write(llama, tokenizer, text, seed, *chosen):
    """Write on from a text, with the sliders' values: yield (text, status) as it grows."""
    import gradio
    if seed in (None, -1):
        seed = random.randrange(10 ** 6)
    values = dict(zip(SLIDERS, chosen)) | {"seed": seed, "num_samples": 1}
    try:
        ids = prompt_ids(tokenizer, text, llama)
    except prepare.Refusal as error:  # shown on the page
        raise gradio.Error(str(error).removeprefix("error: "), print_exception=False)
    for (new,), status in stream(llama, tokenizer, ids, values):
        yield text + new, f"{status}, seed {seed}"


def serve(llama, tokenizer, folder, facts, text):
    """Serve a page on this machine until Ctrl-C. Several visitors can use it at once."""
    with explained("--web=true needs gradio: pip install gradio", ImportError):
        import gradio

    with gradio.Blocks(title="sample.py", analytics_enabled=False) as page:
        gradio.Markdown(f"### Write with your model\n{facts}")
        with gradio.Tab("Write"):
            prompt_box = gradio.Textbox(text, label="Prompt", lines=2, autofocus=True)
            with gradio.Row():
                start = gradio.Button("Generate", variant="primary")
                stop = gradio.Button("Stop")
            status = gradio.Markdown()
            text_box = gradio.Textbox(label="Text", lines=12, max_lines=30, buttons=["copy"])
            if beginnings := first_words(folder):
                gradio.Examples(beginnings, prompt_box, label="Beginnings from the training text")
            with gradio.Accordion("Sampling", open=False):
                seed_box = gradio.Number(-1, label="Seed", info="-1: another one each time.",
                                         precision=0, minimum=-1, maximum=2 ** 31)
                sliders = []
                for name, (label, info, low, high, step) in SLIDERS.items():
                    value = globals()[name]
                    sliders.append(gradio.Slider(min(low, value), max(high, value), value,
                                                 step=step, label=label, info=info))
        if (curve := folder.resolve().parent / "loss.png").exists():
            with gradio.Tab("Training curve"):
                gradio.Image(str(curve), show_label=False, buttons=[])
        running = gradio.on(
            [start.click, prompt_box.submit], functools.partial(write, llama, tokenizer),
            [prompt_box, seed_box, *sliders], [text_box, status], api_name="write",
            concurrency_limit=4, show_progress="hidden")
        stop.click(None, cancels=[running])
    with explained(f"cannot serve at --port={port}: choose another", OSError):
        page.launch(server_name="127.0.0.1", server_port=port, quiet=True, footer_links=[],
                    prevent_thread_lock=True)
    print(f"http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it", file=sys.stderr)
    page.block_thread()


# ------------------------------------------------------------------------------------------ main
def main():
    prepare.steady_output()
    prepare.configure(globals(), sys.argv[1:])
    check_settings()
    text = prompt
    if prompt.startswith("FILE:"):
        with explained(f"cannot read --prompt={prompt}", OSError, ValueError):
            text = Path(prompt[5:]).read_text("utf-8-sig")

    folder = find_model(model)
    tokenizer = prepare.load_tokenizer(folder)
    target = choose_device(device)
    precision = dtype
    if dtype == "auto" and target.type == "cpu" and num_samples == 1:
        precision = "bfloat16"  # reading the weights takes longest
    elif dtype == "auto":
        precision = best_dtype(target)
    llama = load_model(folder).eval().to(target, getattr(torch, precision))
    if compile and compiles(target):
        llama.decode = torch.compile(llama.decode, mode="reduce-overhead")
    parameters = sum(p.numel() for p in llama.parameters())
    facts = f"{folder}: {parameters:,} parameters, {target}, {precision}"
    if web:
        return serve(llama, tokenizer, folder, facts, text)

    ids = prompt_ids(tokenizer, text, llama)
    print(f"{facts}; seed {seed}, {len(ids)} tokens of prompt", file=sys.stderr)

    # the first sample appears as it is generated, the others at the end
    show = prepare.printable if sys.stdout.isatty() else str
    print(show(text), end="", flush=True)
    texts = []
    shown = 0  # characters of the first
    try:
        for texts, status in stream(llama, tokenizer, ids, prepare.settings_of(globals())):
            print(show(texts[0][shown:]), end="", flush=True)
            shown = len(texts[0])
            if sys.stdout.broken:  # the reader has gone
                break
    finally:  # also after Ctrl-C
        print("", *(show(text + new) for new in texts[1:]), sep=f"\n{'-' * 20}\n")
    print(status, file=sys.stderr)


if __name__ == "__main__":
    main()
