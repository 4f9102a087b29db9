"""
$ pytest                  # the tests: minutes on two CPU cores, no network
$ python test_train.py    # the benchmark: all its parts, or those named, as in `test_train.py step`
"""
import csv
import fcntl
import functools
import gzip
import http.server
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as words

import prepare
import sample
import train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # Tiny Shakespeare and SmolLM2's tokenizer, where they are
TOY = ("--device=cpu --dtype=float32 --compile=False --n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=32 "
       "--intermediate_size=64 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 "
       "--optimizer=adamw --learning_rate=0.01 --beta2=0.95 --weight_decay=0.1 --max_iters=12 "
       "--eval_interval=4 --log_interval=1 --warmup_iters=2").split()

if __name__ == "test_train":  # a thread for each process: for a toy, more are slower
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


# --------------------------------------------------------------------------------- running the scripts
def default_signals(handle=signal.signal):  # the true one: `call` replaces it in this process
    """What a child process begins with: one in the background ignores Ctrl-C, under nohup SIGHUP."""
    handle(signal.SIGINT, signal.default_int_handler)
    handle(signal.SIGHUP, signal.SIG_DFL)


def start(script, *args, cwd, processes=0, **kwargs):
    """Start a script of this folder as a process of its own, or as several under torchrun."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
    command = [sys.executable, *(torchrun if processes else []), ROOT / script, *map(str, args)]
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": default_signals}
    return subprocess.Popen(command, cwd=cwd, text=True, **usual | kwargs)


def run(script, *args, cwd, status=0, **kwargs):
    """Run a script to its end, as in run("train.py", "--max_iters=3", cwd=folder); check its exit status."""
    process = start(script, *args, cwd=cwd, **kwargs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err + out
    return SimpleNamespace(stdout=out, stderr=err)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function like run(), but quicker: in this process, though with settings of its own."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # this process lives on, and with it the lock

    def call(script, *args, cwd=tmp_path):
        for name in ("train", "sample"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        for name in ("stdout", "stderr"):  # to be put back: a script wraps them
            monkeypatch.setattr(sys, name, getattr(sys, name))
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.chdir(cwd)
        prepare.WARNED.clear()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        return capsys.readouterr()
    return call


@pytest.fixture
def spy(monkeypatch):
    """A function that lets note(*args) hear of each call of a function, before it is made."""
    def spy(where, name, note):
        original = getattr(where, name)

        def noted(*args, **kwargs):
            note(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, noted)
    return spy


def refusal(call, *args, **kwargs):
    """The one line with which a script ends; Python prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/, of 60 kB of input.txt, and out/, a run of 12 iterations; not to be written to."""
    path = tmp_path_factory.mktemp("work")
    (path / "input.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:60_000], "utf-8")
    run("prepare.py", "--vocab_size=512", cwd=path)
    run("train.py", *TOY, cwd=path)
    return path


@pytest.fixture
def toy(work):
    return ["train.py", *TOY, f"--data_dir={work}/data"]


def log_rows(out):
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))


def column(out, name):
    """The numbers of a column of log.csv, where it has any."""
    return [float(row[name]) for row in log_rows(out) if row[name]]


def newest(out):
    return train.checkpoints(out)[-1]


def tokens_of(data, split):
    return np.fromfile(data / f"{split}.bin", "<u2").astype(np.int64)


# ------------------------------------------------------------------------------------ preparation
STORIES = [f"Story {i}:\na tale of {i * i} geese — and 鵝.\n" for i in range(40)]
PROSE = ("An old man said:\r\nstill 1234 geese...\n\n"
         "Два слова, 三个字。\n\n  naïve 👩‍👩‍👧 \t<tab>\nend") * 30


def prepared(folder):
    """(meta.json, ids of both splits, Tokenizer) of a folder; Data sees that its files agree."""
    data = prepare.Data(folder)
    ids = [tokens_of(folder, split).tolist() for split in ("train", "val")]
    assert sorted(os.listdir(folder)) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert ids[0][0] == ids[1][0] == data.eot
    return data.meta, ids, data.tokenizer


def texts_of(folder):
    """The documents of a folder, in order, those of both splits; one cut by the split is whole."""
    _, (train, val), tok = prepared(folder)
    *texts, rest = tok.decode(train[1:] + val[1:], skip_special_tokens=False).split(prepare.MARK)
    assert rest == ""
    return texts


def make(folder, text, **settings):
    """Prepare a text, or files that are there already, with a small BPE; the folder of the tokens."""
    if text is not None:
        (folder / "text.txt").write_text(text, "utf-8", newline="")
        settings["input"] = str(folder / "text.txt")
    prepare.prepare(**{"vocab_size": 300, "data_dir": str(folder / "data")} | settings)
    return folder / "data"


@pytest.mark.skipif(not SHARED.exists(), reason=f"there is no {SHARED}")
@pytest.mark.parametrize("piece", [prepare.PIECE, 301])
def test_tiny_shakespeare_is_341094_tokens_however_it_is_cut(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    path = SHARED / "tinyshakespeare.txt"
    data = make(tmp_path, None, input=str(path), tokenizer=str(SHARED / "smollm2"))
    meta, (train, val), tok = prepared(data)
    assert len(train[1:] + val[1:-1]) == 341_094 and val[-1] == meta["eos_token_id"]
    assert train[1:] + val[1:-1] == tok.encode(path.read_text()).ids


USUAL = {"special_tokens": ["<|endoftext|>", "<unk>"], "vocab_size": 600, "show_progress": False}
KINDS = [  # of each kind of tokenizer one that is hard to cut: model, normalizer, splitter, trainer
    (models.BPE(), None, words.ByteLevel(),
     trainers.BpeTrainer(initial_alphabet=words.ByteLevel.alphabet(), **USUAL)),
    (models.BPE(unk_token="<unk>"),
     normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None,
     trainers.BpeTrainer(max_token_length=9, **USUAL)),
    (models.Unigram(), normalizers.NFKC(), words.Metaspace(),
     trainers.UnigramTrainer(unk_token="<unk>", **USUAL)),
    (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(), words.BertPreTokenizer(),
     trainers.WordPieceTrainer(**USUAL)),
    (models.WordLevel(unk_token="<unk>"), normalizers.Sequence([normalizers.Strip(), normalizers.NFC()]),
     words.Whitespace(), trainers.WordLevelTrainer(**USUAL))]


@pytest.mark.parametrize("model, normalizer, splitter, trainer", KINDS)
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, model, normalizer, splitter, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(
        [PROSE, *STORIES, "ab ba  aab\n\n\tabba e\u0301é coco " * 50, "ACGTTAGACA ACGATTAG" * 90],
        trainer)
    rng = random.Random(0)
    hard = [("9" * 711 + "字" * 99 + "b" * 831 + "\n" * 213 + "字" * 369, 50), ("x" + "co" * 1501, 400)]
    cuts = 0
    for number in range(60):
        letters = "".join(map(chr, rng.choices(range(0xd800), k=20)))
        likely = [PROSE[:90], "ACGTTAGACA" * 9, " ", " " * 900, "\n\n", "e\u0301", "字" * 40, "a" * 333, "12 ",
                  letters, "".join(rng.choices("ab \n", k=60)), "e\u0301" * 90]
        text = "".join(rng.choice(likely) * rng.randint(1, 12) for _ in range(rng.randint(0, 15)))
        part = rng.randint(1, 3000)
        parts = [(text[i:i + part], False) for i in range(0, len(text), part)] + [("", True)]
        monkeypatch.setattr(prepare, "PIECE", rng.choice([5, 50, 400]))
        if number < len(hard):
            text, piece = hard[number]
            monkeypatch.setattr(prepare, "PIECE", piece)
            parts = [(text, True)]
        ids, seen = [], ""
        for context, string, ends in prepare.pieces(parts, tokenizer):
            known, whole = prepare.encode(tokenizer, [context, context + string])
            ids += whole[len(known):]
            seen += string
            cuts += not ends
        assert seen == text and ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert cuts > 50  # otherwise nothing was tested


UNITS = ["no line ends here ", "字", "ACGTTAGACATGCA", "  \t", "9", "- item {}\n",
         "def f_{}(x):\n    return x\n\n", "A paragraph, {}.\n\n", '"No," said {}.\n', "[{}] = 1\n",
         "    {}\n", "👩 {}\n", "\u200fשורה {}\n", "第{}行没有空格\n", "ประโยคที่ {} ไม่มีช่องว่าง\n", "{}\n"]


@pytest.mark.parametrize("unit", UNITS)
def test_the_split_is_at_a_line_within_one_percent_and_the_tokens_are_the_librarys(tmp_path, unit):
    """Train and validation are each tokenized as a whole; the first text is longer than three pieces."""
    for fraction, count in (0.1, 100_000 // len(unit)), (0.5, 2000), (0.02, 2000):
        text = "".join(unit.format(i) for i in range(count)) + "."
        meta, (train, val), tok = prepared(make(tmp_path, text, val_fraction=fraction))
        head = text.encode()[:meta["train_bytes"]].decode()
        assert meta["train_bytes"] + meta["val_bytes"] == len(text.encode())
        assert meta["val_bytes"] / len(text.encode()) == pytest.approx(fraction, abs=0.01)
        assert head.endswith("\n") or "\n" not in unit
        assert train[1:] == tok.encode(head).ids and val[1:-1] == tok.encode(text[len(head):]).ids


def test_the_split_prefers_documents_then_blank_lines_and_is_capped(tmp_path, monkeypatch):
    story = "One line\nof a story.\n\nAnother one.\n"
    for end, before in ("<|endoftext|>\n", "one.\n"), ("", "story.\n"):
        text = (story + end) * 400
        _, (train, _), tok = prepared(make(tmp_path, text))
        assert tok.decode(train[1:]).endswith(before)
    monkeypatch.setattr(prepare, "VAL_LIMIT", 1000)
    assert abs(prepared(make(tmp_path, text, val_fraction=0.5))[0]["val_bytes"] - 1000) < 100
    assert prepared(make(tmp_path, text, val_fraction=1e-9))[0]["val_bytes"] < 30
    for text in "ab", "é字", "a" * 30, "a\n", "字<|endoftext|>字<|endoftext|>":
        _, (train, val), _ = prepared(make(tmp_path, text, val_fraction=0.3))
        assert len(train) > 1 and len(val) > 1


def test_end_of_text_ends_a_document_and_the_bpe_sees_the_training_split_alone(tmp_path, monkeypatch):
    text = "<|endoftext|>\n".join(STORIES[:30]) + "<|endoftext|>" + STORIES[30] + "<|endoftext|>\n"
    for block in 7, 100, 2 ** 20:  # marks and characters that lie across the blocks' ends
        monkeypatch.setattr(prepare, "BLOCK", block)
        assert texts_of(make(tmp_path, text)) == STORIES[:31]
        meta = prepare.read_json(tmp_path / "data/meta.json")
        assert meta["train_bytes"] + meta["val_bytes"] == len("".join(STORIES[:31]).encode())
    data = make(tmp_path, "a word\n" * 900 + "qqqqqq\n" * 90)
    assert not any("qq" in token for token in prepared(data)[2].get_vocab())


def test_documents_and_prompts_are_framed_as_their_tokenizer_does_it(tmp_path):
    tok = prepare.train_bpe([("".join(STORIES), True)], 300)
    llama = new_model(vocab_size=301)
    assert sample.prompt_ids(tok, "", llama) == [0]
    tok.add_special_tokens(["<s>"])
    bos = tok.token_to_id("<s>")
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    tok.enable_truncation(2)  # this and the next must have no effect
    tok.enable_padding()
    tok.save(str(tmp_path / "t.json"))
    data = make(tmp_path, "<|endoftext|>".join(STORIES), tokenizer=str(tmp_path / "t.json"))
    _, (train, val), _ = prepared(data)
    tok = Tokenizer.from_file(str(data / "tokenizer.json"))
    want = [0]
    for story in STORIES:
        want += [bos, *tok.encode(story, add_special_tokens=False).ids, 0]
    assert train + val[1:] == want and tok.truncation is tok.padding is None
    for text in "", "a tale of geese":
        wanted = [bos, *tok.encode(text, add_special_tokens=False).ids]
        assert sample.prompt_ids(prepare.load_tokenizer(tmp_path / "t.json"), text, llama) == wanted


# ----------------------------------------------------------------------------- what is read
def lines(field="text", end="\n"):
    return end.join(json.dumps({"id": 1, field: story.replace("\n", "\r\n")}) for story in STORIES).encode()


FILES = {
    "a.txt": "<|endoftext|>\n".join(STORIES).encode(),
    " b, with: comma": b"\xef\xbb\xbf" + "<|endoftext|>".join(STORIES).replace("\n", "\r\n").encode(),
    "c.JSONL": lines(),
    "d.ndjson": lines(end="\r\n\n") + b"\n \n",
    "e.json": json.dumps([{"text": story} for story in STORIES], indent=1).encode(),
    "f.json": lines(),
    "f, marked.json": b"\xef\xbb\xbf\n [" + lines(end=", \n") + b"]",
    "g.jsonl.GZ": gzip.compress(lines()[:999]) + gzip.compress(lines()[999:]),
}


@pytest.mark.parametrize("name", [*FILES, "h.parquet", "i.jsonl.zst"])
def test_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if name == "h.parquet":
        arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
        table = arrow.table({"number": range(40), "text": STORIES, "url": ["no"] * 40})
        parquet.write_table(table, path, row_group_size=7)
    elif name == "i.jsonl.zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
        path.write_bytes(pack(lines()[:1000]) + pack(lines()[1000:]))  # two frames
    else:
        path.write_bytes(FILES[name])
    assert texts_of(make(tmp_path, None, input=str(path))) == STORIES


def test_names_folders_globs_and_another_field(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    for number, story in enumerate(STORIES[:6]):
        (home / ("deep" if number > 2 else "") / f"{number}.txt").write_text(story)
    (home / ".hidden.txt").write_text("no")
    (home / "picture.png").write_bytes(b"\x89PNG\0\0")
    (home / "table.csv").write_text("a,b\n")
    (home / "package.json").write_text('{"name": "no documents"}')
    (home / "other.jsonl").write_bytes(lines("body"))
    (home / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    for link, target in ("m", "deep"), ("deep/a", ""), ("deep/b", ""), ("z.txt", "0.txt"), ("no.txt", "no"):
        (home / link).symlink_to(home / target)
    monkeypatch.setenv("HOME", str(home))
    for names in "~", f"{home}/**/*[0-9n].txt", f"{home}/0.txt, ~/1.txt ,{home}/2.txt,{home}/deep/?.txt":
        assert texts_of(make(tmp_path, None, input=names)) == STORIES[:6]
        output = capsys.readouterr().out
        skipped = {"~": 5, f"{home}/**/*[0-9n].txt": 1}.get(names, 0)
        assert f"files, {skipped} skipped: not text" in output and ("latin.txt" in output) == (skipped > 0)
        assert "5.txt" in output  # which is validation
    (tmp_path / "links").mkdir()
    (tmp_path / "links/all").symlink_to(home)
    assert texts_of(make(tmp_path, None, input=f"{tmp_path}/links")) == STORIES[:6]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):  # not "not text"
        patch.setattr(prepare, "read", lambda *_: sys.exit("stopped"))
        make(tmp_path, None, input="~")
    (tmp_path / "c.jsonl").write_bytes(lines("body"))
    assert texts_of(make(tmp_path, None, input=f"{tmp_path}/c.jsonl", text_field="body")) == STORIES


def test_lines_of_a_document_are_kept_and_empty_documents_are_none(tmp_path):
    first, second = "\n\nThe first.\n" * 9, "\n the second" * 9 + "\n\n"
    records = [{"text": text} for text in (first, "", None, second)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, text in ("1.txt", first), ("2.txt", ""), ("3.txt", second):
        (tmp_path / name).write_text(text)
    for names in "a.jsonl", "1.txt,2.txt,3.txt":
        names = ",".join(f"{tmp_path}/{name}" for name in names.split(","))
        assert texts_of(make(tmp_path, None, input=names)) == [first, second]


def test_pipes_and_output_that_cannot_be_printed(tmp_path):
    (tmp_path / "a.txt").write_bytes(FILES["a.txt"])
    (tmp_path / "ñ.json").write_bytes(lines())
    for source in "- < <(cat a.txt)", "- < <(cat ñ.json)", "<(cat ñ.json)", "ñ.json > /dev/full", "ñ.json":
        command = f"exec {sys.executable} {ROOT}/prepare.py --vocab_size=300 --data_dir=mine --input={source}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert texts_of(tmp_path / "mine") == STORIES
        shutil.rmtree(tmp_path / "mine")
    assert done.stdout.endswith(b"next: python train.py --data_dir=mine\n")


def test_downloads(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):  # which follows a header with the length of the whole
            target.write(source.read()[:117] if "short" in self.path else source.read())

    (tmp_path / "é.jsonl").write_bytes(lines())
    (tmp_path / "short.txt").write_text("a" * 5000)
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert texts_of(make(tmp_path, None, input=f"{url}/é.jsonl?download=true")) == STORIES
        before = contents(tmp_path)
        for name, wrong in ("nothing.txt", "404"), ("short.txt", "117 out of 5000"):
            with pytest.raises(SystemExit, match=f"^error: .*{name}.*{wrong}.*$"):
                make(tmp_path, None, input=f"{url}/{name}")
        server.shutdown()
    assert contents(tmp_path) == before


def test_what_a_tokenizer_loses_is_reported(tmp_path, capsys):
    parts = json.loads(prepare.train_bpe([("abc abc", True)], 300).to_str())
    del parts["model"]["vocab"]["Ĕ"], parts["model"]["vocab"]["ñ"]  # how the bytes 14 and f1 are written
    (tmp_path / "t.json").write_text(json.dumps(parts))
    make(tmp_path, "abc \x14 abc \U00040000.\n" * 50, tokenizer=str(tmp_path / "t.json"))
    assert "100 bytes of the text are lost" in capsys.readouterr().out
    make(tmp_path, PROSE, tokenizer=str(tmp_path / "t.json"))
    assert "lost" not in capsys.readouterr().out


# ------------------------------------------------------------------- faults, bad input of preparation
TEXT = b"a line of text\n" * 50
BAD_TEXT = [  # what is in input.txt and a.jsonl, or the vocabulary of t.json; arguments; what is named
    (None, "--input=no.txt", "no.txt"), (None, "--input=input.txt,b.txt", "b.txt"),
    (None, "--input=*.csv", "csv"), (None, "--input=**.txt", r"\*\*.txt"),
    (TEXT, "--input=a.csv", "a.csv: .csv .* --text_field"),
    (b"", "", "0 bytes"), (b"", "--input=input.txt,input.txt", "0 bytes"),
    (b'{"text": ""}\n{"text": null}', "--input=a.jsonl", "0 bytes"), (b"x", "", "1 bytes"),
    (TEXT + b"\0", "", "input.txt is not text: it contains NUL"), ("a\nb".encode("utf-16"), "", "input.txt"),
    (TEXT * 9999 + b"caf\xe9", "", "byte 7,499,253 is not UTF-8"),
    (b"\xef\xbb\xbf" + TEXT + b"\xe9", "", "byte 753 "), (TEXT + b"\xe5\xad", "", "byte 750 "),
    (b'{"text": "a"}\n\n{"text": "b"\n', "--input=a.jsonl", "a.jsonl, line 3"),
    (b'{"text": "a"}\n{"body": "b"}\n', "--input=a.jsonl", "a.jsonl, line 2.*--text_field"),
    (b'{"text": 3}\n', "--input=a.jsonl", "a.jsonl, line 1"), (b'["text"]\n', "--input=a.jsonl", "line 1"),
    (b'{"text": "\\ud800"}', "--input=a.jsonl", "line 1"), (b'{"text": "\xe9"}', "--input=a.jsonl", "line 1"),
    (TEXT, "--input=a.json", "a.json, line 1"), (TEXT, "--input=a.gz", "a.gz .*gzip"),
    (TEXT, "--input=a.zst", "a.zst"), (TEXT, "--input=a.parquet", "a.parquet"),
    (None, "--tokenizer=input.txt", "tokenizer input.txt"), (None, "--input=hf://x/y", "hf://x/y"),
    (None, "--input=http://[", "http://."), (None, "--input=http://127.0.0.1:9/a.txt", "127.0.0.1:9"),
    (None, "--data_dir=input.txt", "input.txt is not a folder"),
    (None, "--data_dir=input.txt/data", "input.txt/data"), (None, "--input=.", "--data_dir"),
    (None, "--data_dir=full", "full holds notes.md"), (None, "--input=empty", "empty names no file"),
    (None, "--tokenizer=full --vocab_size=999", "--vocab_size"),
    ({"a": 0}, "--tokenizer=t.json", "end-of-text"), ({"</s>": 70_000}, "--tokenizer=t.json", "70,001 ids")]


@pytest.mark.parametrize("wrong, args, named", BAD_TEXT)
def test_bad_input_of_preparation_is_one_line_and_changes_nothing(call, tmp_path, wrong, args, named):
    spec = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": wrong, "unk_token": "a"}}
    (tmp_path / "t.json").write_text(json.dumps(spec, default=str))
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    for name in "input.txt a.jsonl a.json a.csv a.gz a.zst a.parquet".split():
        (tmp_path / name).write_bytes(wrong if isinstance(wrong, bytes) else TEXT)
    before = contents(tmp_path)
    assert re.search(named, refusal(call, "prepare.py", *args.split()))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
                         ids=lambda n: n.name)
@pytest.mark.parametrize("command, stage", [
    ("prepare.py --input=pipe", "reading"), ("prepare.py --vocab_size=260", "making"),
    ("prepare.py --vocab_size=260", "tokenizing"), ("train.py --device=cpu", "tokenizing")])
def test_a_preparation_that_is_stopped_changes_nothing(tmp_path, number, command, stage):
    data = make(tmp_path, PROSE)
    if command.startswith("train"):  # which prepares only what is not there
        shutil.rmtree(data)
    (tmp_path / "input.txt").write_text(PROSE * 4000)
    os.mkfifo(tmp_path / "pipe")  # to which nobody writes
    before = contents(tmp_path)
    process = start(*command.split(), cwd=tmp_path)
    while not process.stdout.readline().startswith(stage):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    if number == signal.SIGKILL:
        assert process.returncode == -9
        run("prepare.py", "--input=text.txt", "--vocab_size=260", cwd=tmp_path)  # despite what was left
        assert texts_of(data) == [PROSE.replace("\r\n", "\n")]
    else:
        assert process.returncode == 1 and err == "error: stopped: run the same command again\n"
        assert {path.name for path in set(after) - set(before)} <= {"out", "log.csv"}


def test_several_at_once_and_the_last_one_wins_whole(tmp_path):
    (tmp_path / "input.txt").write_text(PROSE * 3)
    sizes = [260, 270, 290, 310] * 2
    processes = [start("prepare.py", f"--vocab_size={size}", cwd=tmp_path) for size in sizes]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == ""
    assert prepared(tmp_path / "data")[0]["vocab_size"] in sizes
    assert texts_of(tmp_path / "data") == [(PROSE * 3).replace("\r\n", "\n")]
    assert {path.parts[0] for path in contents(tmp_path)} == {"input.txt", "data"}


# ---------------------------------------------------------------------------------------------- the model
def close(ours, theirs):
    """Equal within a hundred-thousandth of the largest value."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


CONFIG = dict(  # the toy's
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
    vocab_size=512, rope_theta=1e5, rms_norm_eps=1e-5, head_dim=8, tie_word_embeddings=True, eos_token_id=[0],
    max_position_embeddings=32, initializer_range=32 ** -0.5)


def new_model(seed=0, **changes):
    torch.manual_seed(seed)
    return train.Llama(SimpleNamespace(**CONFIG | changes))


def random_tokens(*shape, high=512):
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, changes", [
    ("float32", {}), ("bfloat16", {}), ("float16", {}), ("float32", {"num_key_value_heads": 4}),
    ("float32", {"tie_word_embeddings": False, "rms_norm_eps": 0.1, "rope_theta": 9.0, "eos_token_id": None}),
    ("float32", {"num_key_value_heads": 1, "head_dim": 16})], ids=str)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, dtype, changes):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    usual = CONFIG | {"max_position_embeddings": 2048, "initializer_range": 0.2, "bos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**usual | changes))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = train.load_model(tmp_path).eval()
    assert ours.config.rope_theta == changes.get("rope_theta", 1e5)
    assert ours.config.eos_token_id == ([] if "eos_token_id" in changes else [0])

    tokens = random_tokens(2, 2048)
    expected, logits = theirs(tokens).logits, ours(tokens)
    assert all(close(logits[:, place], expected[:, place]) for place in (slice(None), 0, 2047))
    taken = iter(tokens[:, 2040:].T[:, :, None])
    seen = []
    for _ in ours.generate(tokens[:, :2040], 8, lambda logits, _: seen.append(logits) or next(taken)):
        pass
    for place, cached in enumerate(seen, 2039):
        assert close(cached, expected[:, place])


def published_model(size, **changes):
    """A new Llama of a published shape."""
    values = {"norm_eps": 1e-5, "rope_theta": 1e5} | train.SIZES[size]
    shape = {theirs: values[ours] for ours, theirs in train.SHAPE.items()}
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    return new_model(**shape, head_dim=width // heads, initializer_range=width ** -0.5, **changes)


@torch.no_grad()
def test_published_shapes_and_new_weights():
    for size, count in ("1.7b", 1_711_376_384), ("360m", 361_821_120), ("135m", 134_515_008):
        with torch.device("cpu" if size == "135m" else "meta"):
            model = published_model(size)
        assert sum(p.numel() for p in model.parameters()) == count
    if SHARED.exists():
        published = prepare.read_json(SHARED / "smollm2/config.json")
        assert all(published[key] == getattr(model.config, key) for key in train.SHAPE.values())

    tokens = random_tokens(2, 33, high=49152)
    assert 10.8 < model.loss(tokens[:, :-1], tokens[:, 1:]).item() / 64 < 11.4  # it knows nothing
    layer = model.model.layers[1]
    small = {layer.mlp.down_proj, layer.self_attn.o_proj}
    for module in (layer.mlp.up_proj, layer.self_attn.q_proj, model.model.embed_tokens, *small):
        std = 1 / 24 / 60 ** 0.5 if module in small else 1 / 24
        assert module.weight.std().item() == pytest.approx(std, rel=0.02)
    assert (layer.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("rows, logits", [(40, 2 ** 25), (700, 2 ** 18), (700, 1)])  # in 1, 3 and 6 slices
def test_sliced_loss_equals_cross_entropy_in_float64(rows, logits, monkeypatch):
    monkeypatch.setattr(train, "LOGITS_AT_ONCE", logits)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (rows, 1000))
    targets = random_tokens(rows, high=1000)
    targets[5:9] = -1
    loss = train.SlicedLoss.apply(x, weight, targets, train.slice_loss)
    with torch.no_grad():  # as evaluation calls it
        plain = train.SlicedLoss.apply(x, weight, targets, train.slice_loss)

    exact = F.cross_entropy(x.double() @ weight.double().T, targets, ignore_index=-1, reduction="sum")
    assert close(loss.double(), exact) and close(plain.double(), exact)
    for ours, theirs in zip(*(torch.autograd.grad(3 * value, (x, weight)) for value in (loss, exact))):
        assert close(ours, theirs)


def test_muon_equals_that_of_torch():
    """Only nearly, since torch's works in bfloat16; the reference in float64 below is exact."""
    for shape in (24, 40), (40, 24), (32, 32):
        torch.manual_seed(0)
        ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        for optimizer in (train.Muon([{"params": ours}], {"lr": 1 / train.MUON_SCALE, "weight_decay": 0.1}),
                          torch.optim.Muon(theirs, 1.0, 0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")):
            torch.manual_seed(1)
            for _ in range(2):
                for p in optimizer.param_groups[0]["params"]:
                    p.grad = torch.randn(shape)
                optimizer.step()
        for one, other in zip(ours, theirs):
            assert (one - other).abs().max() < 0.02 * one.abs().max()


# ------------------------------------------------------------------------- optimizer, schedule, data order
def test_every_parameter_has_initial_values_and_an_optimizer(monkeypatch):
    model = new_model(tie_word_embeddings=False)
    groups = [group for optimizer in train.make_optimizers(model) for group in optimizer.param_groups]
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    model.extra = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="extra"):
        train.make_optimizers(model)
    monkeypatch.setattr(train.nn, "Dropout", lambda _: torch.nn.PReLU())
    with pytest.raises(ValueError, match="no initial values .*dropout.weight"):
        new_model()


@pytest.mark.parametrize("schedule, middle, late", [("cosine", 0.55, 0.1271), ("wsd", 1, 0.55)])
def test_schedule_corners(monkeypatch, schedule, middle, late):
    values = dict(schedule=schedule, learning_rate=1, min_lr=0.1, warmup_iters=10, lr_decay_iters=100)
    for key, value in values.items():
        monkeypatch.setattr(train, key, value)
    rates = [train.learning_rate_at(i) for i in range(130)]
    found = [rates[i] for i in (0, 9, 10, 55, 90)]
    assert found == pytest.approx([1 / 11, 10 / 11, 1, middle, late], abs=1e-4)
    assert rates[100:] == pytest.approx([0.1] * 30) and (np.diff(rates[10:]) <= 0).all()
    monkeypatch.setattr(train, "warmup_iters", 95)  # longer than the plateau of wsd: no jump
    assert abs(np.diff([train.learning_rate_at(i) for i in range(130)])).max() < 0.35


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_equals_a_reference_in_float64(toy, call, work, tmp_path, optimizer):
    """
    The reference: transformers' Llama in float64, AdamW and Muon by their formulas, and batches taken from
    train.bin by hand. So rates, clipping, betas, decay, data order and accumulation are as they should be.
    """
    from transformers import AutoModelForCausalLM
    call(*toy, f"--optimizer={optimizer}", *"--grad_clip=0.5 --max_iters=6 --lr_decay_iters=12".split())
    ids = tokens_of(work / "data", "train")
    first = new_model(seed=1337).double()  # as train.py draws it
    model = AutoModelForCausalLM.from_pretrained(newest(work / "out")).double()
    model.load_state_dict(first.state_dict() | {"lm_head.weight": first.head()})
    rng = np.random.default_rng((1337, 0))
    offset, order = rng.integers(32), rng.permutation(len(ids) // 32 - 1)
    state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    losses, norms = [], []
    for i in range(6):
        tokens = torch.from_numpy(np.stack([ids[offset + 32 * w:][:33] for w in order[8 * i:8 * i + 8]]))
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        losses.append(loss.item())
        norms.append(norm.item())
        rate = 0.01 * (i + 1) / 3 if i < 2 else 0.001 + 0.009 * (0.5 + 0.5 * math.cos(math.pi * (i - 2) / 10))
        for name, p in model.named_parameters():
            grad = p.grad * min(1, 0.5 / norm)
            one, two = state[name]
            if optimizer == "muon" and p.dim() == 2 and ".layers." in name:
                one.mul_(0.95).add_(0.05 * grad)
                x = 0.95 * one + 0.05 * grad  # Nesterov's momentum
                x = x / x.norm()
                for _ in range(5):  # Newton-Schulz
                    gram = x @ x.T
                    x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
                step, decay = 0.6 * rate * 0.2 * max(p.shape) ** 0.5 * x, 0.6 * rate * 0.1
            else:
                one.mul_(0.9).add_(0.1 * grad)
                two.mul_(0.95).add_(0.05 * grad ** 2)
                step = rate * (one / (1 - 0.9 ** (i + 1))) / ((two / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
                decay = rate * 0.1 if p.dim() == 2 else 0.0
            p.data.mul_(1 - decay).sub_(step)

    assert column(tmp_path / "out", "train_loss") == pytest.approx(losses, rel=1e-5)
    assert column(tmp_path / "out", "grad_norm") == pytest.approx(norms, rel=1e-4)
    saved = load_file(newest(tmp_path / "out") / "model.safetensors")
    for name, p in model.named_parameters():
        assert (saved[name] - p).abs().max() < 3e-5, name


def test_an_epoch_has_every_window_once(work):
    def sequences(first, count, seed=1):
        return prepare.Data(work / "data").training_batch(first, count, 32, seed)

    data = tokens_of(work / "data", "train")
    count = len(data) // 32 - 1
    inputs, targets = sequences(0, 3 * count)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    windows = [set(map(bytes, data[offset:][:32 * count].reshape(-1, 32))) for offset in range(32)]
    epochs = np.split(inputs, 3)
    offsets = {windows.index(set(map(bytes, rows))) for rows in epochs}
    assert len(offsets) > 1 and len(set(map(bytes, epochs))) == 3
    assert (sequences(17, 5)[0] == inputs[17:22]).all()
    assert not (sequences(0, 8, seed=2)[0] == inputs[:8]).all()


def test_a_resume_with_other_settings_skips_nothing_and_keeps_the_decay(toy, call, tmp_path, spy):
    seen = []
    spy(prepare.Data, "training_batch", lambda _, first, count, *__: seen.extend(range(first, first + count)))
    call(*toy, "--max_iters=6")
    output = call(*toy, "--max_iters=9", "--batch_size=3", "--gradient_accumulation_steps=1").out
    assert seen == list(range(6 * 8 + 3 * 3)) and "batch_size = 3 (was 4)" in output
    rates = column(tmp_path / "out", "lr")
    assert len(rates) == 9 and rates[6:] == pytest.approx([0.001] * 3) and rates[2] > 0.005
    output = call(*toy, "--max_iters=10", "--learning_rate=0.02").out
    assert "learning_rate = 0.02 (was 0.01)" in output and "min_lr = 0.002" in output
    assert column(tmp_path / "out", "lr")[-1] == pytest.approx(0.002)


# --------------------------------------------------------------------------- checkpoints, runs, restarts
def test_checkpoint_is_a_hugging_face_folder_and_validation_exact(toy, call, work, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    call(*toy, "--dropout=0.5")  # which must not touch the validation
    path = newest(tmp_path / "out")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (work / "input.txt").read_text("utf-8")[5000:5100]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == prepare.load_tokenizer(work / "data").encode(text).ids and tokenizer.decode(ids) == text
    prompt = torch.tensor([ids[:32]])
    assert close(train.load_model(path).eval()(prompt), theirs(prompt).logits)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.config.eos_token_id == 0

    tokens = torch.from_numpy(tokens_of(work / "data", "val"))
    total, count = 0.0, len(tokens) - 1
    for begin in range(0, count, 32):
        window = tokens[begin:begin + 33]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    found = {name: column(tmp_path / "out", name)[-1] for name in ("val_loss", "val_bpb", "val_perplexity")}
    size = prepare.read_json(work / "data" / "meta.json")["val_bytes"]
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["val_bpb"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)

    assert sorted(os.listdir(path)) == sorted("config.json generation_config.json model.safetensors run.json "
                                              "tokenizer.json tokenizer_config.json trainer.pt".split())
    record = prepare.read_json(path / "run.json")
    assert record["iteration"] == 12 and record["val_loss"] == found["val_loss"]
    assert record["settings"]["n_embd"] == 32 and record["settings"]["min_lr"] == pytest.approx(0.001)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    known = {*LlamaConfig().to_dict(), "rope_theta", "head_dim"}
    assert prepare.read_json(path / "config.json").keys() <= known


def assert_same_losses(out, other):
    for name in ("iter", "train_loss", "val_loss"):
        assert column(other, name) == pytest.approx(column(out, name), rel=1e-5), (other, name)


def result(out):
    """What a run has come to, to the last bit: log.csv without speed, the weights, the optimizers' state."""
    trainer = torch.load(newest(out) / "trainer.pt", weights_only=True)
    tensors, _ = torch.utils._pytree.tree_flatten(trainer["optimizers"])
    state = [t.numpy().tobytes() if torch.is_tensor(t) else t for t in tensors]
    rows = [{**row, "tokens_per_second": 0} for row in log_rows(out)]
    return rows, (newest(out) / "model.safetensors").read_bytes(), state, trainer["scaler"]


def wait_for_rows(process, out, count):
    """Wait until a process that has just been started has brought a new log.csv to `count` rows."""
    while not Path(out, "log.csv").exists() or len(log_rows(out)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("flag", ["--dropout=0.1", "--optimizer=muon", "--dtype=bfloat16", "--dtype=float16"])
def test_resume_is_bit_exact_and_16_bit_near_float32(toy, call, work, tmp_path, flag):
    args = (*toy, flag, "--eval_interval=5")
    call(*args, "--max_iters=12", "--out_dir=whole")
    call(*args, "--max_iters=5", "--lr_decay_iters=12", "--out_dir=parts")
    call(*args, "--max_iters=12", "--lr_decay_iters=12", "--out_dir=parts")
    assert result(tmp_path / "whole") == result(tmp_path / "parts")
    other = "--dtype=float32" if "16" in flag else "--dtype=float16"  # with a loss scale, without one
    assert "dtype = float" in call(*args, other, "--max_iters=13", "--out_dir=parts").out

    saved = load_file(newest(tmp_path / "whole") / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    if "16" in flag:
        for name, share in ("train_loss", 0.02), ("grad_norm", 0.2):
            exact, near = column(work / "out", name), column(tmp_path / "whole", name)
            assert near == pytest.approx(exact, rel=share) and near != exact


def test_newest_and_best_are_kept_and_the_best_is_sampled(call, work, tmp_path):
    (tmp_path / "input.txt").write_text((work / "input.txt").read_text("utf-8")[:9000], "utf-8")
    call("prepare.py", "--val_fraction=0.5", "--vocab_size=300")
    mine = [tmp_path / "out/tmp", tmp_path / "out/step-0000100-copy"]
    for folder in mine:
        folder.mkdir(parents=True)
    args = [*TOY, *"--max_iters=200 --optimizer=muon --learning_rate=0.03 --weight_decay=0".split()]
    call("train.py", *args, "--eval_interval=20")
    best = 20 + 20 * int(np.argmin(column(tmp_path / "out", "val_loss")[1:]))
    assert best < 200  # a small text is soon learned by heart
    output = call("train.py", *args).out
    assert "nothing left to do" in output and f"at iteration {best}" in output
    kept = train.checkpoints(tmp_path / "out")
    assert [int(path.name[5:]) for path in kept] == [best, 200]
    assert all(folder.exists() for folder in mine)
    for path in kept[0], kept[1], kept[1]:  # one without a loss is never the best; of several, the newest is
        assert train.find_model(tmp_path / "out") == path
        damage(path / "run.json", {"val_loss": None})


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the names of open files come from /proc")
def test_a_save_reaches_the_disk_before_it_is_renamed(toy, call, tmp_path, spy):
    events = []
    spy(os, "fsync", lambda number: events.append(Path(f"/proc/self/fd/{number}").readlink().name))
    spy(Path, "rename", lambda path, target: events.append(f"{path.name} -> {target.name}"))
    call(*toy, "--max_iters=2", "--eval_interval=2")
    at = events.index(".unfinished -> step-0000002")
    assert sorted(events[:at]) == sorted([*os.listdir(tmp_path / "out/step-0000002"), ".unfinished"])
    assert events[at + 1:at + 3] == ["step-0000002", "out"]


def test_how_the_work_is_split_changes_nothing(toy, call, tmp_path, spy):
    """Micro-batches, recomputed layers, 2 and 4 processes; then 10 more iterations in one process."""
    recomputed = []
    spy(torch.utils.checkpoint, "checkpoint", lambda layer, *_: recomputed.append(layer))
    args = (*toy, "--max_iters=50", "--eval_interval=25", "--lr_decay_iters=60")
    whole = ("--batch_size=8", "--gradient_accumulation_steps=1")
    small = ("--batch_size=2", "--gradient_accumulation_steps=4", "--gradient_checkpointing")
    call(*args, *whole, "--out_dir=a")
    assert not recomputed
    call(*args, *small, "--out_dir=b")
    assert len(recomputed) == 50 * 4 * 2  # iterations, micro-batches, layers
    run(*args, "--out_dir=c", cwd=tmp_path, processes=2)
    run(*args, "--out_dir=d", cwd=tmp_path, processes=4)
    for name in "abcd":
        call(*args, *(whole if name == "a" else ()), "--max_iters=60", f"--out_dir={name}")
        assert_same_losses(tmp_path / "a", tmp_path / name)
    assert len(column(tmp_path / "d", "iter")) == 61


def test_a_stop_ends_an_evaluation_and_is_told(work, monkeypatch, capsys):
    monkeypatch.setattr(train, "stop_signals", [0.0])
    machine = SimpleNamespace(world=1, hide_bar=True)
    assert train.evaluate(new_model(), prepare.Data(work / "data"), machine) is None
    train.say_goodbye(train.Run(3, rows={3: {"iter": 3, "val_loss": 1.0}}))  # it came in the last batch
    assert "stopped at 3 of 500, saved" in capsys.readouterr().out


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch.compile knows no pretended CPU")
def test_compiled_scripts_do_the_same_and_no_compiler_is_no_error(toy, call, work, tmp_path):
    args = (*toy, "--max_iters=4")
    call(*args, "--out_dir=plain")
    broken = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for name, env in ("broken", broken), ("compiled", {}):
        output = "".join(vars(run(*args, "--compile=True", f"--out_dir={name}", cwd=tmp_path,
                                  env=os.environ | env)).values())
        plain, losses = (column(tmp_path / out, "train_loss") for out in ("plain", name))
        assert losses == pytest.approx(plain, rel=1e-4) and "compiling" in output
        assert output.count("warning: compiling failed") == 1 or name == "compiled"
    args = "--device=cpu --dtype=float32 --temperature=0 --prompt=The --max_new_tokens=20".split()
    texts = [run("sample.py", *args, *more, cwd=work).stdout for more in ((), ("--compile",))]
    assert texts[0] == texts[1]
    if "compiling failed" in output:
        pytest.skip("torch.compile finds no C++ compiler here")


def test_fine_tuning_a_bfloat16_folder(toy, call, work, tmp_path):
    """The folder that comes out is of float32 and says so: transformers loads just what was trained."""
    from transformers import AutoModelForCausalLM
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(newest(work / "out")).to(torch.bfloat16).save_pretrained(source)
    shutil.copy(work / "data/tokenizer.json", source)
    args = ("train.py", "--device=cpu", f"--data_dir={work}/data", "--block_size=32")
    config = prepare.read_json(source / "config.json")
    for eos in None, [0, 3], 5:  # whatever the source's, the data's end of text counts
        (source / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
        output = call(*args, f"--init_from={source}", f"--out_dir={eos}", "--max_iters=3").out
        assert "adamw" in output and "0.0001" in output
        theirs = AutoModelForCausalLM.from_pretrained(newest(tmp_path / str(eos))).eval()
        assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == 0
    tokens = random_tokens(1, 32)
    assert close(train.load_model(newest(tmp_path / "5")).eval()(tokens), theirs(tokens).logits)
    assert "n_layer" in refusal(call, *args, f"--init_from={source}", "--out_dir=b", "--n_layer=3")
    again = (*args, "--out_dir=5", "--max_iters=4")
    for other in (), (f"--init_from={work}/out",):
        assert f"add --init_from={source}" in refusal(call, *again, *other)
    shutil.rmtree(source)  # which a run that has begun no longer needs
    output = call(*again, f"--init_from={source}").out
    assert "iterations 3 to 4" in output and "model      source, 2 layers" in output


# ---------------------------------------------------------------------------------- options and the machine
def test_import_does_nothing(tmp_path):
    code = ("import sys, prepare; assert 'torch' not in sys.modules; import sample, train; "
            "assert not train.torch.cuda.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code, "--inptu=no"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr, contents(tmp_path)) == (0, b"", b"", {})


def test_overrides(toy, call, tmp_path, work, monkeypatch):
    def check(words, **wanted):
        config = dict(vars(train))
        prepare.configure(config, words.split(), train.presets)
        found = {key: config[key] for key in wanted}
        assert repr(found) == repr(wanted)  # of the same types, too

    check("--learning_rate=1 --eval_only --wandb_log 0 --out_dir=a=b --max_iters 7 --deterministic TRUE",
          learning_rate=1.0, eval_only=True, wandb_log=False, out_dir="a=b", max_iters=7, deterministic=True)
    check("--data_dir=~/a", data_dir=f"{Path.home()}/a")
    assert "--out_dir" in refusal(call, "train.py", "--out_dir=\udce9")  # a byte that is not UTF-8
    (tmp_path / "few.py").write_text('"""note"""\nn_layer = 3  # few\nmin_lr = 1e-3\ncompile = "false"\n')
    check(f"{tmp_path}/few.py --size=135m --n_head=3", n_layer=3, n_head=3, n_embd=576, min_lr=0.001,
          compile="false")
    check(f"--deterministic {tmp_path}/few.py", deterministic=True, n_layer=3)
    for code in "import os\nn_layer = os.getpid()\n", "print(1)\n":
        (tmp_path / "bad.py").write_text(code)
        assert "bad.py" in refusal(call, "train.py", "bad.py")
    assert "did you mean --learning_rate?" in refusal(call, "train.py", "--learning_rte=1")
    assert "did you mean" not in refusal(call, "train.py", "--zzz=1")
    output = subprocess.check_output([sys.executable, "-OO", ROOT / "train.py", "--help"], text=True)
    assert re.search(r"\nlog_interval = \d+ +# iterations", output) and "python train.py" in output
    assert "overriding: max_iters = 12" in call(*toy, "--out_dir=new").out
    monkeypatch.setattr(train, "compile", False)  # as one would edit it
    train.check_settings()

    shutil.copytree(work / "out", tmp_path / "a=b")
    before = contents(tmp_path)
    output = call(*toy, "--eval_only", "--out_dir=a=b").out
    assert "bits per byte" in output and "nothing left" not in output and contents(tmp_path) == before
    assert "--eval_only" in refusal(call, *toy, "--eval_only=1", "--out_dir=c")


@pytest.mark.parametrize("variables", [
    "RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "WORLD_SIZE=", "RANK=1 WORLD_SIZE=1",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", "RANK=1 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=a"])
def test_stray_launcher_variables_mean_nothing(toy, call, tmp_path, monkeypatch, variables):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    call(*toy, "--max_iters=2")
    assert len(train.checkpoints(tmp_path / "out")) == 1
    assert refusal(call, *toy, "--max_iters=none").startswith("error: --max_iters=none")


def test_an_error_on_any_rank_is_one_line_with_its_rank(toy, tmp_path):
    for flags, wrong in (("--batch_size=1 --gradient_accumulation_steps=1", "2 processes cannot share"),
                         ("--data_dir=none", "run python prepare.py")):
        error = run(*toy, *flags.split(), cwd=tmp_path, processes=2, status=1).stderr
        found = re.findall("(?m)^error on rank [01]: .*", error)
        assert found and all(wrong in line for line in found)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/.unfinished").touch()  # now rank 0 cannot save
    for count in 12, 4:  # in the middle of a run, and at its end
        error = run(*toy, f"--max_iters={count}", cwd=tmp_path, processes=2, status=1).stderr
        assert "error on rank 0: cannot save" in error and "[rank1]" not in error


def test_what_the_platform_cannot_do_ends_no_run(toy, call, work, tmp_path, monkeypatch):
    """Flushing, drawing, locking; and a clock that stands still."""
    import matplotlib.figure

    def broken(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(fcntl, "flock", broken)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", None)
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    output = "".join(call(*toy))
    for what in "fsync", "drawing loss.png", "cannot be locked":
        assert len(re.findall(f"warning: .*{what}", output)) == 1
    assert output.count("warning") == 3
    assert_same_losses(work / "out", tmp_path / "out")


def test_output_that_cannot_be_shown_ends_no_run(toy, work, tmp_path):
    for name, env in ("a", {"PYTHONIOENCODING": "cp1252"}), ("b", {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        run(*toy, f"--out_dir={name}", cwd=tmp_path, env=os.environ | env)
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *toy[1:]])
    shutil.copytree(newest(work / "out"), tmp_path / "endless")
    damage(tmp_path / "endless/config.json", {"eos_token_id": None})
    sampling = shlex.join([sys.executable, str(ROOT / "sample.py"), "--model=endless", "--device=cpu"])
    for line in (f"{command} --out_dir=c 2>&1 | head -1", f"{command} --out_dir=d 2>&-",
                 f"{sampling} --prompt=The --max_new_tokens=100000000 | head -c 20",
                 f"{sampling} --help | head -1"):
        done = subprocess.run(["bash", "-c", f"({line}; echo ${{PIPESTATUS[0]}}) 2>&1"], cwd=tmp_path,
                              stdout=subprocess.PIPE, text=True, timeout=120)
        assert done.stdout.endswith("0\n") and "Traceback" not in done.stdout, (line, done)
    for name in "abcd":
        assert_same_losses(work / "out", tmp_path / name)


def test_weights_and_biases_continues_one_run(toy, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(call, *toy, "--wandb_log=1", "--out_dir=new")
    monkeypatch.delitem(sys.modules, "wandb")
    pytest.importorskip("wandb", reason="wandb is not installed")
    env = os.environ | {"WANDB_MODE": "offline"}
    for count in "3", "5":
        run(*toy, "--wandb_log=1", f"--max_iters={count}", cwd=tmp_path, env=env)
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    logged = b"".join(file.read_bytes() for file in files)
    assert all(value.encode() in logged for row in log_rows(tmp_path / "out") for value in row.values())
    assert len({file.parent.name.split("-")[-1] for file in files}) == 1


# ------------------------------------------------------------------------------------------ faults, bad input
def test_out_of_memory_halves_the_micro_batch(toy, call, work, tmp_path, spy):
    limit = 2

    def short_of_memory(embedding, tokens):
        if embedding.training and len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    spy(torch.nn.Embedding, "forward", short_of_memory)
    assert call(*toy).out.count("out of memory") == 1
    assert_same_losses(work / "out", tmp_path / "out")
    limit = 0
    assert "--block_size=32" in refusal(call, *toy, "--out_dir=new")


def test_what_is_not_finite_is_skipped_and_never_saved(toy, call, tmp_path, spy):
    updates = []

    def spoil(_, optimizer):
        updates.append(optimizer)
        if len(updates) in bad:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)

    spy(torch.amp.GradScaler, "unscale_", spoil)
    bad = (3, 4)
    assert call(*toy).out.count("skipped") == 2 and newest(tmp_path / "out").name == "step-0000012"
    bad = range(12 + 6, 99)
    assert "lower --learning_rate" in refusal(call, *toy, "--out_dir=new")
    assert newest(tmp_path / "new").name == "step-0000008"
    assert all(p.isfinite().all() for p in train.load_model(newest(tmp_path / "new")).parameters())
    bad = ()
    args = (*toy, "--eval_interval=1", "--learning_rate=1e15", "--warmup_iters=0", "--out_dir=wild")
    assert "5 iterations: lower --learning_rate" in refusal(call, *args)  # of weights that are finite still
    assert "not finite" in refusal(call, *toy, "--eval_interval=1", "--learning_rate=1e39", "--out_dir=inf")
    assert not train.checkpoints(tmp_path / "inf")


def test_a_full_disk_keeps_the_checkpoint_before(toy, call, tmp_path):
    call(*toy, "--max_iters=4", "--lr_decay_iters=12")
    before = contents(tmp_path / "out/step-0000004")
    error = run(*toy, cwd=tmp_path, status=1,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))).stderr
    assert "cannot save out/step-0000008" in error and "File too large" in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert contents(tmp_path / "out/step-0000004") == before and len(train.checkpoints(tmp_path / "out")) == 1
    call(*toy)
    assert column(tmp_path / "out", "iter")[-1] == 12 and not (tmp_path / "out/.unfinished").exists()


def test_a_programming_error_keeps_its_traceback(toy, call, work, monkeypatch):
    monkeypatch.setattr(F, "silu", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        call(*toy, f"--init_from={work}/out")


@pytest.mark.parametrize("processes, number", [(0, "SIGKILL"), (0, "SIGINT"), (0, "SIGHUP"), (2, "SIGTERM")])
def test_a_run_that_is_ended_goes_on_as_if_it_had_not(toy, call, tmp_path, processes, number):
    """All but a kill save at once, without a further evaluation; the next start makes up for it."""
    args, out = (*toy, "--eval_interval=1", "--lr_decay_iters=15", "--dropout=0.1"), tmp_path / "out"
    process = start(*args, "--max_iters=100000", cwd=tmp_path, processes=processes)
    wait_for_rows(process, out, 8)
    told = process.pid
    if processes:  # one of torchrun's two workers is told, and the other one has to agree
        told = int(subprocess.getoutput(f"pgrep -P {process.pid} -f train.py").split()[0])
    os.kill(told, getattr(signal, number))
    output, errors = process.communicate(timeout=60)
    iteration = int(newest(out).name[5:])
    if number != "SIGKILL":
        assert process.returncode == 0 and iteration >= 7, (output, errors)
        assert "Ctrl-C again quits at once" in output + errors
        assert f"stopped at {iteration} of 100,000, saved; the same command goes on" in output
        assert column(out, "iter") == list(range(iteration + 1))
        saved = prepare.read_json(newest(out) / "run.json")["val_loss"]  # none, unless just evaluated
        assert log_rows(out)[-1]["val_loss"] == ("" if saved is None else str(saved))

    until = f"--max_iters={iteration + 5}"
    assert f"iterations {iteration:,} to {iteration + 5:,}" in call(*args, until).out
    assert len(train.checkpoints(out)) <= 2
    call(*args, until, "--out_dir=whole")
    if processes:  # whose dropout differs
        assert column(tmp_path / "whole", "lr") == column(out, "lr")
    else:
        assert result(tmp_path / "whole") == result(out)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing lists the threads of a process")
def test_no_thread_of_the_process_group_is_left_at_the_end(toy, tmp_path):
    """One that lets go of a tensor while Python ends would abort the process, now and then."""
    (tmp_path / "noted.py").write_text(
        "import atexit, runpy\nfrom pathlib import Path\n"
        "threads = Path('/proc/self/task').glob\n"
        "atexit.register(lambda: print('left:', [file.read_text() for file in threads('*/comm')]))\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    output = run(tmp_path / "noted.py", *toy[1:], "--max_iters=2", cwd=tmp_path, processes=2,
                 env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert output.count("left:") == 2 and "gloo" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells how much memory is free")
def test_the_memory_of_a_step_is_compared_with_what_is_free(capsys):
    for parameters in 10 ** 6, 10 ** 13:
        train.report_memory(parameters, SimpleNamespace(micro_batch=4, world=1))
        output = capsys.readouterr().out
        assert "GB for a step" in output and ("warning: only" in output) == (parameters > 10 ** 6)


def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(toy, tmp_path):
    process = start(*toy, "--max_iters=100000", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "out", 2)
    assert "out is in use by another run" in run(*toy, cwd=tmp_path, status=1).stderr
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before it can end by itself
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_preparing_anew_leaves_a_running_training_alone_but_is_another_text(work, call, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    args = ("train.py", *TOY, "--max_iters=300", "--eval_interval=300")
    call(*args, "--out_dir=alone")
    process = start(*args, cwd=tmp_path)
    wait_for_rows(process, tmp_path / "out", 3)
    (tmp_path / "input.txt").write_text("another text\n" * 500)
    call("prepare.py", "--vocab_size=260")
    assert process.communicate(timeout=120) and process.returncode == 0
    assert_same_losses(tmp_path / "alone", tmp_path / "out")
    assert (newest(tmp_path / "out") / "tokenizer.json").read_bytes() == (
        newest(tmp_path / "alone") / "tokenizer.json").read_bytes()
    assert "a different tokenizer" in refusal(call, *args, "--max_iters=301")

    for folder in "named", "data":
        call("prepare.py", f"--tokenizer={work}/data", f"--data_dir={folder}")
    assert "data is not the text" in refusal(call, *args, "--max_iters=301")
    assert "data_dir = named (was data)" in call(*args, "--data_dir=named", "--max_iters=301").out
    damage(newest(tmp_path / "out") / "run.json", {"val_loss": 99.0})  # on this text there is no better one
    assert train.find_model(tmp_path / "out") == newest(tmp_path / "out")


def damage(path, change):
    """Cut or remove a file; put bytes into it, or values of JSON or tensors, where None takes one out."""
    if change == "remove":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    elif isinstance(change, bytes):
        path.write_bytes(change.ljust(path.stat().st_size, change[-1:]))
    elif path.suffix == ".json":
        path.write_text(json.dumps(prepare.read_json(path) | change))
    else:
        tensors = load_file(path) | change
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


BAD_TRAINING = [  # what train.py is told, what the line must name; a file of data/ or out/ and its damage
    ("--data_dir=typo --out_dir=new", "prepare.py --input=TEXT --data_dir=typo"),
    ("--block_size=64 --init_from=out --out_dir=new", "--block_size=64"),
    ("--size=135m --init_from=out --out_dir=new", "leave out --size"),
    ("--init_from=no/model --out_dir=new", "no/model"), ("--out_dir=input.txt", "input.txt"),
    ("--n_layer=3", "add --n_layer=2,"), ("--size=135m", "add --size=tiny,"),
    ("--optimizer=muon", "add --optimizer=adamw,"), ("--init_from=scratch", "another --out_dir"),
    ("", "meta.json", "meta.json", "remove"), ("", "meta.json", "meta.json", {"tokenizer_sha256": "0"}),
    ("", "meta.json", "train.bin", "cut"), ("--out_dir=new", "771", "val.bin", b"\3"),
    ("", "out/step-0000012", "trainer.pt", "cut"), ("", "trainer.pt", "trainer.pt", "remove"),
    ("", "trainer.pt", "trainer.pt", b"cos\nmkdir\n(S'pwned'\ntR."), ("", "run.json", "run.json", "cut"),
    ("", "older train.py", "run.json", "remove"), ("", "config.json", "config.json", "remove"),
    ("", "out/step-0000012", "config.json", "cut"), ("", "out/step-0000012", "model.safetensors", "cut"),
    *(("", name, "config.json", {name: value}) for name, value in (
        ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("hidden_size", "abc"),
        ("hidden_size", -4), ("rope_scaling", {"factor": 2.0}), ("rope_theta", []),
        ("num_hidden_layers", None), ("num_attention_heads", 0))),
    ("", "rope_type", "config.json", {"rope_parameters": {"rope_type": "yarn"}}),
    ("", "lm_head", "config.json", {"tie_word_embeddings": False}),
    ("", "bias", "model.safetensors", {"bias": torch.ones(3)}),
    ("", "model.norm", "model.safetensors", {"model.norm.weight": None}),
    ("", "model.norm", "model.safetensors", {"model.norm.weight": torch.ones(31)})]


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_of_training_is_explained(work, tmp_path, call, case):
    args, named, *damaged = case
    shutil.copytree(work, tmp_path / "w")
    if damaged:
        [path] = tmp_path.rglob(damaged[0])
        damage(path, damaged[1])
    before = contents(tmp_path)
    assert named in refusal(call, "train.py", *TOY, *args.split(), cwd=tmp_path / "w")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {"new", "log.csv"}


BAD_FLAGS = {
    "train.py": "size size=7b max_iters=1.5 max_iters=many max_iters=-5 max_iters=0 max_iters dropout=x "
                "dropout=1 dropout=nan batch_size=-1 batch_size=0 out_dir n_head=-2 n_head=3 n_kv_head=3 "
                "n_embd=36 vocab_size=100 seed=-1 seed=99999999999999999999 out_dir= min_lr=9 min_lr=-0.5 "
                "warmup_iters=13 optimizer=sgd eval_only=maybe compile=maybe dtype=int8 device=cuda:99 "
                "device=abacus block_size=20000 learning_rte=1 beta2=1.5 init_from=resume",
    "prepare.py": "inptu=a vocab_size=256 vocab_size=65537 val_fraction=0 val_fraction=1 val_fraction=nan "
                  "val_fraction=-1 val_fraction=x val_fraction= data_dir= text_field= input=",
    "sample.py": "temperature=-1 temperature=nan top_p=0 top_p=1.5 min_p=2 top_k=-1 num_samples=0 seed=-1 "
                 "seed=1e30 max_new_tokens=0 port=70000 dtype=int8 model=none prompt=FILE:no prompt tempatur"}


@pytest.mark.parametrize("script, flag", [(s, flag) for s in BAD_FLAGS for flag in BAD_FLAGS[s].split()])
def test_bad_flags_are_named(toy, work, call, script, flag, tmp_path):
    usual = {"train.py": toy[1:], "prepare.py": [], "sample.py": ["--device=cpu", f"--model={work}/out"]}
    assert flag.split("=")[0] in refusal(call, script, *usual[script], "--" + flag)
    assert {path.name for path in contents(tmp_path)} <= {"out", "log.csv"}


def test_the_commands_of_the_readme_work(call, work, tmp_path):
    """Every python command of the README that needs no network and no GPU, with the shape of a toy."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    shutil.copy(work / "input.txt", tmp_path / "my.txt")
    commands = re.findall(r"(?m)^python (\w+\.py [^#\n|&]*)", (ROOT / "README.md").read_text("utf-8"))
    commands = [line for line in commands if not re.search("http|Hugging|web|135m|1.7b|cuda|test_", line)]
    assert len(commands) >= 5
    for number, (script, *flags) in enumerate(map(shlex.split, commands)):
        if script == "train.py":
            flags = [f"--out_dir={number}", *flags, *TOY, "--max_iters=2"]
        call(script, *flags)


# -------------------------------------------------------------------------------------------------- sampling
VALUES = prepare.settings_of(vars(sample)) | {"max_new_tokens": 20, "temperature": 0.0}


def picked(llama, tokens, **changes):
    """The ids (B, max_new_tokens) that Llama.generate adds to tokens (B, T)."""
    values = VALUES | changes
    new = llama.generate(tokens, values["max_new_tokens"], sample.chooser(values, "cpu"))
    return torch.cat(list(new), 1)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_transformers(work, penalty):
    from transformers import AutoModelForCausalLM
    folder, tokens = train.find_model(work / "out"), random_tokens(3, 10)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        tokens, max_new_tokens=20, do_sample=False, eos_token_id=None, repetition_penalty=penalty)
    llama = train.load_model(folder).eval()
    for temperature in 0.0, 1e-46:
        ours = picked(llama, tokens, repetition_penalty=penalty, temperature=temperature)
        assert torch.equal(ours, theirs[:, 10:])


def test_past_the_context_its_last_half_is_kept():
    llama = new_model(initializer_range=0.5).eval()  # large weights: each next token depends on all before
    tokens = random_tokens(2, 10)
    ids = torch.cat((tokens, picked(llama, tokens, max_new_tokens=60)), 1)
    start = 0
    for end in range(10, 70):  # the context is 32 positions
        if end - start > 32:
            start = end - 16
        assert torch.equal(llama(ids[:, start:end])[:, -1].argmax(1), ids[:, end])
    before = torch.get_rng_state()
    one, two = (picked(llama, tokens[[0, 0]], temperature=1.0, max_new_tokens=50) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(before, torch.get_rng_state())  # the random numbers are its own


def test_filters_equal_transformers(monkeypatch):
    """Each filter after those before it."""
    import transformers.generation as g
    monkeypatch.setattr(torch, "multinomial", lambda probs, *_, **__: probs)
    logits = 3 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(8, 6, high=50)
    values, expected = VALUES | {"temperature": 1.0}, logits
    for name, kind, value in (("repetition_penalty", g.RepetitionPenaltyLogitsProcessor, 1.7),
                              ("temperature", g.TemperatureLogitsWarper, 0.7),
                              ("top_k", g.TopKLogitsWarper, 8), ("top_p", g.TopPLogitsWarper, 0.8),
                              ("min_p", g.MinPLogitsWarper, 0.2)):
        values[name] = value
        before, expected = expected, kind(value)(tokens, expected)
        assert not torch.equal(before, expected)
        ours = sample.chooser(values, "cpu")(logits, tokens)
        torch.testing.assert_close(ours / ours.sum(1, keepdim=True), expected.softmax(1))


def test_stream_gives_whole_characters_and_ends_each_sample(work, monkeypatch):
    tokenizer = prepare.load_tokenizer(work / "data")
    llama = train.load_model(newest(work / "out"))
    text, [end] = "Zoë 日本 👍🏽!", llama.config.eos_token_id
    ids = tokenizer.encode(text).ids
    rows = torch.tensor([ids[:4] + [end] + ids[5:], ids])
    monkeypatch.setattr(llama, "generate", lambda *_, **__: iter(rows.T[:, :, None]))
    steps = [texts.copy() for texts, _ in sample.stream(llama, tokenizer, [end], VALUES | {"num_samples": 2})]
    first, second = zip(*steps)
    assert second[-1] == text and not any("\ufffd" in part for part in second)
    assert first[0] and first[3] == first[-1]


def test_command_line(work, call, tmp_path):
    (tmp_path / "prompt.txt").write_text("The")
    args = ["sample.py", "--device=cpu", "--max_new_tokens=50", f"--prompt=FILE:{tmp_path}/prompt.txt"]
    first = run(*args, "--num_samples=3", cwd=work)
    assert first.stdout == call(*args, "--num_samples=3", cwd=work).out
    assert first.stdout != call(*args, "--num_samples=3", "--seed=7", cwd=work).out
    samples = first.stdout.split("\n" + "-" * 20 + "\n")
    assert len(samples) == 3 and all(text.startswith("The") for text in samples)
    assert "tokens/s" in first.stderr
    assert "context" in refusal(call, *args[:3], "--prompt=" + "word " * 99, cwd=work)
    assert "python train.py first" in refusal(call, "sample.py", cwd=tmp_path)
    endless = shutil.copytree(newest(work / "out"), tmp_path / "endless")
    damage(endless / "config.json", {"eos_token_id": None})
    process = start(*args[:2], "--prompt=Hello", "--max_new_tokens=99999999", "--model=endless", cwd=tmp_path)
    assert process.stdout.read(6)
    process.send_signal(signal.SIGINT)  # the text so far is left
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and rest.endswith("\n") and "Traceback" not in errors

    # an old checkpoint, and no prompt
    shutil.copytree(work / "out", tmp_path / "out")
    (newest(tmp_path / "out") / "run.json").unlink()
    damage(newest(tmp_path / "out") / "config.json", {"val_loss": 1.0})
    assert call(*args[:3]).out.strip()


# ------------------------------------------------------------------------------------------------------ page
@pytest.fixture(scope="session")
def page(work, tmp_path_factory):
    """The address of a page whose model never ends a text by itself."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(work / "out", folder / "out")
    damage(newest(folder / "out") / "config.json", {"eos_token_id": None})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start("sample.py", "--web=true", f"--port={port}", "--max_new_tokens=2000", cwd=folder)
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert server.poll() is None
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    assert server.poll() is None  # no request has ended it
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 130 and "Traceback" not in errors


def test_page_serves_two_at_once_and_survives_bad_input(page):
    from gradio_client import Client
    one, two = Client(page, verbose=False), Client(page, verbose=False)
    rest = (50, 0.8, 1, 0, 0, 1)
    jobs = [client.submit(text, 1, *rest, api_name="/write")
            for client, text in ((one, "First"), (two, "Second"), (one, "First"))]
    first, second, third = (job.result(timeout=120)[0] for job in jobs)
    assert first == third and first.startswith("First")
    assert second.startswith("Second") and "First" not in second
    fourth, status = one.predict("First", -1, *rest, api_name="/write")
    assert fourth != first and re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, seed \d+", status)
    with pytest.raises(Exception, match="shorten it"):
        one.predict("word " * 99, 1, *rest, api_name="/write")


def test_page_in_a_browser(page, tmp_path):
    """Type, generate, see it grow, stop, meet an error and recover; no sideways scrolling on a phone."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.support.ui import WebDriverWait
    options, driver = webdriver.ChromeOptions(), shutil.which("chromedriver")
    options.binary_location = shutil.which("chromium") or ""
    if not driver or not options.binary_location:
        pytest.skip("Chromium and its driver are not installed")
    for flag in f"headless no-sandbox disable-background-networking user-data-dir={tmp_path}".split():
        options.add_argument("--" + flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        browser.implicitly_wait(60)
        wait = WebDriverWait(browser, 60, poll_frequency=0.1)

        def find(what):
            return browser.find_element("xpath", f"//{what}")

        def generate(prompt):
            find("textarea").send_keys("\ue009a\ue000" + prompt)  # over all that is there
            find("button[normalize-space()='Generate']").click()

        def text():
            return browser.execute_script("return document.querySelectorAll('textarea')[1].value")

        for width, height in (1280, 900), (390, 844):
            browser.set_window_size(width, height)
            browser.get(page)
            find("button[normalize-space()='Generate']")  # with it, the rest is there
            generate("Hello")
            seen = {"Hello"}
            wait.until(lambda _: seen.add(text()) or len(seen) > 3)  # it grows
            find("button[normalize-space()='Stop']").click()
            time.sleep(1)
            stopped = text()
            time.sleep(1)
            assert stopped.startswith("Hello") and text() == stopped
            generate("word " * 99)
            find("*[contains(text(), 'shorten it')]")
            assert text() == stopped
            generate("Again")
            wait.until(lambda _: text().startswith("Again"))
            find("button[normalize-space()='Stop']").click()
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


# ------------------------------------------------------------------------------------------------- benchmark
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 5))  # timed turns of each side; the tables show their medians
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION = getattr(torch, train.best_dtype(DEVICE))  # as train.py chooses for 135m
PLAY = SHARED / "tinyshakespeare.txt" if SHARED.exists() else ROOT / "input.txt"
NEW = 128  # tokens to sample


def turn(make, *args):
    """In a process of its own: (seconds, peak MB, result) of one more step of what make(*args) once began."""
    sys.stdout = sys.stderr  # of train.py and prepare.py; stdout is for the tables
    torch.set_float32_matmul_precision("high")  # as train.py has it
    steps, results = make(*args), []
    times = timeit.repeat(lambda: results.append(next(steps)), number=1, repeat=10 if GPU else 1)
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    if GPU:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()  # room for the others
    return np.median(times), peak / 1e6, results[-1]


def compare(title, sides, amount, unit, rounds=ROUNDS):
    """Let sides, {name: (make, *args)}, take turns of so many units; print a table of their medians."""
    pools = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in sides}
    turns = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            turns[name].append(pools[name].submit(turn, *side).result())
            print(f"turn {number}: {name} {turns[name][-1][0]:.3f} s", file=sys.stderr)

    print(f"\n{title}\n\n| | s | {unit}/s | peak MB | result |\n|---|---|---|---|---|")
    for name in sides:
        pools[name].shutdown()
        times = [seconds for seconds, _, _ in turns[name]]
        seconds = np.median(times[1:] or times)  # the first turn warms up
        _, peak, result = turns[name][-1]
        print(f"| {name} | {seconds:.3f} | {amount / seconds:,.2f} | {peak:,.0f} | {result} |")


def build(who, dtype, positions):
    """SmolLM2-135M, of train.py or of transformers, with the same random weights."""
    model = published_model("135m", max_position_embeddings=positions)
    if who == "ours":
        return model.to(DEVICE, dtype)
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(**vars(model.config) | {"eos_token_id": None})
    theirs = AutoModelForCausalLM.from_config(config, dtype=dtype)  # with rotations in float32
    theirs.load_state_dict(model.state_dict() | {"lm_head.weight": model.head()})
    return theirs.to(DEVICE)


@functools.cache  # begun once in each process, as those below
def training(who, mode, batch, length):
    """Train 135m, an iteration a step; yield the losses."""
    train.keep_freed_memory()  # for both sides
    model = build(who, torch.float32, length).train()
    x, y = random_tokens(2, batch, length, high=49152).to(DEVICE)
    if mode == "compiled" and who == "ours":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        model.loss_of_slice = torch.compile(train.slice_loss, dynamic=False)
    elif mode == "compiled":
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    while True:
        with torch.autocast(DEVICE.type, PRECISION, enabled=PRECISION != torch.float32):
            if who == "ours":
                loss = model.loss(x, y) / y.numel()
            else:
                loss = model(x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield round(loss.item(), 4)  # which waits for a GPU


@functools.cache
def products(batch, length):
    """Compute the matrix products of that iteration alone, forward and twice backward."""
    weights = [p.detach() for p in build("ours", PRECISION, 1).parameters() if p.dim() == 2]
    values = {n: torch.randn(batch * length, n, dtype=PRECISION, device=DEVICE)
              for weight in weights for n in weight.shape}
    while True:
        for weight in weights:
            y, x = (values[n] for n in weight.shape)
            torch.mm(x, weight.t())
            torch.mm(y, weight)
            last = torch.mm(y.t(), x)
        last[0, 0].item()  # waits for a GPU
        yield ""


@functools.cache
def sampling(who, mode, dtype, batch):
    """Sample NEW tokens after each of `batch` prompts of 128, greedily; yield the sum of their ids."""
    model = build(who, getattr(torch, dtype), 2048).eval()
    prompts = random_tokens(batch, 128, high=49152).to(DEVICE)
    if mode == "compiled":
        model.decode = torch.compile(model.decode, mode="reduce-overhead" if GPU else None)
    while True:
        if who == "ours":
            tokens = picked(model, prompts, max_new_tokens=NEW)
        else:
            tokens = model.generate(prompts, max_new_tokens=NEW, do_sample=False)[:, 128:]
        yield tokens.sum().item()


@functools.cache
def preparing(who, text):
    """Prepare a text with SmolLM2's tokenizer; theirs only encodes it."""
    tokenizer = str(SHARED / "smollm2") if SHARED.exists() else "HuggingFaceTB/SmolLM2-135M"
    coder = prepare.load_tokenizer(tokenizer)
    while True:
        if who == "ours":
            prepare.prepare(str(text), tokenizer, data_dir=f"{text}-data")
        else:
            with open(text, encoding="utf-8") as file:
                while block := file.read(2 ** 24):
                    pieces = [block[i:i + 2 ** 16] for i in range(0, len(block), 2 ** 16)]
                    coder.encode_batch(pieces, add_special_tokens=False)
        yield ""


def benchmark(parts, folder):
    cpu = re.findall("model name\t*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    print(torch.cuda.get_device_name() if GPU else "no GPU", *cpu, f"{os.cpu_count()} cores",
          f"python {sys.version.split()[0]}", *versions, f"medians of {ROUNDS} turns", sep=", ")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # the usual one may be damaged

    if "step" in parts:
        batch, length = (16, 1024) if GPU else (4, 256)
        sides = {f"{who} {mode}": (training, who, mode, batch, length)
                 for mode in ("compiled", "eager") for who in ("ours", "theirs")}
        sides["the products alone"] = (products, batch, length)
        compare(f"Training step, 135m, {batch} x {length} tokens, {PRECISION}; theirs: transformers; result: "
                "the loss", sides, batch * length, "tokens")
    if "sample" in parts:
        for dtype in ("bfloat16",) if GPU else ("bfloat16", "float32"):
            for batch, modes in (1, ("eager", "compiled")), (8, ("eager",)):
                sides = {f"ours {mode}": (sampling, "ours", mode, dtype, batch) for mode in modes}
                sides["theirs"] = (sampling, "theirs", "eager", dtype, batch)
                compare(f"Sampling, 135m, {dtype} x {batch}, prompt of 128, {NEW} new tokens, greedy; "
                        "theirs: generate of transformers; result: sum of ids", sides, batch * NEW, "tokens")
    for part, size, rounds in ("prepare", 10 ** 8, ROUNDS), ("prepare1gb", 10 ** 9, 0):
        if part in parts:
            text = folder / "text.txt"
            size = text.write_bytes(PLAY.read_bytes() * round(size / PLAY.stat().st_size))
            sides = {who: (preparing, who, text) for who in ("ours", "theirs")}
            compare(f"Preparing {size / 1e6:,.0f} MB; theirs: encode_batch on pieces of 64 kB; peak MB: with "
                    "torch, which is loaded", sides, size / 1e6, "MB", rounds)
    if "learn" in parts:
        times = []
        for script, *flags in ("prepare.py", f"--input={PLAY}"), ("train.py",):
            began = time.perf_counter()
            subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, check=True, stdout=sys.stderr)
            times.append(f"{script} {time.perf_counter() - began:.1f} s")
        bits = column(folder / "out", "val_bpb")[-1]
        print(f"\nThe default run on {PLAY.name}: {bits:.4f} bits per byte;", *times)
    if "nanogpt" in parts:  # its recipe for a CPU, a letter a token
        home = Path(os.environ["NANOGPT"])
        recipe = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
                  "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
                  "--lr_decay_iters=2000 --dropout=0.0").split()
        shutil.copy(PLAY, home / "data/shakespeare_char/input.txt")
        subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=home, check=True)
        began = time.perf_counter()
        output = subprocess.check_output([sys.executable, *recipe], cwd=home, text=True)
        bits = float(re.findall("val loss ([0-9.]+)", output)[-1]) / math.log(2)
        print(f"\nnanoGPT: {bits:.4f} bits per byte; train.py {time.perf_counter() - began:.1f} s")
    if "llama" in parts:  # llama.cpp, on what its converter made of a checkpoint; the shell knows both names
        print(subprocess.getoutput(f"${{LLAMA_BENCH:?a program}} -m ${{GGUF:?a model}} -p 0 -n {NEW} -t 2"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        benchmark(sys.argv[1:] or ["step", "sample", "prepare", "learn", "llama"], Path(home))
