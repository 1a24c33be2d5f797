"""Clips and their texts → checked rows of ids for the trainer, and a doctor's report on them.

    python data/prepare.py my_voice                      # the report on a folder; no training
    python data/prepare.py owner/name --limit 100        # on a hub dataset
    python data/prepare.py --config data/demo/config.json
    torchrun --nproc-per-node 8 data/prepare.py my_voice # eight GPUs, which share the work

Takes the same --config and keys as finetune.py. The report goes to outputs/doctor, or --output_dir;
the encoded clips stay in `cache_dir`, so that data can be made ready before a GPU is rented. The
accepted forms are in data/README.md.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
else:
    from orpheus.rows import make_rows  # noqa: F401  for programs
from orpheus.settings import UserError, read_command_line, run


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    settings = read_command_line(__doc__)
    from orpheus.clips import read_clips
    from orpheus.doctor import draw_report, give_verdict
    from orpheus.files import TOKENIZER_FILES, fetch, make_folder
    from orpheus.models import load_tokenizer
    from orpheus.rows import make_rows
    from orpheus.runs import RANK, SAVED_CONFIG, SAVED_REPORT

    clips = read_clips(settings)
    out = Path("outputs/doctor", Path(settings.dataset).absolute().name)
    if any(word.split("=")[0] == "--output_dir" for word in sys.argv):
        out = Path(settings.output_dir)
    make_folder(str(out), "output_dir")
    if (out / SAVED_CONFIG).is_file():
        raise UserError(f"--output_dir {out} holds a run and its report: leave it out")
    tokenizer = load_tokenizer(fetch(settings.model, TOKENIZER_FILES))
    *_, report = make_rows(clips, settings, tokenizer)
    if RANK:  # the first rank reports for all
        return
    report.print_summary(settings, full=True)
    report.save(out)
    draw_report(report, out / "data_report.png")
    print(f"report   {out / SAVED_REPORT} and data_report.png beside it")
    print(f"verdict  {give_verdict(report, settings)}")


if __name__ == "__main__":
    run(main)
