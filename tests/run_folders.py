"""Finished run folders, written by hand as the training scripts do: for the comparison and the report of a study."""

import numpy as np
import pandas as pd

from pipeline.run_folder import write_predictions, write_run_json, write_table

QUESTIONS = ["who won | lost?", "what is\nit?", "why not?", "where?", "who is *she*?"]


def write_run(
    folder,
    method="full",
    seed=0,
    f1=None,
    em=None,
    sem_sim=None,
    record=(),
    held_out=None,
    test=None,
    epochs=None,
    probe=None,
    **args,
):
    """Write a finished run as the training scripts do, without training. f1, em, sem_sim: of each validation example;
    held_out, test: F1 of each such example, two of which are about one tweet; record and args: what to change in
    run.json and in its arguments; epochs: columns of metrics.csv to change or add; probe: columns of probe_losses.csv,
    and "sha256"."""
    f1 = np.linspace(0, 1, 40) if f1 is None else np.asarray(f1, float)
    folder.mkdir(parents=True)
    measured, trained = args.get("sem_model") != "none", method != "base"
    frame = predictions(folder, f1, em, sem_sim, measured)
    write_predictions(folder / "validation_predictions.csv", frame)
    others = {}
    for split, scores in (("holdout", held_out), ("test", test)):
        if scores is not None:
            other = predictions(folder, np.asarray(scores, float), tweets=(len(scores) + 1) // 2, measured=measured)
            write_predictions(folder / f"{split}_predictions.csv", other)
            others[split] = means(other, measured)
    if "holdout" in others:
        others["holdout"] = {"rows": list(range(len(held_out))), "metrics": others["holdout"]}
    if trained:
        table = pd.DataFrame({"epoch": [1, 2, 3], "f1": f1.mean() * np.arange(1, 4) / 3})
        table = table.assign(epoch_seconds=[30.0, 60.0, 90.0], steps_per_sec=[2.0, 1.0, 2 / 3], **(epochs or {}))
        write_table(folder / "metrics.csv", table)
    defaults = {
        **{"model_name": "google/flan-t5-small", "dataset": "ucsbnlp/tweet_qa", "epochs": 3, "patience": 0},
        **{"lr": 1e-3, "seed": seed, "sem_model": "minilm", "final_beams": 5, "max_input_len": 256},
        **{"max_target_len": 32, "holdout": 0 if held_out is None else len(held_out), "max_train_samples": None},
        **{"drop_leaked": False, "eval_only": not trained, "save_dir": str(folder)},
        **({"lora_r": 8, "target_modules": ["q", "v"]} if method == "lora" else {}),
    }
    sizes = {"full": (100_000, 2**22), "lora": (400, 2**19), "base": (0, 0)}[method]
    run = {
        **{"method": method, "args": defaults | args, "device": "cpu", "seed": seed, "started": "2026-01-01"},
        **{"trainable_parameters": sizes[0], "total_parameters": 100_000, "checkpoint_bytes": sizes[1]},
        **{"best_epoch": 3 if trained else None, "wall_time_seconds": 200.0, "git_commit": None},
        "final": {"val_loss": 1.0} | means(frame, measured) | {"bleu1": 0.25, "rougeL": 0.375, "meteor": None},
        **{"peak_vram_mb": 0.0, "peak_ram_mb": 512.0 if trained else None},
        **others,
    }
    if probe:
        run["probe"] = write_probe(folder, **probe)
    write_run_json(folder, run | dict(record))
    return folder


def write_probe(folder, kind, target_tokens, before, final, sha256="0" * 64):
    """Write probe_losses.csv; returns what run.json says of it. Summed losses (nats) of each line."""
    columns = {"kind": kind, "target_tokens": target_tokens, "before": before, "final": final}
    table = pd.DataFrame({"line": range(1, len(kind) + 1), **columns})
    write_table(folder / "probe_losses.csv", table)
    tokens = table["target_tokens"].sum()
    said = {name: {"loss": table[name].sum() / tokens, "kinds": {}} for name in ("before", "final")}
    size = {"lines": len(table), "target_tokens": int(tokens)}
    return {"file": "probes/some.jsonl", "sha256": sha256, **size, **said}


def predictions(folder, f1, em=None, sem_sim=None, measured=True, tweets=None):
    """The frame of these scores. tweets: how many tweets the rows are about (default: one each)."""
    em = (f1 == 1).astype(float) if em is None else np.asarray(em, float)
    sem_sim = (f1 / 2 if sem_sim is None else np.asarray(sem_sim, float)) if measured else np.full(len(f1), np.nan)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(f1))]
    return pd.DataFrame(
        {
            "qid": "same",
            "question": questions,
            "tweet": [f'tweet {i % (tweets or len(f1))}, "quoted" \U0001f600 #tag' for i in range(len(f1))],
            "references": [[f"gold {i}", "other"] for i in range(len(f1))],
            "prediction": [f"answer {i} of {folder.name}" if i else "" for i in range(len(f1))],
            **{"em": em, "f1": f1, "sem_sim": sem_sim},
            "question_type": [question.split()[0].strip("?") for question in questions],
        }
    )


def means(frame, measured):
    """The metrics of a frame, as run.json has them."""
    return {
        "f1": frame["f1"].mean(),
        "em": frame["em"].mean(),
        "avg_sem_sim": frame["sem_sim"].mean() if measured else None,
    }
