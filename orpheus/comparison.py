"""The table of an evaluation: figures with their intervals, as Markdown, JSON and a picture."""

import json
from pathlib import Path

import numpy as np

from orpheus.files import atomic_file, write_text
from orpheus.tokens import TAG

# Of each score its heading, what it is multiplied by, and its decimals.
COLUMNS = {
    "wer": ("word errors, %", 100, 1),
    "cer": ("character errors, %", 100, 1),
    "likeness": ("likeness", 1, 2),
    "mos": ("DNSMOS", 1, 2),
    "distillmos": ("Distill-MOS", 1, 2),
    "ended": ("ended, %", 100, 0),
    "pace": ("pace", 1, 2),
    "silence": ("silence, s", 1, 2),
}
CODEC = "codec"  # the speaker that is the floor: recordings, encoded and decoded
LEGEND = (
    "In brackets: 95 % bootstrap intervals over the texts. Behind the arrow: the recordings "
    "through the codec, the best that a model of this codec can be expected to reach. Word and "
    "character errors are lower, likeness (−1 to 1) and opinion scores (1 to 5) higher for a "
    "better voice; "
    "pace is the length relative to the corpus's seconds a character; silence is the longest "
    "within a text, on average."
)


def bootstrap(
    values: np.ndarray, weights: np.ndarray, texts: list[str], draws: int = 2000
) -> tuple[float, float, float]:
    """A weighted mean and the ends of its 95 % interval, by the percentile bootstrap over texts.

    Texts are drawn, each with all of its values, since the values of one text with several seeds
    are no independent samples (a cluster bootstrap: Davison and Hinkley, 1997, section 3.8).

    Args:
        values, weights: (n,), one for each sound; some weight is above 0.
        texts: of the n sounds.
    """
    groups = np.unique(texts, return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, weights * values), np.bincount(groups, weights)])
    chosen = np.random.default_rng(0).integers(sums.shape[1], size=(draws, sums.shape[1]))
    means = np.divide(*sums[:, chosen].sum(axis=2))
    return float(np.divide(*sums.sum(axis=1))), *np.quantile(means, [0.025, 0.975]).tolist()


def weight_of(name: str, text: str) -> int:
    """What a text counts in a score's mean: its words or characters without tags, or 1."""
    words = TAG.sub(" ", text).split()
    return {"wer": len(words), "cer": len(" ".join(words))}.get(name, 1)


def summarize(scores: list[dict]) -> dict[str, dict[str, float]]:
    """`mean`, `low` and `high` of every score that some of the sounds have.

    Each sound is a dict of its `text` and its scores; a score may be missing, or None.
    """
    figures = {}
    for name in COLUMNS:
        rows = [row for row in scores if row.get(name) is not None]
        if rows:
            values = np.array([row[name] for row in rows], dtype=float)
            weights = np.array([weight_of(name, row["text"]) for row in rows], dtype=float)
            ends = bootstrap(values, weights, [row["text"] for row in rows])
            figures[name] = dict(zip(("mean", "low", "high"), ends, strict=True))
    return figures


GENERAL = "general"


def text_set(kind: str) -> str:
    """Under which of the table's headings a kind of text stands."""
    return kind if kind in ("held-out", "given") else GENERAL


def make_rows(scores: list[dict]) -> list[dict]:
    """The rows of the table: for each set of texts and each speaker, in order, its figures.

    Args:
        scores: a dict for each sound, of `speaker`, `kind`, `text` and its scores.
    """
    groups = {}
    for row in scores:
        groups.setdefault((text_set(row["kind"]), row["speaker"]), []).append(row)
    order = ["given", "held-out", GENERAL]
    rows = []
    for (texts, speaker), sounds in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        row = {"texts": texts, "speaker": speaker, "sounds": len(sounds)}
        row["figures"] = summarize(sounds)
        if texts == GENERAL:
            kinds = dict.fromkeys(sound["kind"] for sound in sounds)
            row["kinds"] = {
                kind: summarize([s for s in sounds if s["kind"] == kind]) for kind in kinds
            }
        rows.append(row)
    return rows


def find_floor(rows: list[dict], texts: str) -> dict:
    """The codec's figures on a set of texts; empty if they were not recorded."""
    found = (r["figures"] for r in rows if (r["texts"], r["speaker"]) == (texts, CODEC))
    return next(found, {})


def format_cell(name: str, figures: dict, floor: dict) -> str:
    """A figure with its interval and the floor."""
    if name not in figures:
        return "–"
    _, factor, digits = COLUMNS[name]

    def show(value):
        return f"{factor * value:.{digits}f}"

    figure = figures[name]
    cell = f"{show(figure['mean'])} ({show(figure['low'])} to {show(figure['high'])})"
    return f"{cell} → {show(floor[name]['mean'])}" if name in floor else cell


def format_table(rows: list[dict]) -> str:
    """The rows as a table in Markdown. Columns of scores that no row has are left out."""
    names = [name for name in COLUMNS if any(name in row["figures"] for row in rows)]
    lines = [["texts", "speaker", "sounds", *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        is_model = "ended" in row["figures"]
        floor = find_floor(rows, row["texts"]) if is_model else {}
        cells = [format_cell(name, row["figures"], floor) for name in names]
        lines.append([row["texts"], row["speaker"], str(row["sounds"]), *cells])
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([table[0], "|---" * len(lines[0]) + "|", *table[1:]])


def save_table(folder: Path, title: str, notes: list[str], results: dict) -> None:
    """Writes table.md, table.json and table.png.

    Args:
        notes: sentences on what could not be done.
        results: what table.json holds: `rows`, as `make_rows` returns them, and anything else.
    """
    parts = [f"# {title}", format_table(results["rows"]), LEGEND, *notes]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    write_text(folder / "table.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw_rows(results["rows"], title, folder / "table.png")


def draw_rows(rows: list[dict], title: str, path: Path) -> None:
    """Draws a panel for each score."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a voice or a folder may be named $x
    names = [name for name in COLUMNS if any(name in row["figures"] for row in rows)]
    across = min(len(names), 4)
    down = -(-len(names) // across)
    size = 2.4 * across + 2.5, (0.3 * len(rows) + 0.8) * down + 0.5
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for name, panel in zip(names, panels.flat, strict=False):
        draw_score(panel, name, rows)
    labels = [f"{row['texts']}: {row['speaker']}" for row in rows]
    panels[0][0].set_yticks(range(len(rows)), labels)
    panels[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    with atomic_file(path) as part:
        figure.savefig(part, dpi=100, format="png")


def draw_score(panel, name: str, rows: list[dict]) -> None:
    """Draws a score's panel: a point and its interval for each row, and the floor behind it."""
    heading, factor, _ = COLUMNS[name]
    for height, row in enumerate(rows):
        if name in row["figures"]:
            mean, low, high = (factor * value for value in row["figures"][name].values())
            panel.plot([low, high], [height, height], color="C0")
            panel.plot(mean, height, "o", color="C1" if row["speaker"] == CODEC else "C0")
        floor = find_floor(rows, row["texts"])
        if name in floor:
            ends = {"ymin": height - 0.4, "ymax": height + 0.4}
            panel.vlines(factor * floor[name]["mean"], **ends, color="C1", linestyle="dotted")
    panel.set_title(heading, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(axis="x", alpha=0.3)
