"""
Turn text into what train.py reads: tokenizer.json, train.bin and val.bin (little-endian uint16 ids), and meta.json.

$ python prepare.py                                                         # input.txt, and a BPE of its first 90 %
$ python prepare.py --input=a.txt,b.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M
"""
import collections, contextlib, difflib, glob, hashlib, io, itertools, json, os, re, shutil, signal, sys, urllib.request
from pathlib import Path
import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, pre_tokenizers
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------- config
input = "input.txt"  # text, or .jsonl with a "text" field: a file, a folder, a URL, or several with commas between
tokenizer = "bpe"    # bpe (trained on the training split), a tokenizer.json, a folder that holds one, or a hub id
vocab_size = 2048    # 257 to 65536 ids, of the bpe tokenizer
val_fraction = 0.1   # 0.0001 to 0.9999 of the text's bytes, the last ones, are for validation
data_dir = "data"    # where the four files go
# ---------------------------------------------------------------------------------- options, for all three scripts
def fail(message):
    """End the program with exit status 1 and the message as one line on stderr (under torchrun, one per machine)."""
    sys.exit("error: " + " ".join(message.split()) if os.environ.get("LOCAL_RANK", "0") == "0" else 1)

@contextlib.contextmanager
def explained(problem):
    """Turn what goes wrong inside, of whatever kind, Ctrl-C too, into one line on stderr."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        fail(f"{problem} ({type(error).__name__}: {str(error)[:300]})")

def configure(config, argv):
    """Override a script's config block, given as its globals(), by --key=value arguments; --help prints the block. A
    comment that begins like "0 to 1" or "cosine | wsd" says what is allowed; other numbers must not be negative."""
    block = re.search(r"(?ms)^# -+ config\n(.*?)\n# ---", Path(config["__file__"]).read_text("utf-8"))[1]
    rules = dict(re.findall(r"(?m)^(\w+) = .*?  # (.*)", block))
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg in ("--help", "-h"): sys.exit(print(config["__doc__"].strip(), block, sep="\n\n"))  # with status 0
        if not equals or key not in rules or not arg.startswith("--"):
            near = difflib.get_close_matches(key, rules, n=1, cutoff=0)[0]
            fail(f"{'unknown option' if equals else 'no = in'} {arg}: did you mean --{near}=VALUE? See --help")
        kind = type(config[key])
        try:
            config[key] = ["false", "0", "true", "1"].index(value.lower()) > 1 if kind is bool else kind(value)
        except ValueError:
            fail(f"{arg}: {key} takes a value of type {kind.__name__}, as in --{key}={config[key]}")
    for key, rule in rules.items():
        words, ends = re.match(r"[\w.]+( \| [\w.]+)+", rule), re.match(r"(\S+) to ([\d.e]+)", rule) or (0, 0, 1e15)
        value = config[key] = config[key].lower() if words else config[key]
        if not (value in words[0].split(" | ") if words else
                isinstance(value, str) or float(ends[1]) <= value <= float(ends[2])):
            fail(f"--{key}={value} is not allowed: {rule}")

PIECE = 1 << 16  # characters tokenized at a time. Where CUT divides a text, its tokens are those of the whole:
CUT = re.compile(r".*\S\n(?=\w)|.{65536,}\S(?= \S)|.{262144,}", re.S)  # after a line, else a word, else anywhere
EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # what tokenizers call the end-of-text token

def find_files(names, downloads):
    """Yield the paths that `names` (files, folders, URLs, commas between) mean; URLs are saved in `downloads`."""
    for number, name in enumerate([names] if os.path.exists(names) else filter(None, names.split(","))):
        if name.startswith(("http://", "https://")):
            name, _ = urllib.request.urlretrieve(name, f"{downloads}/{number}-{os.path.basename(name.split('?')[0])}")
        yield from sorted(filter(os.path.isfile, glob.glob(f"{glob.escape(name)}/**", recursive=True))) or [name]

def read(files, size):
    """Yield (text, whether a document ends there), in pieces of about `size` characters, all line ends as newlines."""
    for path in files:
        with open(path, encoding="utf-8-sig") as file:
            if b"\0" in file.buffer.peek(): fail(f"{path} is not text: it holds zero bytes")
            try:
                for number, document in enumerate(file if path.endswith(".jsonl") else [file], 1):
                    if document is not file:  # but a line; encode() refuses what is no string or half a character
                        document = io.StringIO(json.loads(document)["text"].encode().decode())
                    rest = ""
                    while block := document.read(size):
                        rest += block
                        if piece := CUT.match(rest):
                            yield piece[0], False
                            rest = rest[piece.end():]
                    yield rest, True
            except UnicodeDecodeError as error:
                fail(f"{path}: byte {file.buffer.tell() - len(error.object) + error.start:,} is not UTF-8: convert it")
            except (ValueError, LookupError, TypeError, AttributeError):
                fail(f'{path}, line {number}: not a JSON object with a "text" string')

def get_tokenizer(name, vocab_size, texts):
    """The tokenizers.Tokenizer that `name` means: a BPE trained on the texts, a file's, a folder's, or a hub's."""
    if name == "bpe":  # as SmolLM2's, but with all 256 bytes, so that no text is lost
        tok = ByteLevelBPETokenizer()
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
        tok.train_from_iterator(texts, vocab_size, special_tokens=[EOT[0]], show_progress=False)
    else:
        path = f"{name}/tokenizer.json" if os.path.isdir(name) else name
        tok = Tokenizer.from_file(path) if os.path.isfile(path) else Tokenizer.from_pretrained(name)
    return Tokenizer.from_str(json.dumps(json.loads(tok.to_str()) | {"truncation": None, "padding": None}))

def fingerprint(path):
    """sha256 of the tokenizer in a tokenizer.json, the same however the file is laid out."""
    values = json.loads(Tokenizer.from_file(str(path)).to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

def encode(files, tokenizer, vocab_size, val_fraction, out):
    """Write the four files into the folder `out`, in memory that does not grow with the text; return a report."""
    total = sum(len(text.encode()) for text, _ in read(files, PIECE))  # reads everything, so bad input ends here
    seen, limit = 0, (1 - val_fraction) * total  # bytes; pieces that begin after `limit` of them are for validation
    texts = (t for t, _ in read(files, min(4096, 1 + total // 99)) if (seen := seen + len(t.encode())) <= limit)
    tok = get_tokenizer(tokenizer, vocab_size, itertools.islice(texts, 0, None, 1 + total // 2 ** 26))
    vocab, byte_level = tok.get_vocab(), isinstance(tok.decoder, decoders.ByteLevel)  # a letter is a byte
    eot, size = next((vocab[name] for name in EOT if name in vocab), None), 1 + max(vocab.values(), default=0)
    if eot is None or size > 65536:
        fail(f"{tokenizer} has {size:,} ids (uint16 holds 65,536), end of text {eot} (known are {', '.join(EOT)})")
    meta = collections.Counter(vocab_size=size, eos_token_id=eot, train_tokens=1, val_tokens=1)
    width, end = np.array([len(tok.id_to_token(i) or "") for i in range(size)]), eot.to_bytes(2, "little")
    used, kept, pieces = np.zeros(size, bool), 0, read(files, min(PIECE, 1 + total // 1000))  # small, for the split
    with open(out / "train.bin", "wb") as train, open(out / "val.bin", "wb") as val, \
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        while batch := list(itertools.islice(pieces, 64)):
            texts = [text for text, _ in batch]
            for (text, ends), encoding in zip(batch, tok.encode_batch_fast(texts, add_special_tokens=False)):
                split, file = ("train", train) if meta["train_bytes"] < limit else ("val", val)
                ids = np.array(encoding.ids, "<u2")
                file.write(end * (file.tell() == 0) + ids.tobytes() + end * ends)  # the first token follows one, too
                meta.update({f"{split}_tokens": len(ids) + ends, f"{split}_bytes": len(text.encode())})  # adds them
                used[ids] = True
                kept += width[ids].sum() if byte_level else len(tok.decode(encoding.ids, False).encode())
                bar.update(len(text.encode()))
    if not meta["val_bytes"]: fail(f"{', '.join(files[:3])}: {total:,} bytes have no line to split at: give more text")
    Path(out, "tokenizer.json").write_text(tok.to_str(pretty=True), "utf-8")
    meta["tokenizer_sha256"] = fingerprint(out / "tokenizer.json")
    Path(out, "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return (f"{total:,} bytes ({total - kept:,} lost by the tokenizer), {meta['train_tokens']:,} tokens to train on, "
            f"{meta['val_tokens']:,} for validation, {used.sum():,} of {size:,} different ones in use, "
            f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes each:\n{next(read(files, 300))[0][:300]}")

def prepare(input=input, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction, data_dir=data_dir):
    """Write train.bin, val.bin, tokenizer.json and meta.json into data_dir, all or none, and print what was found."""
    tmp = next(p for p in Path(data_dir, "_").absolute().parents if p.exists()) / f".{Path(data_dir).name}-tmp"
    with explained(f"cannot make {data_dir} of {input} with the tokenizer {tokenizer}"), contextlib.ExitStack() as end:
        end.callback(shutil.rmtree, tmp, ignore_errors=True)
        tmp.mkdir(exist_ok=True)  # there may be one, of a preparation that was killed
        print(encode(list(find_files(input, tmp)), tokenizer, vocab_size, val_fraction, tmp))
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        Path(data_dir, "meta.json").unlink(missing_ok=True)  # first out and last in: without it nothing is valid
        for name in "train.bin", "val.bin", "tokenizer.json", "meta.json": os.replace(tmp / name, Path(data_dir, name))

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    configure(globals(), sys.argv[1:])
    prepare(input, tokenizer, vocab_size, val_fraction, data_dir)
