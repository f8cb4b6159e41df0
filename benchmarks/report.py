"""Table and plot of what `benchmarks.run` measured."""

import json
import re
import statistics

CONTENDERS = {"this_project": "this project", "plain_loop": "plain loop", "hf_trainer": "HF trainer"}


def write(found, folder):
    """Write the figures, the table and the plot, named after the device. Returns the three paths."""
    return save(found, folder / (slug(found["device"]) + ("-quick" if found["quick"] else "")), table, draw)


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


def table(found):
    """The Markdown table: one row per figure, one column per contender, and the two ratios."""
    lines = [
        f"| {found['device']}, {found['date']} | {' | '.join(CONTENDERS.values())} | over plain | over HF |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def row(title, values, digits, ratio=None):
        """ratio: 1 where more is better, -1 where less is."""
        ours, *others = (values[name] for name in CONTENDERS)
        ratios = [f"{(ours / other) ** ratio:.2f}" if ratio else "" for other in others]
        lines.append(f"| {title} | " + " | ".join([f"{values[n]:,.{digits}f}" for n in CONTENDERS] + ratios) + " |")

    def share(title, figures):
        """Of the operations a second of large matrix multiplications; measured of this project alone."""
        lines.append(f"| {title} | {100 * figures['profile']['share_of_matmul_peak']:.0f} | | | | |")

    def pick(figures, key):
        return {name: figures[name][key] for name in CONTENDERS}

    for case, figures in found["cases"].items():
        lines.append(f"| **{case}** | | | | | |")
        passes = figures["validation"]
        for method in ("full", "LoRA"):
            row(f"{method}: training, examples/s", pick(figures[method], "examples_a_second"), 1, 1)
            row(f"{method}: training, tokens/s without padding", pick(figures[method], "tokens_a_second"), 0, 1)
            row(f"{method}: peak memory (MB)", pick(figures[method], "peak_memory_mb"), 0, -1)
            share(f"{method}: training, share of the matmul peak (%)", figures[method])
        for side in ("source", "target"):
            values = {name: 100 * figures["padding"][name][side] for name in CONTENDERS}
            row(f"padding of the {side} (%)", values, 1)
        for beams in (1, 5):
            seconds = pick(passes[f"{beams}_beams"], "seconds")
            title = f"validation, {figures['rows']['validation']} rows, {beams} beam{'s' * (beams > 1)}"
            row(f"{title} (s)", seconds, 1, -1)
            share(f"{title}, share of the matmul peak (%)", passes[f"{beams}_beams"])
        own = pick(passes["5_beams"], "seconds") | {"this_project": passes["1_beams"]["this_project"]["seconds"]}
        row("validation after an epoch: 1 beam in this project, 5 beams in the others (s)", own, 1, -1)
    if "start_up_seconds" in found:
        row("start to the end of the first step (s)", found["start_up_seconds"], 1, -1)
    for method in [method for method in ("full", "LoRA") if method in found["f1"]]:
        cells = []
        for name in CONTENDERS:
            values = [100 * value for value in found["f1"][method][name]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        title = f"demo model, {method}: F1 after {found['f1']['epochs']} epochs, {len(found['f1']['seeds'])} seeds"
        lines.append(f"| {title} | {' | '.join(cells)} | | |")
    return "\n".join(lines) + "\n"


def draw(found, path):
    """Bars of each contender's speed relative to the plain loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = found["cases"]
    figure, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 3.6), squeeze=False, layout="constrained")
    for axis, (case, figures) in zip(axes[0], cases.items(), strict=True):
        speeds = {
            "training\nfull": {name: figures["full"][name]["examples_a_second"] for name in CONTENDERS},
            "training\nLoRA": {name: figures["LoRA"][name]["examples_a_second"] for name in CONTENDERS},
        }
        for beams in (1, 5):
            seconds = figures["validation"][f"{beams}_beams"]
            speeds[f"validation\n{beams} beam{'s' * (beams > 1)}"] = {
                name: 1 / seconds[name]["seconds"] for name in CONTENDERS
            }
        for place, (name, label) in enumerate(CONTENDERS.items()):
            heights = [values[name] / values["plain_loop"] for values in speeds.values()]
            positions = [x + (place - 1) * 0.27 for x in range(len(heights))]
            axis.bar_label(axis.bar(positions, heights, 0.25, label=label), fmt="%.2f", fontsize=8)
        axis.set_xticks(range(len(speeds)), speeds)
        axis.set_title(case, fontsize=10)
        axis.set_ylabel("speed (plain loop = 1)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['device']}, {found['date']}", fontsize=10)
    bars = axes[0][0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=len(CONTENDERS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
