"""Draw probes/demo.jsonl, the probe of the demo's T5, from the generators of its pretraining text with another seed.

    python probes/make_demo.py      # seconds

The same seed always gives the same file. Two kinds: "span filling" is the task of the last stage of the pretraining,
"reading" that of the stage before, a question about a clause among others.
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "demo")]  # for the imports below: Python searches only this folder

from pretraining_text import PretrainingText  # noqa: E402

from pipeline.run_folder import writing  # noqa: E402

LINES = 60  # of each kind
KINDS = {"span filling": (3, "masked"), "reading": (2, "asked")}  # kind -> (stage, task) of PretrainingText
MOST_CHARACTERS = 400  # of a prompt: the pretraining cuts longer ones, at 160 tokens


def draw(seed):
    """The lines: [{"prompt", "target", "kind"}], LINES of each kind, no two the same."""
    lines = []
    for kind, (stage, task) in KINDS.items():
        text = PretrainingText(random.Random(f"{seed} forgetting {kind}"), stage)
        drawn = {}
        while len(drawn) < LINES:
            prompt, target = getattr(text, task)()
            # A passage in which no span is masked has nothing to fill.
            if len(prompt) <= MOST_CHARACTERS and (task != "masked" or "<extra_id_0>" in prompt):
                drawn[prompt] = target
        lines += [{"prompt": prompt, "target": target, "kind": kind} for prompt, target in drawn.items()]
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE / "demo.jsonl", help="file to write (default: demo.jsonl)")
    args = parser.parse_args(argv)
    with writing(args.out) as beside:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in draw(args.seed))
        beside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
