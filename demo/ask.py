"""Ask both runs of the demo the same questions. `make demo` runs it at the end; later: `python demo/ask.py`."""

import sys
from pathlib import Path

# For the imports below: Python searches only the folder of the script it runs.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helper_functions import answer, load_tweet_qa, quiet_libraries  # noqa: E402
from pipeline.checkpoint import load_checkpoint  # noqa: E402
from pipeline.console import show_any_character  # noqa: E402

ROWS = 6  # of the test split, whose tweets neither run has seen


def main():
    show_any_character()
    quiet_libraries()
    rows = load_tweet_qa("demo/tweets")["test"][:ROWS]
    questions, tweets = [row["Question"] for row in rows], [row["Tweet"] for row in rows]
    answers = [answer(*load_checkpoint(f"demo/runs/{run}"), "cpu", questions, tweets) for run in ("full", "lora")]
    print("\nQuestions about tweets that neither run has seen:")
    for row, full, lora in zip(rows, *answers, strict=True):
        print(f"\n  {row['Tweet']}\n  {row['Question']}")
        print(f"      full fine-tune  {full}\n      LoRA            {lora}\n      reference       {row['Answer'][0]}")


if __name__ == "__main__":
    main()
