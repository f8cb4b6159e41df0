"""Tables and plot of what `benchmarks.run` measured."""

import json
import math
import re
import statistics

CONTENDERS = {"this_project": "this project", "plain_loop": "plain loop", "hf_trainer": "HF trainer"}
ALL = CONTENDERS | {"ct2": "CTranslate2"}  # does not train, and is optional
OURS = "this_project"
METHODS = ("full", "LoRA", "full, bf16", "LoRA, bf16")


def write(found, folder):
    """Write the figures, the tables and the plot, named after the device. Returns the three paths."""
    return save(found, folder / (slug(found["device"]) + ("-quick" if found["quick"] else "")), tables, draw)


def save(found, base, table, draw):
    """Write the figures to base.json, table(found) to base.md, and draw(found, path) to base.png. Returns the paths."""
    base.parent.mkdir(parents=True, exist_ok=True)
    paths = [base.with_suffix(f".{ending}") for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(found, indent=2) + "\n")
    paths[1].write_text(table(found))
    draw(found, paths[2])
    return paths


def slug(device):
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def tables(found):
    """The README's table of five rows, and the whole one."""
    return f"{short_table(found)}\n{table(found)}"


# ------------------------------------------------------------------------------------------------------------- rows


def header(found):
    over = [
        f"over {label.removesuffix(' loop').removesuffix(' trainer')}" for name, label in ALL.items() if name != OURS
    ]
    columns = [f"{found['device']}, {found['date']}", *ALL.values(), *over]
    return [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def row(title, values, digits, ratio=None, absent=""):
    """A line of the table: a figure for each contender, and this project's ratio to each of the others.

    values: {contender: number}. ratio: 1 where more is better, -1 where less is, None for no ratio. absent: what the
    cell of a contender without a number says.
    """
    cells = [f"{values[name]:,.{digits}f}" if name in values else absent for name in ALL]
    others = [values.get(name) if ratio else None for name in ALL if name != OURS]
    cells += [f"{(values[OURS] / other) ** ratio:.2f}" if other else "" for other in others]
    return f"| {title} | {' | '.join(cells)} |"


def alone(title, text):
    """A line with one cell, in this project's column."""
    return f"| {title} | {text} |" + " |" * 6


def share(title, figures):
    """Of the operations a second of large matrix multiplications; measured of this project alone."""
    return alone(title, f"{100 * figures['profile']['share_of_matmul_peak']:.0f}")


def pick(figures, key):
    return {name: figures[name][key] for name in ALL if name in figures}


def short_table(found):
    """What one asks first, in five rows, of the first model: all in float32 on a CPU."""
    case = next(iter(found["cases"].values()))
    absent = "" if "ct2" in case["validation"]["1_beams"] else "not installed"
    rows = f"{case['rows']['validation']} rows"
    lines = header(found)
    lines += [
        row(f"training, {method} (examples/s)", pick(case[method], "examples_a_second"), 1, 1, absent="–")
        for method in ("full", "LoRA")
    ]
    for title, beams in ((f"validation after an epoch, {rows}", 1), (f"final pass with 5 beams, {rows}", 5)):
        lines.append(row(f"{title} (s)", pick(case["validation"][f"{beams}_beams"], "seconds"), 1, -1, absent))
    if "start_up_seconds" in found:
        lines.append(row("start to the end of the first step (s)", found["start_up_seconds"], 1, -1, absent="–"))
    return "\n".join(lines) + "\n"


def table(found):
    """The whole table: one row per figure, one column per contender, and the ratios."""
    lines = header(found)
    for precision, peak in found["matmul_flops_a_second"].items():
        lines.append(alone(f"fastest matrix product in {precision}, GFLOP/s", f"{peak / 1e9:,.0f}"))
    for case, figures in found["cases"].items():
        lines.append(f"| **{case}** |" + " |" * 7)
        passes = figures["validation"]
        for method in [method for method in METHODS if method in figures]:
            lines.append(row(f"{method}: training, examples/s", pick(figures[method], "examples_a_second"), 1, 1))
            tokens = pick(figures[method], "tokens_a_second")
            lines.append(row(f"{method}: training, tokens/s without padding", tokens, 0, 1))
            lines.append(row(f"{method}: peak memory (MB)", pick(figures[method], "peak_memory_mb"), 0, -1))
            lines.append(share(f"{method}: training, share of the matmul peak (%)", figures[method]))
        for side in ("source", "target"):
            values = {name: 100 * padded[side] for name, padded in figures["padding"].items()}
            lines.append(row(f"padding of the {side} (%)", values, 1))
        for beams in (1, 5):
            found_there = passes[f"{beams}_beams"]
            title = f"validation, {figures['rows']['validation']} rows, {beams} beam{'s' * (beams > 1)}"
            lines.append(row(f"{title} (s)", pick(found_there, "seconds"), 1, -1))
            lines.append(share(f"{title}, share of the matmul peak (%)", found_there))
        own = pick(passes["5_beams"], "seconds") | {OURS: passes["1_beams"][OURS]["seconds"]}
        own.pop("ct2", None)
        lines.append(row("validation after an epoch: 1 beam in this project, 5 beams in the others (s)", own, 1, -1))
        for beams, answered in figures.get("answers", {}).items():
            beams = int(beams.split("_")[0])
            title = f"`answer()` on {answered['asked']:,} questions, {beams} beam{'s' * (beams > 1)}"
            lines.append(row(f"{title} (s)", pick(answered, "seconds"), 1, -1))
            lines.append(alone(f"{title}: the same answers", f"{answered['same']:,}"))
    if "start_up_seconds" in found:
        lines.append(row("start to the end of the first step (s)", found["start_up_seconds"], 1, -1))
    f1 = found["f1"]
    for method in [method for method in ("full", "LoRA") if f1.get(method, {}).get(OURS)]:
        lines += f1_rows(f"demo model, {method}: F1 after {f1['epochs']} epochs", f1[method])
    return "\n".join(lines) + "\n"


def f1_rows(title, scores):
    """Mean and standard deviation over the seeds that all contenders have, and this project's paired differences."""
    seeds = min(len(values) for values in scores.values())
    points = {name: [100 * value for value in values[:seeds]] for name, values in scores.items()}
    if not seeds:
        return []
    cells = [spread(points[name]) if name in points else "" for name in ALL] + [""] * 3
    lines = [f"| {title}, {seeds} seed{'s' * (seeds > 1)} | {' | '.join(cells)} |"]
    if seeds > 1:
        cells = [""]
        for name in list(ALL)[1:]:
            given = paired_difference(points[OURS], points[name]) if name in points else None
            cells.append("{:+.2f} ({:+.2f} to {:+.2f})".format(*given) if given else "")
        lines.append(f"| this project's minus theirs, seed by seed (95 % interval) | {' | '.join(cells)} | | | |")
    return lines


def spread(values):
    """ "66.1 ± 1.9": mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def paired_difference(ours, theirs):
    """(mean, low, high) of ours - theirs over pairs, with Student's 95 % interval; one pair has no interval (nan)."""
    from scipy import stats

    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


# ------------------------------------------------------------------------------------------------------------- plot


def draw(found, path):
    """Bars of each contender's speed relative to the plain loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = found["cases"]
    figure, axes = plt.subplots(1, len(cases), figsize=(6.5 * len(cases), 3.8), squeeze=False, layout="constrained")
    for axis, (case, figures) in zip(axes[0], cases.items(), strict=True):
        speeds = {
            f"training\n{method}": pick(figures[method], "examples_a_second") for method in METHODS if method in figures
        }
        for beams in (1, 5):
            seconds = pick(figures["validation"][f"{beams}_beams"], "seconds")
            speeds[f"validation\n{beams} beam{'s' * (beams > 1)}"] = {name: 1 / s for name, s in seconds.items()}
        for place, (name, label) in enumerate(ALL.items()):
            heights = {x: v[name] / v["plain_loop"] for x, v in enumerate(speeds.values()) if name in v}
            positions = [x + (place - 1.5) * 0.21 for x in heights]
            bars = axis.bar(positions, list(heights.values()), 0.2, label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks(range(len(speeds)), speeds)
        axis.set_title(case, fontsize=10)
        axis.set_ylabel("speed (plain loop = 1)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['device']}, {found['date']}", fontsize=10)
    bars = axes[0][0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=len(ALL), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
