"""
$ pytest                  # the tests: minutes on two CPU cores, no network
$ python test_train.py    # the benchmark: all parts that can run here, or those named: step sample prepare cold learn
"""
import csv, ctypes, gc, json, math, os, re, runpy, shlex, shutil, signal, subprocess, sys, time, timeit
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
import prepare, sample, train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # Tiny Shakespeare and SmolLM2's tokenizer, where they are to be had
SHAPE = ("--device=cpu --dtype=float32 --compile=false --n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=32 "
         "--intermediate_size=64 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --optimizer=adamw "
         "--max_iters=12 --eval_interval=4 --log_interval=1 --warmup_iters=2").split()
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=64, vocab_size=512, rope_theta=1e5,
            norm_eps=1e-5, block_size=32)
if __name__ != "__main__":  # a thread for each process: for a toy, more are slower
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

def start(script, *args, cwd, processes=0, **kwargs):
    """Start a script of this folder as a process of its own, or as several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([sys.executable, *torchrun, ROOT / script, *args], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)

def run(*args, cwd, status=0, **kwargs):
    """Run a script to its end, as in run("train.py", "--max_iters=3", cwd=tmp_path); check its exit status."""
    process = start(*args, cwd=cwd, **kwargs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err + out
    return SimpleNamespace(stdout=out, stderr=err)

@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function like run(), but quicker: in this process, though with fresh modules and so settings of their own."""
    def call(script, *args, cwd=tmp_path):
        for name in "train", "sample": monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "argv", [script, *args])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.chdir(cwd)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code: raise
        gc.collect()  # closes log.csv, and so unlocks it
        return capsys.readouterr()
    return call

def refusal(call, *args, **kwargs):
    """The one line with which a script ends; Python prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/, 60 kB of input.txt, and out/, a run of 12 iterations on it; not to be written to."""
    path = tmp_path_factory.mktemp("work")
    (path / "input.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:60_000], "utf-8")
    run("prepare.py", "--vocab_size=512", cwd=path)
    run("train.py", *SHAPE, cwd=path)
    return path

@pytest.fixture
def toy(work):
    return ["train.py", *SHAPE, f"--data_dir={work}/data"]

# ------------------------------------------------------------------------------------------------------------ model
def close(ours, theirs):
    """Equal within 1e-5 of the largest logit."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1, "head_dim": 16}, {
    "tie_word_embeddings": False, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "eos_token_id": None}], ids=str)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, changes):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dict(
        vocab_size=301, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, rope_theta=100000.0, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0) | changes)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    ours = sample.load_model(tmp_path).eval()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and ours.config.rope_theta == changes.get("rope_theta", 1e5)
    assert sample.end_ids(ours) == ([] if "eos_token_id" in changes else [0])
    tokens = torch.randint(0, 301, (2, 2048))
    expected, logits = theirs(tokens).logits, ours(tokens)
    assert close(logits, expected) and close(logits[:, 0], expected[:, 0]) and close(logits[:, 2047], expected[:, 2047])
    shape = (2, theirs.config.num_key_value_heads, 2048, ours.config.head_dim)
    cache = [[torch.zeros(shape), torch.zeros(shape)] for _ in range(3)]
    assert close(ours(tokens[:, :2040], cache=cache)[:, -1], expected[:, 2039])
    for i in range(2040, 2048):
        assert close(ours(tokens[:, i:i + 1], cache=cache, position=i)[:, -1], expected[:, i])

@torch.no_grad()
def test_checkpoint_is_a_hugging_face_folder_and_validation_exact(work):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path, total = sample.checkpoints(work / "out")[-1][2], 0.0
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (work / "input.txt").read_text("utf-8")[5000:5100]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == Tokenizer.from_file(f"{work}/data/tokenizer.json").encode(text).ids and tokenizer.decode(ids) == text
    assert close(sample.load_model(path).eval()(torch.tensor([ids[:32]])), theirs(torch.tensor([ids[:32]])).logits)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.config.eos_token_id == 0
    tokens = torch.from_numpy(np.fromfile(work / "data/val.bin", "<u2").astype(np.int64))
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start:start + 33]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    row, meta = log_rows(work / "out")[-1], json.loads((work / "data/meta.json").read_text())
    assert float(row["val_loss"]) == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert float(row["val_bpb"]) == pytest.approx(total / math.log(2) / meta["val_bytes"], rel=1e-5)

def new_model(monkeypatch, **settings):
    """A fresh train.Llama, with some of train's globals set."""
    for key, value in settings.items(): monkeypatch.setattr(train, key, value)
    return train.Llama(SimpleNamespace(
        **{name: getattr(train, key) for key, name in train.HF_NAMES.items()}, tie_word_embeddings=True, eos_token_id=0,
        head_dim=train.n_embd // train.n_head, max_position_embeddings=train.block_size,
        initializer_range=train.n_embd ** -0.5))

@pytest.mark.parametrize("size,count", [("135m", 134_515_008), ("360m", 361_821_120), ("1.7b", 1_711_376_384)])
def test_published_shapes(monkeypatch, size, count):
    with torch.device("meta"):
        model = new_model(monkeypatch, **train.SIZES[size] | {"block_size": 8})
    assert sum(p.numel() for p in model.parameters()) == count
    if size == "135m" and SHARED.exists():
        published = json.loads((SHARED / "smollm2/config.json").read_text())
        assert all(published[name] == train.SIZES[size][key] for key, name in train.HF_NAMES.items())

@torch.no_grad()
def test_a_new_model_knows_nothing_and_no_token_sees_a_later_one(monkeypatch):
    model = new_model(monkeypatch, **train.SIZES["135m"] | {"n_layer": 4, "block_size": 64})
    tokens = torch.randint(0, 49152, (2, 65), generator=torch.Generator().manual_seed(1))
    assert 10.8 < model(tokens[:, :-1], tokens[:, 1:]).item() / 128 < 11.4
    changed = torch.where(torch.arange(64) == 20, 7, tokens[:, :64])
    difference = (model(tokens[:, :64]) - model(changed)).abs().amax(2)
    assert difference[:, :20].max() == 0 and difference[:, 20:].min() > 0

@pytest.mark.parametrize("vocabulary", [1000, 2 ** 20])  # all tokens in one slice; slices of 32 and of 8
def test_sliced_loss_equals_cross_entropy(vocabulary):
    x, weight = torch.randn(40, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(0, 1000, (40,))
    targets[5:9] = -1
    loss = torch.nn.functional.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="sum")
    expected = (loss, *torch.autograd.grad(loss * 3, (x, weight)))
    loss = train.sliced_loss(x, weight, targets)
    for ours, theirs in zip((loss, *torch.autograd.grad(loss * 3, (x, weight))), expected):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_repeated_batch_is_learned(monkeypatch, optimizer):
    torch.manual_seed(0)
    model = new_model(monkeypatch, **TINY, optimizer=optimizer, weight_decay=0.1, beta2=0.95)
    optimizers, tokens = train.make_optimizers(model), torch.randint(0, 512, (4, 33))
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 128
        loss.backward()
        for one in optimizers:
            for group in one.param_groups: group["lr"] = 0.01
            one.step()
            one.zero_grad()
    assert loss < 0.1

def test_muon_is_exact(monkeypatch):
    """Its first step, in float64: Nesterov's momentum of 0.95, five steps of Newton-Schulz, the size of AdamW's."""
    model, x = new_model(monkeypatch, **TINY, optimizer="muon", weight_decay=0.1), torch.randint(0, 512, (4, 33))
    model(x[:, :-1], x[:, 1:]).backward()
    muon, weight = train.make_optimizers(model)[1], model.model.layers[1].mlp.up_proj.weight
    before, update = weight.detach().double(), weight.grad.double().T
    update = update / update.norm()
    for _ in range(5):
        gram = update @ update.T
        update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
    muon.param_groups[0]["lr"] *= 1e-3  # of which its share is 0.6
    with train.Float32(): muon.step()
    expected = before * (1 - 6e-4 * 0.1) - 6e-4 * 0.2 * 64 ** 0.5 * update.T
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)

# --------------------------------------------------------------------------------------------- data order, schedule
def windows(work, monkeypatch, iterations, world=1, **settings):
    """Inputs and targets of every sequence of some iterations, over all processes, in order."""
    settings = dict(data_dir=f"{work}/data", batch_size=4, gradient_accumulation_steps=2, seed=1) | settings
    for key, value in (TINY | settings).items():
        monkeypatch.setattr(train, key, value)
    train.epoch_order.cache_clear()
    meta, cpu = json.loads((work / "data/meta.json").read_text()), torch.device("cpu")
    parts = [train.training_batch(i, meta, rank, world, cpu) for i in iterations for rank in range(world)]
    return [torch.cat(tensors) for tensors in zip(*parts)]

def test_an_epoch_has_every_window_once(work, monkeypatch):
    data = np.fromfile(work / "data/train.bin", "<u2").astype(np.int64)
    count, offsets, orders = len(data) // 32 - 1, set(), set()
    inputs, targets = windows(work, monkeypatch, range(3 * count // 8 + 1))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    for epoch in range(3):
        rows = inputs[epoch * count:(epoch + 1) * count].numpy()
        orders.add(rows.tobytes())
        offsets.add(next(o for o in range(32) if {row.tobytes() for row in rows} == {
            data[s:s + 32].tobytes() for s in range(o, o + 32 * count, 32)}))
    assert len(offsets) > 1 and len(orders) == 3

def test_batches_depend_on_seed_and_iteration_alone(work, monkeypatch):
    one = windows(work, monkeypatch, range(5))[0]
    assert torch.equal(one, windows(work, monkeypatch, range(5), world=2)[0])
    assert torch.equal(one, windows(work, monkeypatch, range(5), batch_size=1, gradient_accumulation_steps=8)[0])
    assert torch.equal(one[24:32], windows(work, monkeypatch, [3])[0])
    assert not torch.equal(one, windows(work, monkeypatch, range(5), seed=2)[0])

@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_corners(monkeypatch, schedule):
    for key, value in dict(schedule=schedule, learning_rate=1, min_lr=.1, warmup_iters=10, lr_decay_iters=100).items():
        monkeypatch.setattr(train, key, value)
    factors, cosine = [train.scheduled_rate(i) for i in range(130)], schedule == "cosine"
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1
    assert factors[100:] == pytest.approx([0.1] * 30)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert factors[55] == pytest.approx(0.55 if cosine else 1)
    assert factors[90] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 80 / 90) if cosine else 0.55)

# ------------------------------------------------------------------------------------------------ runs and restarts
def log_rows(out):
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))

def assert_same_losses(out, other):
    for pair in zip(log_rows(out), log_rows(other), strict=True):
        for key in "iter", "train_loss", "val_loss":
            one, two = (float(row[key] or 0) for row in pair)
            assert one == pytest.approx(two, rel=1e-5), (other, pair)

def result(out):
    """What a run has come to, to the last bit: the losses of log.csv, the weights and the optimizers' state."""
    path, keys = sample.checkpoints(out)[-1][2], ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm")
    optimizers = torch.load(path / "trainer.pt", weights_only=True)["optimizers"]
    state = torch.utils._pytree.tree_map(lambda tensor: tensor.numpy().tobytes(), optimizers)
    return [[row[key] for key in keys] for row in log_rows(out)], (path / "model.safetensors").read_bytes(), state

def wait_for_rows(process, out, count):
    """Wait until a process that has just been started has brought log.csv to `count` rows."""
    log, began = out / "log.csv", time.time()
    while not (log.exists() and log.stat().st_mtime > began and log.read_text().count("\n") > count):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

@pytest.mark.parametrize("optimizer,kills", [("adamw", [9, 15, 9]), ("muon", [9])])  # SIGKILL, SIGTERM
def test_resume_is_exact(toy, call, tmp_path, optimizer, kills):
    """With dropout and accumulation, a run that is killed and stopped near its saves ends as the one that never was."""
    args, out = (*toy, "--dropout=0.2", f"--optimizer={optimizer}", "--max_iters=40"), tmp_path / "broken"
    for number in kills:
        newest = max([0, *(entry[0] for entry in sample.checkpoints(out))])
        process = start(*args, "--out_dir=broken", cwd=tmp_path)
        wait_for_rows(process, out, newest + 5)
        process.send_signal(number)
        output = process.communicate(timeout=60)
        assert process.returncode == (0 if number == signal.SIGTERM else -number), output
    assert sample.checkpoints(out)[-1][0] < 40
    call(*args, "--out_dir=broken")
    call(*args, "--out_dir=whole")
    assert result(out) == result(tmp_path / "whole")
    assert {path.name for path in out.iterdir() if not path.name.startswith("step-")} <= {"log.csv", "loss.png"}

def test_longer_run_keeps_the_decay_and_another_starts_from_its_weights(toy, call, work, tmp_path):
    call(*toy)
    output = call(*toy, "--max_iters=16").out
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "out")[1:]]
    assert "iteration 12 of" in output and "max_iters=16 (was 12)" in output
    assert len(rates) == 16 and rates[12:] == pytest.approx([rates[2] / 10] * 4) and rates[11] > rates[12]
    assert [int(row["iter"]) for row in log_rows(tmp_path / "out")] == list(range(17))
    call(*toy, f"--init_from={work}/out", "--out_dir=tuned")
    best = min(float(row["val_loss"] or "inf") for row in log_rows(work / "out"))
    assert float(log_rows(tmp_path / "tuned")[0]["val_loss"]) == best and len(log_rows(tmp_path / "tuned")) == 13

def test_the_same_losses_however_it_is_split(toy, call, tmp_path):
    """Over 50 iterations: 1 x 8, 4 x 2 and recomputed, in 2 and 4 processes; then 10 more in one process."""
    args = (*toy, "--max_iters=50", "--eval_interval=25")
    call(*args, "--batch_size=8", "--gradient_accumulation_steps=1", "--out_dir=a")
    call(*args, "--batch_size=2", "--gradient_accumulation_steps=4", "--gradient_checkpointing=true", "--out_dir=b")
    run(*args, "--out_dir=c", cwd=tmp_path, processes=2)
    run(*args, "--out_dir=d", cwd=tmp_path, processes=4)
    for name in "abcd":
        call(*args, "--max_iters=60", f"--out_dir={name}")
        assert_same_losses(tmp_path / "a", tmp_path / name)
    assert len(log_rows(tmp_path / "d")) == 61

def test_import_does_nothing(tmp_path):
    code = ("import sys, prepare; assert 'torch' not in sys.modules; import train; "
            "assert not train.torch.cuda.is_initialized()")
    output = subprocess.run([sys.executable, "-c", code, "--inptu=no"], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (output.returncode, output.stdout, output.stderr, contents(tmp_path)) == (0, "", "", {})

def test_overrides(toy, call, tmp_path, work):
    config = dict(vars(train))
    prepare.configure(config, "--learning_rate=1 --eval_only=TRUE --wandb_log=0 --out_dir=a=b --size=Tiny".split())
    assert [config[key] for key in ("eval_only", "wandb_log", "out_dir", "size")] == [True, False, "a=b", "tiny"]
    assert config["learning_rate"] == 1 and type(config["learning_rate"]) is float
    assert "did you mean --learning_rate=VALUE" in refusal(call, "train.py", "--learning_rte=1")
    assert re.search(r"\nlog_interval = \d+ +# 1 to", call("train.py", "--help").out)
    shutil.copytree(work / "out", tmp_path / "a=b")
    before = contents(tmp_path)
    output = call(*toy, "--eval_only=TRUE", "--out_dir=a=b").out
    assert "val_bpb" in output and "val_perplexity" in output and contents(tmp_path) == before

def test_weights_and_biases(toy, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(call, *toy, "--wandb_log=1", "--out_dir=new")
    monkeypatch.delitem(sys.modules, "wandb")
    pytest.importorskip("wandb", reason="wandb is not installed")
    run(*toy, "--wandb_log=1", "--max_iters=3", cwd=tmp_path, env=os.environ | {"WANDB_MODE": "offline"})
    logged = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert all(value.encode() in logged for row in log_rows(tmp_path / "out") for value in row.values())

# ------------------------------------------------------------------------------------------------ faults, bad input
def test_out_of_memory_halves_the_micro_batch(toy, call, work, tmp_path, monkeypatch):
    forward, limit = torch.nn.Embedding.forward, 2
    def short_of_memory(self, tokens):
        if len(tokens) > limit: raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens)
    monkeypatch.setattr(torch.nn.Embedding, "forward", short_of_memory)
    output = call(*toy).out
    assert "out of memory" in output and "4 micro-batches x 2 sequences" in output
    assert_same_losses(work / "out", tmp_path / "out")
    limit = 0
    assert "--block_size=32" in refusal(call, *toy, "--out_dir=new")

def test_what_is_not_finite_is_skipped_and_never_saved(toy, call, tmp_path, monkeypatch):
    norm, calls, bad = torch.nn.utils.clip_grad_norm_, [], (3, 4)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norm(*args) * (
        math.nan if calls.append(0) or len(calls) in bad else 1))
    assert call(*toy).out.count("skipped") == 2 and sample.checkpoints(tmp_path / "out")[-1][0] == 12
    calls, bad = [], range(6, 99)
    assert re.search("iterations up to 9, learning rate .* text like '.+'", refusal(call, *toy, "--out_dir=new"))
    assert all(p.isfinite().all() for p in sample.load_model(sample.checkpoints(tmp_path / "new")[-1][2]).parameters())
    bad = ()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf))
    assert "not finite" in refusal(call, *toy, "--out_dir=inf")
    assert [path.name for path in (tmp_path / "inf").iterdir() if path.is_dir()] == ["step-0000000"]

def test_no_compiler_is_no_error(toy, tmp_path):
    broken = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert "not compiled" in run(*toy, "--compile=true", "--max_iters=2", cwd=tmp_path, env=broken).stdout
    assert log_rows(tmp_path / "out")[-1]["iter"] == "2"

def test_full_disk(toy, call, tmp_path):
    resource = pytest.importorskip("resource", reason="file-size limits are POSIX's")
    call(*toy, "--max_iters=4")
    before = contents(tmp_path / "out/step-0000004")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    error = run(*toy, cwd=tmp_path, status=1, preexec_fn=limit).stderr
    assert "cannot write to out: make room" in error and error.count("\n") == 1 and "Traceback" not in error
    assert contents(tmp_path / "out/step-0000004") == before and not (tmp_path / "out/tmp").exists()
    call(*toy)
    assert log_rows(tmp_path / "out")[-1]["iter"] == "12"

@pytest.mark.parametrize("processes,number", [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_ends(toy, call, tmp_path, processes, number):
    process, out = start(*toy, "--max_iters=100000", cwd=tmp_path, processes=processes), tmp_path / "out"
    wait_for_rows(process, out, 9)
    # one of torchrun's two workers is told, and the other one has to agree
    told = int(subprocess.getoutput(f"pgrep -P {process.pid} -f train.py").split()[0]) if processes else process.pid
    os.kill(told, number)
    output = process.communicate(timeout=60)
    iteration = sample.checkpoints(out)[-1][0]
    assert process.returncode == 0 and iteration >= 8, output
    assert [int(row["iter"]) for row in log_rows(out)] == list(range(iteration + 1))
    assert f"iteration {iteration:,} of" in call(*toy, f"--max_iters={iteration + 1}", "--lr_decay_iters=100000").out

def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(toy, call, tmp_path):
    process = start(*toy, "--max_iters=100000", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "out", 2)
    assert "wait for the run" in refusal(call, *toy)
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before it can end by itself
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT): process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)

NEWEST, OPEN = "out/step-0000012", lambda w: None
def cut(name):
    return lambda w: (w / name).write_bytes((w / name).read_bytes()[:-99])

def config(name=f"{NEWEST}/config.json", **changes):
    return lambda w: (w / name).write_text(json.dumps(json.loads((w / name).read_text()) | changes))

def tensors(changes, name=f"{NEWEST}/model.safetensors"):
    return lambda w: save_file({k: v for k, v in (load_file(w / name) | changes).items() if v is not None}, w / name)

BAD_TRAINING = [  # what train.py is told, what the line must name, what is done to a folder with data/ and out/ before
    ("--max_iters 3", "no = in", OPEN), ("--n_embd=36 --out_dir=new", "rotary", OPEN), ("--size=7b", "135m", OPEN),
    ("--optimizer=sgd --out_dir=new", "adamw | muon", OPEN), ("--optimizer=muon", "=muon (was adamw)", OPEN),
    ("--n_layer=3", "--n_layer=3 (was 2)", OPEN), ("--init_from=scratch", "holds a run", OPEN),
    ("--init_from=resume --out_dir=new", "no run", OPEN), ("--init_from=no/model --out_dir=new", "no/model", OPEN),
    ("--dropout=nan", "dropout", OPEN), ("", "meta.json", lambda w: (w / "data/meta.json").unlink()),
    ("", "meta.json", cut("data/train.bin")), ("", "meta.json", config("data/meta.json", tokenizer_sha256="0")),
    ("", NEWEST, cut(f"{NEWEST}/trainer.pt")),
    ("--out_dir=new", "771", lambda w: (w / "data/val.bin").write_bytes(b"\3" * os.path.getsize(w / "data/val.bin"))),
    ("", "another tokenizer", lambda w: prepare.prepare(f"{w}/input.txt", "bpe", 400, 0.1, w / "data")),
    ("", "trainer.pt", lambda w: (w / NEWEST / "trainer.pt").unlink()),
    ("", "trainer.pt", lambda w: (w / NEWEST / "trainer.pt").write_bytes(b"cos\nmkdir\n(S'pwned'\ntR.")),
    ("", "config.json", lambda w: (w / NEWEST / "config.json").unlink()), ("", NEWEST, cut(f"{NEWEST}/config.json")),
    ("", "attention_bias", config(attention_bias=True)), ("", "mlp_bias", config(mlp_bias=True)),
    ("", "gelu", config(hidden_act="gelu")), ("", "rope_type", config(rope_parameters={"rope_type": "yarn"})),
    ("", "rope_scaling", config(rope_scaling={"factor": 2.0})), ("", "lm_head", config(tie_word_embeddings=False)),
    ("", "num_hidden_layers", config(num_hidden_layers=None)), ("", "config.json", config(hidden_size="abc")),
    ("", "config.json", config(num_attention_heads=0)), ("", "config.json", config(hidden_size=-4)),
    ("", "config.json", config(rope_theta=[])), ("", "config.json", config(eos_token_id=9999)),
    ("", NEWEST, cut(f"{NEWEST}/model.safetensors")), ("", "model.norm", tensors({"model.norm.weight": None})),
    ("", "model.norm", tensors({"model.norm.weight": torch.ones(31)})), ("", "bias", tensors({"bias": torch.ones(3)}))]
@pytest.mark.parametrize("args,named,damage", BAD_TRAINING)
def test_bad_input_of_training_is_explained(work, tmp_path, damage, args, named, call):
    shutil.copytree(work, tmp_path / "w")
    damage(tmp_path / "w")
    before = contents(tmp_path)
    assert named in refusal(call, "train.py", *SHAPE, *args.split(), cwd=tmp_path / "w")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {"new", "log.csv"}

BAD_FLAGS = {
    "train.py": "--size max_iters=3 --max_iters=1.5 --max_iters=many --dropout=x --eval_only=maybe --batch_size=-1 "
                "--n_head=-2 --n_head=3 --n_kv_head=3 --dropout=1 --dropout=nan --seed=-1 --min_lr=9 --warmup_iters=13 "
                "--compile=maybe --dtype=int8 --device=cuda:99 --device=abacus --block_size=20000 --learning_rte=1",
    "prepare.py": "--inptu=a --vocab_size=256 --vocab_size=65537 --val_fraction=0 --val_fraction=nan --val_fraction=",
    "sample.py": "--temperature=-1 --temperature=nan --top_p=0 --top_p=1.5 --min_p=2 --top_k=-1 --num_samples=0 "
                 "--max_new_tokens=0 --port=70000 --dtype=int8 --model=none --prompt=FILE:no --tempatur=1 --seed=-1"}
@pytest.mark.parametrize("script,flag", [(script, flag) for script in BAD_FLAGS for flag in BAD_FLAGS[script].split()])
def test_bad_flags_are_named(toy, work, call, script, flag, tmp_path, capsys):
    args = {"train.py": toy, "prepare.py": [script], "sample.py": [script, "--device=cpu", f"--model={work}/out"]}
    assert flag.split("=")[0].strip("-") in refusal(call, *args[script], flag) and not capsys.readouterr().out
    assert {path.name for path in contents(tmp_path)} <= {"out", "log.csv"}

def test_the_commands_of_the_readme_work(toy, call, work, tmp_path):
    """Every python command of the README that needs no network and no GPU, with the shape of a toy."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    (tmp_path / "my.txt").write_text((work / "input.txt").read_text("utf-8"), "utf-8")
    (tmp_path / "prompt.txt").write_text("The")
    commands = re.findall(r"(?m)^python (\w+\.py [^#\n|&]*)", (ROOT / "README.md").read_text("utf-8"))
    commands = [line for line in commands if not re.search("http|Hugging|web|135m|360m|1.7b|cuda|gguf|test_", line)]
    assert len(commands) > 5
    for number, (script, *flags) in enumerate(map(shlex.split, commands)):
        call(*(toy if script == "train.py" else [script]), *flags,
             *([f"--out_dir={number}", "--max_iters=2"] if script == "train.py" else []))

# ------------------------------------------------------------------------------------------------------ preparation
PROSE = ("An old man said:\r\nstill 1234 geese...\n\n"
         "Два слова, 三个字。\n\n  naïve 👩‍👩‍👧 \t<tab>\nend") * 30

def prepared(folder):
    """(meta, token ids of both splits in a row, Tokenizer) of a data folder whose counts agree with its files."""
    meta = json.loads(Path(folder, "meta.json").read_text())
    train_ids, val_ids = (np.fromfile(Path(folder, f"{split}.bin"), "<u2") for split in ("train", "val"))
    tok = Tokenizer.from_file(f"{folder}/tokenizer.json")
    assert (len(train_ids), len(val_ids)) == (meta["train_tokens"], meta["val_tokens"])
    assert train_ids[0] == val_ids[0] == meta["eos_token_id"] and meta["vocab_size"] == tok.get_vocab_size()
    assert meta["tokenizer_sha256"] == prepare.fingerprint(f"{folder}/tokenizer.json") and len(os.listdir(folder)) == 4
    return meta, np.concatenate((train_ids, val_ids)), tok

def documents(folder):
    """The texts between ends of text, as bytes, but not split where validation starts."""
    meta, ids, tok = prepared(folder)
    ids, eot = np.delete(ids, [0, meta["train_tokens"]]), meta["eos_token_id"]
    texts = [tok.decode(part[part != eot].tolist()).encode() for part in np.split(ids, np.flatnonzero(ids == eot))[:-1]]
    assert ids[-1] == eot and sum(map(len, texts)) == meta["train_bytes"] + meta["val_bytes"]
    return texts

@pytest.mark.skipif(not SHARED.exists(), reason=f"there is no {SHARED}")
def test_tiny_shakespeare_is_341094_tokens_however_it_is_cut(tmp_path, monkeypatch):
    text = (SHARED / "tinyshakespeare.txt").read_text()
    for piece in prepare.PIECE, 301:
        monkeypatch.setattr(prepare, "PIECE", piece)
        prepare.prepare(f"{SHARED}/tinyshakespeare.txt", f"{SHARED}/smollm2", 4096, 0.1, tmp_path / "data")
        meta, ids, tok = prepared(tmp_path / "data")
        ids = ids[ids != meta["eos_token_id"]].tolist()
        assert len(ids) == 341_094 and ids == tok.encode(text, add_special_tokens=False).ids

@pytest.mark.parametrize("size, text", [(1, PROSE), (7, PROSE), (300, PROSE), (1 << 16, "a line has no end " * 9000),
                                        (9000, "字" * 90_000 + "\n- a\n\n c\nd" * 40)], ids=lambda x: str(x)[:9])
def test_pieces_have_the_tokens_of_the_whole(tmp_path, size, text):
    path, tok = tmp_path / "text.txt", prepare.get_tokenizer("bpe", 300, [text[:2000]])
    path.write_text(text)
    pieces = [piece for piece, _ in prepare.read([str(path)], size)]
    assert len(pieces) > 1 and "".join(pieces) == path.read_text()
    assert sum((tok.encode(piece).ids for piece in pieces), []) == tok.encode(path.read_text()).ids

def test_every_kind_of_input_and_an_end_of_text_after_each_document(tmp_path):
    import functools, http.server, threading
    stories, folder = [f"Story {i}:\na tale of {i * i} geese." for i in range(20)], tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name, text in (".hidden", "no"), ("a.txt", stories[0]), ("deep/b,c.txt", stories[1]):
        (folder / name).write_text(text)
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"id": 1, "text": story}) + "\n" for story in stories[2:]))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for names in f"{folder},{tmp_path}/many.jsonl", f"{folder},{url}/many.jsonl?download=true":
            prepare.prepare(names, "bpe", 300, 0.2, tmp_path / "data")
            assert documents(tmp_path / "data") == [story.encode() for story in stories]
        with pytest.raises(SystemExit, match="nothing.txt.*404"):
            prepare.prepare(f"{url}/nothing.txt", "bpe", 300, 0.2, tmp_path / "data")
        server.shutdown()
    prepare.prepare(f"{folder}/deep/b,c.txt", "bpe", 300, 0.8, tmp_path / "data")
    assert documents(tmp_path / "data") == [stories[1].encode()]
    (tmp_path / "two.txt").write_text("a word\n" * 900 + "qqqqqq\n" * 100)
    prepare.prepare(f"{tmp_path}/two.txt", "bpe", 300, 0.1, tmp_path / "data")
    assert not any("qq" in word for word in prepared(tmp_path / "data")[2].get_vocab())  # the BPE has not seen the end

def test_a_tokenizer_that_loses_bytes_is_reported(tmp_path, capsys):
    parts = json.loads(prepare.get_tokenizer("bpe", 300, ["abc abc"]).to_str())
    del parts["model"]["vocab"]["Ĕ"], parts["model"]["vocab"]["ñ"]  # how byte-level BPE writes the bytes 14 and f1
    (tmp_path / "lossy.json").write_text(json.dumps(parts))
    (tmp_path / "a.txt").write_text("abc \x14 abc \U00040000.\n" * 50)
    prepare.prepare(str(tmp_path / "a.txt"), str(tmp_path / "lossy.json"), 4096, 0.1, tmp_path / "data")
    assert "(100 lost" in capsys.readouterr().out

TEXT = b"a line of text\n" * 50
BAD_TEXT = [  # what is wrong in a file (text, or the vocabulary of t.json), arguments, what the message names
    (None, "--input=no.txt", "no.txt"), (None, "--input=input.txt,b.txt", "b.txt"), (None, "--input=", "0 bytes"),
    (b"", "", "input.txt: 0 bytes"), (b"x", "", "input.txt: 1 bytes"), (b"one line, with its end\n", "", "no line"),
    (TEXT + b"\0", "", "input.txt is not text"), ("a\nb".encode("utf-16"), "", "input.txt"),
    (TEXT * 999 + b"caf\xe9", "", "byte 749,253 "), (b"\xef\xbb\xbf" + TEXT + b"\xe9", "", "byte 753 "),
    (b'{"text": "a"}\n{"text": "b"\n', "--input=a.jsonl", "a.jsonl, line 2"),
    (b'{"text": "a"}\n{"body": "b"}\n', "--input=a.jsonl", "a.jsonl, line 2"),
    (b'{"text": 3}\n', "--input=a.jsonl", "a.jsonl, line 1"), (b'["text"]\n', "--input=a.jsonl", "a.jsonl, line 1"),
    (b'{"text": "\\ud800"}', "--input=a.jsonl", "line 1"), (None, "--tokenizer=input.txt", "tokenizer input.txt"),
    (None, "--input=http://[", "http://["), (None, "--input=http://127.0.0.1:9/a.txt", "127.0.0.1:9"),
    (None, "--data_dir=input.txt", "make input.txt"), (None, "--data_dir=input.txt/data", "make input.txt/data"),
    ({"a": 0}, "--tokenizer=t.json", "end of text None"), ({"</s>": 70_000}, "--tokenizer=t.json", "70,001 ids")]
@pytest.mark.parametrize("wrong, args, named", BAD_TEXT)
def test_bad_input_of_preparation_is_explained(tmp_path, call, wrong, args, named):
    spec = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": wrong, "unk_token": "a"}}
    (tmp_path / "t.json").write_text(json.dumps(spec, default=str))
    for name in "input.txt", "a.jsonl":
        (tmp_path / name).write_bytes(wrong if isinstance(wrong, bytes) else TEXT)
    before = contents(tmp_path)
    assert named in refusal(call, "prepare.py", *args.split()) and contents(tmp_path) == before

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_preparation_that_is_stopped_changes_nothing_and_the_next_loses_nothing(tmp_path, call, number):
    (tmp_path / "input.txt").write_text(PROSE * 500)
    process = start("prepare.py", "--vocab_size=260", cwd=tmp_path)
    while not (tmp_path / ".data-tmp" / "train.bin").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert not (tmp_path / "data").exists() and out == "" and "Traceback" not in err
    if number != signal.SIGKILL:
        assert process.returncode == 1 and re.fullmatch("error: .*Interrupt.*\n", err) and len(contents(tmp_path)) == 1
        return
    (tmp_path / "input.txt").write_bytes(b"\xef\xbb\xbf" + PROSE.encode())
    out = run("prepare.py", "--vocab_size=400", cwd=tmp_path)  # .data-tmp is still there, and is cleaned up
    before = contents(tmp_path)
    assert len(before) == 6 and documents(tmp_path / "data") == [PROSE.replace("\r\n", "\n").encode()]
    assert abs(prepared(tmp_path / "data")[0]["val_bytes"] / 3270 - 0.1) < 0.03 and out.stderr == ""
    assert "(0 lost" in out.stdout and "An old man said:\n" in out.stdout
    (tmp_path / "input.txt").write_bytes(b"\xff")
    assert refusal(call, "prepare.py") == "error: input.txt: byte 0 is not UTF-8: convert it"
    assert contents(tmp_path).items() - before.items() == {(Path("input.txt"), b"\xff")}

# --------------------------------------------------------------------------------------------------------- sampling
def test_greedy_equals_transformers_and_sampling_slides(work):
    from transformers import AutoModelForCausalLM
    folder, tokens = sample.find_model(work / "out"), torch.randint(1, 500, (3, 10))
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None)
    llama, before = sample.load_model(folder).eval(), torch.get_rng_state()
    options = {key: getattr(sample, key) for key in sample.OPTIONS} | {"max_new_tokens": 20, "temperature": 0}
    llama.config.eos_token_id = None
    assert torch.equal(torch.cat(list(sample.generate(llama, tokens, **options)), 1), theirs[:, 10:])
    options |= {"max_new_tokens": 50, "temperature": 1}  # the context is 32
    one, two = (torch.cat(list(sample.generate(llama, tokens[[0, 0]], **options)), 1) for _ in range(2))
    assert one.shape == (2, 50) and torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(before, torch.get_rng_state())  # the random numbers are its own

def test_filters_equal_transformers(monkeypatch):
    import transformers.generation as g
    monkeypatch.setattr(torch, "multinomial", lambda probs, *_, **__: probs)
    logits, tokens = 3 * torch.randn(8, 50), torch.randint(50, (8, 6))
    ours = sample.choose(logits, tokens, 0.7, 20, 0.8, 0.05, 1.7, None)
    for kind, value in ((g.RepetitionPenaltyLogitsProcessor, 1.7), (g.TemperatureLogitsWarper, 0.7),
                        (g.TopKLogitsWarper, 20), (g.TopPLogitsWarper, 0.8), (g.MinPLogitsWarper, 0.05)):
        logits = kind(value)(tokens, logits)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), logits.softmax(1))

def test_stream_gives_whole_characters_and_ends_each_sample(work, monkeypatch):
    tokenizer = Tokenizer.from_file(f"{work}/data/tokenizer.json")
    llama = sample.load_model(sample.find_model(work / "out"))
    text, end = "Zoë 日本 👍🏽!", llama.config.eos_token_id
    ids = tokenizer.encode(text).ids
    rows = torch.tensor([ids[:4] + [end] + ids[5:], ids])
    monkeypatch.setattr(sample, "generate", lambda *_, **__: rows.T[:, :, None])
    pieces = list(sample.stream(llama, tokenizer, [end], 2))
    assert "".join(second for _, second in pieces) == text and not any("\ufffd" in piece for _, piece in pieces)
    assert not any(first for first, _ in pieces[4:]) and pieces[0][0]

def test_command_line(work, call, tmp_path):
    (tmp_path / "prompt.txt").write_text("The")
    args = ["sample.py", "--device=cpu", "--max_new_tokens=50", f"--prompt=FILE:{tmp_path}/prompt.txt"]
    first = run(*args, "--num_samples=3", cwd=work)
    assert first.stdout == call(*args, "--num_samples=3", cwd=work).out
    assert first.stdout != call(*args, "--num_samples=3", "--seed=7", cwd=work).out
    samples = first.stdout.split("\n" + "-" * 20 + "\n")
    assert len(samples) == 3 and all(text.startswith("The") for text in samples)
    assert "past 32 tokens" in first.stderr and "tokens/s" in first.stderr
    assert call(*args[:3], cwd=work).out.strip()  # without a prompt
    assert "context" in refusal(call, *args[:3], "--prompt=" + "word " * 99, cwd=work)
    process = start("sample.py", "--prompt=Hello", "--max_new_tokens=1000000000", "--device=cpu", cwd=work)
    assert process.stdout.read(6)
    process.send_signal(signal.SIGINT)  # the text so far is left
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and rest.endswith("\n") and "Traceback" not in errors

@pytest.fixture(scope="session")
def page(work):
    pytest.importorskip("gradio", reason="gradio is not installed")
    import socket
    port = 20_000 + os.getpid() % 10_000
    server = subprocess.Popen([sys.executable, ROOT / "sample.py", "--web=True", f"--port={port}"], cwd=work)
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert server.poll() is None
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    assert server.poll() is None  # no request has ended it
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130

def test_page_serves_two_at_once_and_survives_bad_input(page):
    from gradio_client import Client
    one, two = Client(page, verbose=False), Client(page, verbose=False)
    jobs = [client.submit(text, 50, 0.8, 1, 0, 1) for client, text in ((one, "First"), (two, "Second"), (one, "First"))]
    first, second, third = (job.result(timeout=120) for job in jobs)
    assert first == third and first.startswith("First") and second.startswith("Second") and "First" not in second
    for values in (("Bad", 50, 0.8, 1, 0, None), ("Bad", 50, -1, 1, 0, 1), ("word " * 99, 50, 0.8, 1, 0, 1)):
        with pytest.raises(Exception): one.predict(*values)

def test_page_in_a_browser(page, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options, driver = webdriver.ChromeOptions(), shutil.which("chromedriver")
    options.binary_location = shutil.which("chromium") or ""
    if not driver or not options.binary_location:
        pytest.skip("Chromium and its driver are not installed")
    for flag in ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
                 f"disable-component-update user-data-dir={tmp_path}").split():
        options.add_argument("--" + flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        browser.implicitly_wait(60)
        browser.get(page)
        button = lambda name: browser.find_element("xpath", f"//button[contains(., '{name}')]")
        text = lambda: browser.execute_script("return document.querySelectorAll('textarea')[1].value")
        button("Generate")  # once it is there, so is the rest
        browser.find_element("tag name", "textarea").send_keys("Hello")
        browser.find_element("css selector", "input[type=number]").send_keys("\ue009a\ue0002000")  # Control-A first
        button("Generate").click()
        told = ["Hello"]
        while len(told) < 4:  # it grows
            told += [now for now in [text()] if len(now) > len(told[-1])]
        browser.execute_script("[...document.querySelectorAll('button')].find(b => b.innerText == 'Stop').click()")
        button("Generate")
        told.append(text())
        time.sleep(2)
        assert told[-1].startswith("Hello") and text() == told[-1]
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

# -------------------------------------------------------------------------------------------------------- benchmark
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 5))  # timed turns of each side; the tables show their medians
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PRECISION = torch.bfloat16 if GPU or torch.cpu._is_avx512_bf16_supported() else torch.float32  # as train.py chooses
BIG, PARAMETERS, NEW = train.SIZES["135m"], 134_515_008, 256  # the model; its parameters; tokens to sample
SHAKESPEARE = SHARED / "tinyshakespeare.txt"
PREPARE = """
import json, sys, time
who, root, text, tokenizer, out = sys.argv[1:]
sys.path.insert(0, root)
import prepare  # and not torch, which would count as memory
answers, sys.stdout = sys.stdout, sys.stderr
file, tok = open(text, encoding="utf-8"), prepare.Tokenizer.from_file(tokenizer)
pieces = list(iter(lambda: file.read(65536), "")) if who == "theirs" else []
for _ in sys.stdin:
    start = time.perf_counter()
    if who == "ours":
        prepare.prepare(text, tokenizer, 4096, 0.1, out)
    for i in range(0, len(pieces), 256):  # 16 MB at a time: what comes back takes many times the memory of the text
        tok.encode_batch(pieces[i:i + 256], add_special_tokens=False)
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
"""

def build(who, dtype, positions):
    """SmolLM2-135M, of train.py or of transformers, with the same random weights in both."""
    config = sample.ONLY | {name: BIG[key] for key, name in train.HF_NAMES.items()} | {
        "tie_word_embeddings": True, "head_dim": BIG["n_embd"] // BIG["n_head"], "max_position_embeddings": positions,
        "initializer_range": BIG["n_embd"] ** -0.5, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": BIG["rope_theta"]}}  # for transformers 5
    if who == "ours":
        model = train.Llama(SimpleNamespace(**config)).to(dtype)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):  # both have the same names
            p.fill_(1) if p.dim() == 1 else p.normal_(std=BIG["n_embd"] ** -0.5)
    return model.to(DEVICE)

def step_worker(who, mode, batch, length):
    """A function that trains 135m for an iteration and returns the loss."""
    if who == "ours" and sys.platform == "linux" and not GPU:  # as train.py has it
        for name, value in (-1, -1), (-4, 0): ctypes.CDLL(None).mallopt(name, value)
    model = build(who, torch.float32, length).train()
    x, y = torch.randint(49152, (2, batch, length)).to(DEVICE)  # the same for all: build has set the seed
    if mode == "compiled":  # ours as train.py does it
        for part in model.model.layers if who == "ours" else [model]:
            part.compile(dynamic=False)
        train.slice_loss = torch.compile(train.slice_loss, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    labels = {} if who == "ours" else {"labels": y, "shift_labels": y, "use_cache": False}
    def step():
        with torch.autocast(DEVICE, PRECISION, enabled=PRECISION != torch.float32):
            loss = model(x, **labels).loss if labels else model(x, y) / y.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for a GPU
    return step

def products_worker(batch, length):
    """A function that computes the matrix products of that iteration alone, each forward and twice backward."""
    C, M, KV = BIG["n_embd"], BIG["intermediate_size"], BIG["n_embd"] // BIG["n_head"] * BIG["n_kv_head"]
    shapes = [(C, C), (KV, C), (KV, C), (C, C), (M, C), (M, C), (C, M)] * BIG["n_layer"] + [(BIG["vocab_size"], C)]
    weights = [torch.randn(shape, dtype=PRECISION, device=DEVICE) for shape in shapes]
    values = {n: torch.randn(batch * length, n, dtype=PRECISION, device=DEVICE) for n in set(sum(shapes, ()))}
    def products():
        for weight in weights:
            y, x = (values[n] for n in weight.shape)
            forward, x_grad, weight_grad = torch.mm(x, weight.t()), torch.mm(y, weight), torch.mm(y.t(), x)
        return weight_grad[0, 0].item()
    return products

def sample_worker(who, dtype, batch):
    """A function that returns NEW tokens after each of `batch` prompts of 128."""
    model, prompts = build(who, getattr(torch, dtype), 2048).eval(), torch.randint(49152, (batch, 128)).to(DEVICE)
    options = {key: getattr(sample, key) for key in sample.OPTIONS} | {"max_new_tokens": NEW, "temperature": 0.0}
    if who == "ours":
        return lambda: torch.cat(list(sample.generate(model, prompts, **options)), 1).tolist()
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW, "do_sample": False}
    return lambda: model.generate(prompts, **options)[:, 128:].tolist()

def bandwidth_worker():
    """A function that reads 1 GiB of memory."""
    return lambda values=torch.ones(2 ** 28, device=DEVICE): values.sum().item()

def serve(kind, *args):
    """A process of the benchmark: for each line of stdin, time what a worker returned; answer with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_float32_matmul_precision("high")  # as train.py has it
    function = globals()[kind](*(int(a) if a.isdigit() else a for a in args))
    for _ in sys.stdin:
        results, count = [], 11 if GPU and kind != "sample_worker" else 1
        times = timeit.repeat(lambda: results.append(function()), number=1, repeat=count)
        answer = {"seconds": float(np.median(times[1:] or times)), "result": results[0]}
        if GPU:
            answer["MB"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.empty_cache()  # room for the others
        print(json.dumps(answer), file=answers, flush=True)

def alternate(commands, rounds=ROUNDS, warm_up=1):
    """Let a process for each {name: command} take turns: {name: {seconds: median, MB: peak memory, result: of the first
    turn}}. Those of a process that fails are nan and None; it tells why on stderr."""
    pipes, answers = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}, {name: [] for name in commands}
    processes = {name: subprocess.Popen([sys.executable, *map(str, command)], text=True, **pipes)
                 for name, command in commands.items()}
    for turn in range(rounds + warm_up):
        for name, process in processes.items():
            answer = {"seconds": math.nan, "MB": math.nan, "result": None}
            if process.poll() is None:
                print(file=process.stdin, flush=True)
                answer |= json.loads(process.stdout.readline() or "{}")
            peak = re.search(r"VmHWM:\s*(\d+)", subprocess.getoutput(f"cat /proc/{process.pid}/status"))
            if peak and not GPU:  # its ru_maxrss would not be below that of this process, its parent
                answer["MB"] = int(peak[1]) * 1024 / 1e6
            answers[name].append(answer)
            print(f"turn {turn + 1} of {rounds + warm_up}: {name} {answer['seconds']:.3f} s", file=sys.stderr)
    for process in processes.values():
        process.communicate()  # which ends its stdin, and so the process
    return {name: given[-1] | {"seconds": np.median([answer["seconds"] for answer in given[warm_up:]]),
                               "result": given[0]["result"]} for name, given in answers.items()}

def table(title, rows):
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}\n")
    for row in (cells[0], ["-" * width for width in widths], *cells[1:]):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|", flush=True)

def bench_step(folder):
    sides = "ours compiled", "theirs compiled", "ours eager", "theirs eager"
    peaks = [peak for name, peak in train.PEAK_FLOPS.items() if GPU and name in torch.cuda.get_device_name()]
    for size in ((16, 1024), (16, 2048)) if GPU else ((4, 256),):
        found = alternate({side: (__file__, "worker", "step_worker", *side.split(), *size) for side in sides} | {
            "products alone": (__file__, "worker", "products_worker", *size)})
        flops = (6 * PARAMETERS + 12 * BIG["n_layer"] * BIG["n_embd"] * size[1]) * math.prod(size)  # as PaLM counts
        compiled, eager, products = (found[name]["seconds"] for name in (sides[1], sides[3], "products alone"))
        table(f"Training step, 135m, {size[0]} x {size[1]} tokens, {PRECISION}; theirs: transformers with SDPA", [{
            "": name, "s": f"{a['seconds']:.3f}", "tokens/s": f"{math.prod(size) / a['seconds']:,.0f}",
            "x theirs eager, compiled": f"{eager / a['seconds']:.2f}, {compiled / a['seconds']:.2f}",
            "of the products' rate": f"{products / a['seconds']:.0%}",
            "MFU": f"{flops / a['seconds'] / peaks[0]:.1%}" if peaks else "n/a",
            "peak MB": f"{a['MB']:,.0f}", "MB x theirs eager": f"{a['MB'] / found['theirs eager']['MB']:.2f}",
            "loss": "" if "products" in name else a["result"]} for name, a in found.items()])

def bench_sample(folder):
    rows, single = [], {}
    for dtype, batch in [("bfloat16", 1), ("bfloat16", 8), ("float32", 1), ("float32", 8)][:2 if GPU else 4]:
        found = alternate({who: (__file__, "worker", "sample_worker", who, dtype, batch) for who in ("ours", "theirs")}
                          | {"bandwidth": (__file__, "worker", "bandwidth_worker")})
        bandwidth = 2 ** 30 / found.pop("bandwidth")["seconds"]
        limit = NEW * PARAMETERS * getattr(torch, dtype).itemsize / bandwidth  # seconds to read all weights NEW times
        texts = zip(*(a["result"] or [] for a in found.values()))  # past its first difference a text does not count
        same = sum(next((i for i in range(NEW) if ours[i] != theirs[i]), NEW) for ours, theirs in texts)
        one = single.setdefault(dtype, found["theirs"]["seconds"])
        rows += [{"": f"{who}, {dtype} x {batch}", "tokens/s": f"{batch * NEW / a['seconds']:.1f}",
                  "x theirs": f"{found['theirs']['seconds'] / a['seconds']:.2f}",
                  "x theirs single": f"{batch * one / a['seconds']:.2f}",
                  "of the bandwidth": f"{limit / a['seconds']:.0%} of {bandwidth / 1e9:.1f} GB/s",
                  "peak MB": f"{a['MB']:,.0f}", "same tokens": f"{same} of {batch * NEW}"} for who, a in found.items()]
    table(f"Sampling, 135m, prompt of 128, {NEW} new tokens, greedy; theirs: generate of transformers", rows)

def bench_prepare(folder, size=10 ** 8, rounds=ROUNDS):
    text, source = folder / "text.txt", SHAKESPEARE if SHAKESPEARE.exists() else ROOT / "input.txt"
    size = text.write_bytes(source.read_bytes() * round(size / source.stat().st_size))
    tokenizer = SHARED / "smollm2" / "tokenizer.json"
    if not tokenizer.exists():
        run("prepare.py", f"--input={source}", cwd=folder)
        tokenizer = shutil.copy(folder / "data" / "tokenizer.json", folder)
    found = alternate({who: ("-c", PREPARE, who, ROOT, text, tokenizer, folder / "data")
                       for who in ("ours", "theirs")}, rounds, warm_up=int(rounds > 1))
    table(f"Preparing {size / 1e6:,.0f} MB, {tokenizer}; theirs: encode_batch on 64 kB pieces in memory", [{
        "": who, "s": f"{a['seconds']:.1f}", "MB/s": f"{size / 1e6 / a['seconds']:.2f}",
        "x theirs": f"{found['theirs']['seconds'] / a['seconds']:.2f}", "peak MB": f"{a['MB']:,.0f}"}
        for who, a in found.items()])

def bench_cold(folder):
    (folder / "input.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:20_000], "utf-8")
    run("prepare.py", "--vocab_size=300", "--val_fraction=0.02", cwd=folder)
    for size, args in ("tiny", ""), ("135m", "--batch_size=1 --gradient_accumulation_steps=1 --block_size=256"):
        command = [sys.executable, ROOT / "train.py", f"--device={DEVICE}", "--log_interval=1", f"--size={size}"]
        times = []
        for turn in range(2 * ROUNDS):  # with a cold cache, a warm one, a cold one ...
            shutil.rmtree(folder / "out", ignore_errors=True)
            cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache-{size}-{turn // 2}", "PYTHONUNBUFFERED": "1"}
            start = time.perf_counter()
            process = subprocess.Popen(command + args.split(), cwd=folder, env=os.environ | cache, text=True,
                                       stdout=subprocess.PIPE)
            done = any(line.startswith("iter 1, train_loss") for line in process.stdout)
            times.append(time.perf_counter() - start if done else math.nan)
            process.kill()
            process.communicate()
        table(f"Cold start, --size={size} {args}: launch to first iteration, past an evaluation, checkpoint, sample",
              [{name: f"{np.median(times[i::2]):.1f} s" for i, name in enumerate(("cold cache", "warm cache"))}])

def bench_learn(folder):
    if not SHAKESPEARE.exists():
        return print(f"\nLearning: skipped, there is no {SHAKESPEARE}")
    clock = [time.perf_counter()]
    for args in ("prepare.py", f"--input={SHAKESPEARE}"), ("train.py", "--size=tiny"):
        subprocess.run([sys.executable, ROOT / args[0], *args[1:]], cwd=folder, check=True, capture_output=True)
        clock.append(time.perf_counter())
    *_, last = csv.DictReader(open(folder / "out" / "log.csv"))
    table("Learning: tiny on Tiny Shakespeare, seconds of whole processes", [{
        "iterations": last["iter"], "bits per byte": f"{float(last['val_bpb']):.4f}",
        "prepare.py": f"{clock[1] - clock[0]:.1f}", "train.py": f"{clock[2] - clock[1]:.1f}"}])

def benchmark(names):
    """The parts that are named; with no name all but prepare1gb, which BENCH_FULL=1 adds."""
    import importlib.metadata, tempfile
    if names[:1] == ["worker"]: return serve(*names[1:])
    parts = {"step": bench_step, "sample": bench_sample, "prepare": bench_prepare, "cold": bench_cold,
             "learn": bench_learn, "prepare1gb": lambda folder: bench_prepare(folder, 10 ** 9, 1)}
    cpu = re.findall("model name\t*: (.*)", subprocess.getoutput("cat /proc/cpuinfo"))[:1]
    print(torch.cuda.get_device_name() if GPU else "no GPU", *cpu, f"{os.cpu_count()} cores",
          f"python {sys.version.split()[0]}", f"torch {torch.__version__}",
          f"transformers {importlib.metadata.version('transformers')}; medians of {ROUNDS} turns", sep=", ")
    for name in names or list(parts)[:6 if "BENCH_FULL" in os.environ else 5]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # the usual one may hold what a kill left behind
            parts[name](Path(folder))

if __name__ == "__main__": benchmark(sys.argv[1:])
