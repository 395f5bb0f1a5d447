"""Text to token files: speed beside Hugging Face `tokenizers` alone, and memory as the text grows.

    python benchmarks/tokenizing.py [--large] [--save]

The text is generated: words in Zipf's proportions, a share of them new at every turn, as in text of people. The peer
gets the same pieces in the same order, sixteen at a time, and the ids of its answers as an array; `tokenize` also
writes, hashes and counts. --large adds 10 GB, which takes about half an hour on two cores.
"""

import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from measure import Report, arguments, peak_bytes

from sightline import encoding
from sightline.batches import tokenize
from sightline.corpora import PIECE, open_corpus
from sightline.encoding import cores
from sightline.tokenizers import Kind, Tokenizer

MB = 1_000_000
KINDS: tuple[Kind, ...] = ("bpe", "words", "characters")
VOCABULARY = {"bpe": 16_384, "words": 32_768, "characters": None}
NEW_WORDS = 0.01


def write_text(file: Path, size: int) -> None:
    """Lines of words until the file has `size` bytes: 50,000 of them by Zipf's law, and one in a hundred new."""
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    shares = 1 / np.arange(1, 27)

    def words(count):
        lengths = generator.integers(2, 12, count)
        flat = letters[generator.choice(26, lengths.sum(), p=shares / shares.sum())].tobytes().decode()
        ends = np.cumsum(lengths)
        return [flat[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]

    common = np.asarray(words(50_000), object)
    weights = 1 / np.arange(1, len(common) + 1)
    written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            drawn = common[generator.choice(len(common), 100_000, p=weights / weights.sum())]
            new = generator.random(len(drawn)) < NEW_WORDS
            drawn[new] = words(int(new.sum()))
            lines = [" ".join(drawn[start : start + 12]) + ".\n" for start in range(0, len(drawn), 12)]
            written += stream.write("".join(lines))


def peer_seconds(file: Path, tokenizer: Tokenizer, size: int) -> float:
    """`encode_batch` on the first `size` bytes, ids taken out as an array."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    pieces = list(islice(open_corpus(file).texts("train"), size // PIECE))
    began = time.perf_counter()
    for start in range(0, len(pieces), 16):
        for encoded in backend.encode_batch(pieces[start : start + 16], add_special_tokens=False):
            np.asarray(encoded.ids, dtype)
    return time.perf_counter() - began


def our_seconds(file: Path, tokenizer: Tokenizer) -> float:
    """Every byte of the file, hashed, tokenized, hashed again, written and opened."""
    corpus = open_corpus(file)
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        tokenize(corpus, tokenizer, cache)
        return time.perf_counter() - began


def trained(kind: Kind, file: Path) -> Tokenizer:
    texts = islice(open_corpus(file).texts("train"), 16 * MB // PIECE)
    return Tokenizer.train(kind, texts, VOCABULARY[kind])


def speed(report: Report, file: Path, size: int, peer_size: int, rounds: int) -> None:
    report.say(
        f"\n## Speed\n\nMB a second: `tokenize` on {size // MB} MB, {cores()} processes; `encode_batch` of the same "
        f"tokenizer on the first {peer_size / MB:.0f} MB, in the library's own threads. Medians of {rounds}, in turns."
    )
    report.table("kind", "tokenize", "tokenizers alone", "ratio")
    for kind in KINDS:
        tokenizer = trained(kind, file)
        ours, peers = [], []
        for _ in range(rounds):
            ours.append(our_seconds(file, tokenizer))
            peers.append(peer_seconds(file, tokenizer, peer_size))
        our_speed, peer_speed = size / MB / median(ours), peer_size / MB / median(peers)
        report.row(kind, f"{our_speed:.1f}", f"{peer_speed:.2f}", f"{our_speed / peer_speed:.1f}")


def measure(file: str, tokenizer: str) -> None:
    """In a process of its own: seconds, its memory before and at its peak, and the peak of its largest worker."""
    before, workers = peak_bytes(), [0]

    def close(worker, original=encoding._Worker.close):
        status = Path(f"/proc/{worker._process.pid}/status").read_text(encoding="utf-8")
        workers.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        original(worker)

    encoding._Worker.close = close
    seconds = our_seconds(Path(file), Tokenizer.load(tokenizer))
    print(seconds, before, peak_bytes(), max(workers))


def memory(report: Report, file: Path, sizes: list[int]) -> None:
    report.say(
        "\n## Memory\n\nPeak of the process (of which before any text: torch and the library), of its largest worker, "
        "and the time. Linux."
    )
    report.table("text", "kind", "peak", "before", "a worker", "seconds", "MB/s")
    for size in sizes:
        write_text(file, size)
        for kind in ("bpe", "words"):
            saved = file.with_name("tokenizer.json")
            trained(kind, file).save(saved)
            command = [sys.executable, __file__, "--measure", file, saved]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            seconds, before, peak, worker = float(out[0]), *map(int, out[1:])
            cells = (f"{peak / MB:.0f} MB", f"{before / MB:.0f} MB", f"{worker / MB:.0f} MB")
            report.row(f"{size // MB:,} MB", kind, *cells, f"{seconds:.0f}", f"{size / MB / seconds:.1f}")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--large", action="store_true", help="10 GB too")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    options = parser.parse_args()
    size = 10 * MB if options.quick else 100 * MB
    report = Report("Tokenizing")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        write_text(file, size)
        speed(report, file, size, size // 10, options.rounds)
        memory(report, file, [size, 10 * size, *([100 * size] if options.large else [])])
    if options.save:
        report.write("tokenizing")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
