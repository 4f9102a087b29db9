"""
Turn text into what train.py reads: a tokenizer, train.bin, val.bin (little-endian uint16 token ids) and meta.json.

$ python prepare.py                                         # input.txt, with a byte-level BPE trained on it
$ python prepare.py --input=my.txt                          # or a .jsonl with a "text" field, a folder, a URL
$ python prepare.py --input=a.txt,b.jsonl,folder            # several
$ python prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M  # a published tokenizer

Byte-order marks are dropped and Windows line ends become newlines; nothing else in the text is changed.
"""
import difflib, hashlib, itertools, json, os, re, shutil, signal, sys, tempfile, urllib.parse, urllib.request
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------- config
input = "input.txt"   # text file, .jsonl, folder (every file in it), URL, or several with commas between
tokenizer = "bpe"     # bpe (trained on the input), a tokenizer.json, a folder that holds one, or a hub id
vocab_size = 4096     # of the bpe tokenizer: 257 to 65536
val_fraction = 0.1    # the last part of the text, by bytes, is for validation: above 0, below 1
data_dir = "data"     # where the four files go

# ------------------------------------------------------------------------------------- errors and overrides, for all
def fail(message):
    """End the program with one line on stderr (one per machine under torchrun) and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def configure(config, argv):
    """Override a script's config block, given as its globals(), by --key=value arguments; --help prints the block."""
    source = Path(config["__file__"]).read_text("utf-8")
    block = re.search(r"^# -+ config\n(.*?)\n# ---", source, re.M | re.S)[1].strip()
    keys = re.findall(r"^(\w+) = ", block, re.M)
    for arg in argv:
        if arg in ("--help", "-h"):
            print(config["__doc__"].strip(), "Every option, its default and what it means:", block, sep="\n\n")
            sys.exit(0)
        key, equals, value = arg.removeprefix("--").partition("=")
        if key not in keys or not arg.startswith("--"):
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
            fail(f"unknown argument {arg}: did you mean --{near}=...? --help lists every option")
        kind = type(config[key])
        try:
            config[key] = {"true": True, "1": True, "false": False, "0": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            fail(f"{arg}: {key} takes {wanted}; write it as --{key}={config[key]}")
        if not equals:
            fail(f"{arg} has no value; write it as --{key}={config[key]}, with = and no spaces")


def check(config, allowed):
    """Refuse a global of a config block that is not in its (lowest, highest) or not one of its [words]."""
    for key, values in allowed.items():
        if isinstance(values, list) and config[key].lower() not in values:
            fail(f"--{key}={config[key]}: choose one of {', '.join(values)}")
        if isinstance(values, tuple) and not values[0] <= config[key] <= values[1]:
            fail(f"--{key}={config[key]}: must be from {values[0]} to {values[1]}")


# ------------------------------------------------------------------------------------------------------------- input
PIECE = 1 << 16      # characters read and tokenized at a time
BPE_BYTES = 1 << 26  # of text the BPE learns from, spread evenly over the input
EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # what tokenizers call the end-of-text token


def find_files(names, download_dir):
    """Paths of the files named by `names` (files, folders, URLs, with commas between); URLs go to download_dir."""
    files = []
    for name in [names] if Path(names).exists() else names.split(","):
        if name.startswith(("http://", "https://")):
            files.append(Path(download_dir, os.path.basename(urllib.parse.urlparse(name).path) or "download.txt"))
            try:
                with urllib.request.urlopen(name, timeout=60) as response, open(files[-1], "wb") as file:
                    shutil.copyfileobj(response, file)
            except (OSError, ValueError) as error:
                fail(f"cannot download {name}: {error}")
        elif Path(name).is_dir():
            files += sorted(p for p in Path(name).rglob("*") if p.is_file() and not p.name.startswith("."))
        elif Path(name).is_file():
            files.append(Path(name))
        else:
            fail(f"no text at {name}: give --input a file, a folder or a URL")
    return files


def read(files, size=PIECE):
    """Yield (text, ends_document): .jsonl files a document at a time, all others in pieces of about `size` characters."""
    for path in files:
        with open(path, encoding="utf-8-sig") as file:
            try:
                yield from read_jsonl(file) if path.suffix == ".jsonl" else read_text(file, size)
            except UnicodeDecodeError as error:
                at = file.buffer.tell() - len(error.object) + error.start
                fail(f"{path} is not UTF-8 text at byte {at:,}: convert it, as with iconv -f latin1 -t utf-8")


def read_jsonl(file):
    for number, line in enumerate(file, 1):
        try:
            text = json.loads(line)["text"]
            text.encode()  # a number has no encode, half a surrogate pair cannot
        except UnicodeDecodeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f'{file.name}, line {number}: not a JSON object with a "text" string')
        yield text, True


def read_text(file, size):
    """Pieces end after a line whose successor starts with a letter or sign: where no tokenizer's word, run of spaces
    or blank lines is split, so that the tokens are those of the whole text."""
    rest = ""
    while block := file.read(size):
        if "\0" in block:
            fail(f"{file.name} is not text: it holds zero bytes")
        rest += block
        safe = re.match(r".*\S\n(?=\S)", rest, re.S)  # greedy: the last such place
        if not safe and len(rest) > 64 * size:  # a very long line: cut it before a word, or anywhere
            safe = re.match(r".*\S(?= \S)|.*(?=.)", rest, re.S)
        if safe:
            yield rest[:safe.end()], False
            rest = rest[safe.end():]
    yield rest, True


# -------------------------------------------------------------------------------------------------- tokenizer, output
def get_tokenizer(name, vocab_size, pieces):
    """The tokenizers.Tokenizer that `name` means: a BPE trained on `pieces`, a file, a folder's, or a hub's."""
    if name == "bpe":
        result = Tokenizer(models.BPE())
        result.pre_tokenizer = pre_tokenizers.Sequence(  # as SmolLM2's: digits stand alone, all else by GPT-2's rule
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        result.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, seen or not: any text can be told
        result.train_from_iterator(pieces, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOT[0]], initial_alphabet=alphabet, show_progress=False))
        return result
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    try:  # the library raises plain Exceptions
        result = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"no tokenizer in {name} (a tokenizer.json, a folder with one, or a hub id): {str(error).splitlines()[0]}")
    result.no_truncation()
    result.no_padding()
    return result


def prepare(input, tokenizer, vocab_size, val_fraction, data_dir):
    """Write train.bin, val.bin, tokenizer.json and meta.json into data_dir, all or none, and print what was found."""
    if not 257 <= vocab_size <= 65536:
        fail(f"--vocab_size={vocab_size}: must be from 257 (256 bytes and the end of text) to 65536 (ids are uint16)")
    if not 0 < val_fraction < 1:
        fail(f"--val_fraction={val_fraction}: must be above 0 and below 1")
    data_dir = Path(data_dir).resolve()
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: fail(f"stopped; {data_dir} is as it was"))
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        for leftover in data_dir.parent.glob(f".{data_dir.name}-tmp-*"):  # of a preparation that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=f".{data_dir.name}-tmp-") as tmp:
            encode(find_files(input, tmp), tokenizer, vocab_size, val_fraction, Path(tmp))
            data_dir.mkdir(exist_ok=True)
            Path(data_dir, "meta.json").unlink(missing_ok=True)  # first out and last in: without it nothing is valid
            for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
                os.replace(Path(tmp, name), data_dir / name)
    except OSError as error:
        fail(f"cannot prepare {data_dir}: {error}")


def encode(files, tokenizer, vocab_size, val_fraction, out):
    """Tokenize `files` into the four files of the folder `out`, in memory that does not grow with the input."""
    total = sum(len(text.encode()) for text, _ in read(files))  # reads everything, so bad input ends here
    sample = (text for text, _ in itertools.islice(read(files), 0, None, 1 + total // BPE_BYTES))
    tok = get_tokenizer(tokenizer, vocab_size, sample)
    eot = next((tok.token_to_id(name) for name in EOT if tok.token_to_id(name) is not None), None)
    if eot is None:
        fail(f"the tokenizer {tokenizer} has no end-of-text token: it needs one of {', '.join(EOT)}")
    tokens = [tok.id_to_token(i) or "" for i in range(tok.get_vocab_size())]
    if len(tokens) > 65536:
        fail(f"the tokenizer {tokenizer} has {len(tokens):,} ids but uint16 holds 65,536: choose a smaller one")
    byte_level = json.loads(tok.to_str())["decoder"]["type"] == "ByteLevel"  # a character of a token is a byte of text
    width = np.array([len(token) for token in tokens])
    meta = {"vocab_size": len(tokens), "eos_token_id": eot, "tokenizer_sha256": fingerprint(tok)}
    end_of_text = np.array([eot], "<u2").tobytes()
    used, lost, done = np.zeros(len(tokens), bool), 0, 0
    pieces = read(files, min(PIECE, 1 + total // 1000))  # fine enough to split where val_fraction says
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for split, stop in ("train", (1 - val_fraction) * total), ("val", total):
            start, count = done, 1
            with open(out / f"{split}.bin", "wb") as file:
                file.write(end_of_text)  # so that the first token, too, is predicted from an end of text
                while done < stop:
                    batch = []
                    while done < stop and len(batch) < 4 * os.cpu_count():
                        batch.append(next(pieces))
                        done += len(batch[-1][0].encode())
                    texts = [text for text, _ in batch]
                    for (text, ends), encoding in zip(batch, tok.encode_batch_fast(texts, add_special_tokens=False)):
                        ids = np.array(encoding.ids, "<u2")
                        file.write(ids.tobytes() + end_of_text * ends)
                        count += len(ids) + ends
                        used[ids] = True
                        kept = width[ids].sum() if byte_level else len(tok.decode(ids, False).encode())
                        lost += len(text.encode()) - int(kept)
                    bar.update(done - bar.n)
            meta |= {f"{split}_tokens": count, f"{split}_bytes": done - start}
    if not meta["train_bytes"] * meta["val_bytes"]:
        fail(f"the text ({total:,} bytes) has no line or document to split at for validation: give it more lines")
    tok.save(str(out / "tokenizer.json"))
    Path(out, "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    ids = meta["train_tokens"] + meta["val_tokens"]
    print(f"{total:,} bytes of text in {len(files)} file(s): {ids:,} tokens, {total / ids:.2f} bytes per token, "
          f"{used.sum():,} of the vocabulary's {len(tokens):,} in use")
    print(f"train: {meta['train_tokens']:,} tokens, val: {meta['val_tokens']:,} tokens; it begins:")
    print(*("  | " + line[:100] for line in next(read(files))[0].splitlines()[:3]), sep="\n")
    if lost:
        print(f"warning: this tokenizer lost {lost:,} bytes of the text; --tokenizer=bpe loses none", file=sys.stderr)


def fingerprint(tok):
    """sha256 of a tokenizers.Tokenizer, or of the one in a file: the same however the file is laid out."""
    tok = Tokenizer.from_file(tok) if isinstance(tok, str) else tok
    return hashlib.sha256(tok.to_str().encode()).hexdigest()


if __name__ == "__main__":
    configure(globals(), sys.argv[1:])
    prepare(input, tokenizer, vocab_size, val_fraction, data_dir)
