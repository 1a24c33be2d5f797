"""Mutates tables, configs and sound files at random: no traceback, no hang, whatever comes.

python tests/fuzz_data.py 10000             # mutations; about ten minutes on two cores
"""

import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import prepare  # noqa: E402
from orpheus.clips import read_clips  # noqa: E402
from orpheus.models import load_tokenizer  # noqa: E402
from orpheus.settings import UserError, read_settings  # noqa: E402

TABLE = 'file_name,text,speaker\na.wav,"one, two",x\nb.flac,three,y\nc.ogg,"four\nfive",x\n'
BARS = 'a|1 "one|one "one\nb.flac|two, three|two, three\n'
TABS = "Path\tSentence\na.wav\tone\nb.flac\ttwo\n"
ROWS = [{"file_name": "a.wav", "text": "one"}, {"audio": "b.flac", "text": None, "voice": 3}]
BITS = [
    '"',
    ",",
    "\n",
    "\r\n",
    "\0",
    "|",
    "\ufeff",
    "../",
    "/",
    "\\",
    "é",
    "\u202e",
    "null",
    "[" * 99,
]
BITS += ["1e999", "-1", "NaN", "{", "}", "'", "\ud83d", "a" * 3000, "input_ids", "codes", "true"]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to six changes: bytes flipped, cut, doubled, or one of BITS put in."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(4):
            case 0 if data:
                data[place % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[place : place + draw.randint(1, 40)]
            case 2:
                data[place:place] = data[place : place + draw.randint(1, 40)]
            case _:
                data[place:place] = draw.choice(BITS).encode(errors="surrogatepass")
    return bytes(data)


def make_seeds(home: Path) -> dict[str, bytes]:
    """Name and contents of what is mutated."""
    import soundfile

    audio = np.random.default_rng(0).normal(0, 0.1, 2400)
    for name in ("a.wav", "b.flac", "c.ogg"):
        soundfile.write(home / name, audio, 24_000)
    (home / "metadata.csv").write_text(TABLE)
    (home / "bars.csv").write_text(BARS)
    (home / "tabs.tsv").write_text(TABS)
    codes = {"codes": [[1] * 7, [2] * 7], "text": "six"}
    lines = [*ROWS, codes, {"input_ids": list(range(40)), "labels": [1]}]
    (home / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copy(ROOT / "data/demo/config.json", home / "config.json")
    return {path.name: path.read_bytes() for path in home.iterdir()}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    tokenizer = load_tokenizer(ROOT / "data/demo/base")
    home, counts = Path(tempfile.mkdtemp()), {"rows": 0, "mistakes": 0}
    seeds = make_seeds(home)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("a hang: over 20 s"))
    for n in range(count):
        draw = random.Random(n)
        name = draw.choice(list(seeds))
        (home / name).write_bytes(mutate(seeds[name], draw))
        signal.alarm(20)
        try:
            config = (home if name == "config.json" else ROOT / "data/demo") / "config.json"
            chosen = read_settings(config, {"cache_dir": str(home / "cache"), "train_on": "audio"})
            alone = name in ("list.jsonl", "bars.csv", "tabs.tsv")
            chosen.dataset = str(home / name if alone else home)
            train, held_out, _ = prepare.make_rows(read_clips(chosen), chosen, tokenizer)
            assert all(len(row["input_ids"]) == len(row["labels"]) for row in train + held_out)
            counts["rows"] += len(train + held_out)
        except UserError as error:
            assert "\n" not in str(error), (n, name, str(error))
            counts["mistakes"] += 1
        except BaseException:
            print(f"mutation {n} of {name}, kept in {home}", file=sys.stderr)
            raise
        (home / name).write_bytes(seeds[name])
    signal.alarm(0)
    shutil.rmtree(home)
    assert counts["rows"] > count / 2, counts  # else it is not the mutations that fail
    print(f"{count} mutations: {counts['rows']} rows, {counts['mistakes']} mistakes reported")


if __name__ == "__main__":
    main()
