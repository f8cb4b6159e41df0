"""Figures and tables as text, for the reports of `compare_runs.py` and of a study."""

import re


def as_markdown(text):
    """Text as one line of Markdown that is shown literally, in a table too."""
    return re.sub(r"([\\`*{}\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def markdown_table(lines):
    """Lists of cells as the lines of a Markdown table; the first list is its header."""
    head, *body = (f"| {' | '.join(map(as_markdown, line))} |" for line in lines)
    return [head, "| --- " * len(lines[0]) + "|", *body, ""]


def points(value):
    """A figure out of 100 with one decimal, or with its first digit if it is not 0 and would be printed as 0.0."""
    return f"{value + 0.0:.1f}" if value == 0 or abs(value) >= 0.05 else f"{value:.1g}"  # + 0.0: no "-0.0"


def nats(value):
    """A loss or a difference of losses with three decimals, or with its first digit if it would be printed as 0.000."""
    return f"{value + 0.0:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1g}"


def signed(value, form=points):
    """A difference with its sign. form: a function that prints it, for points or nats."""
    return f"{'+' if value > 0 else ''}{form(value)}"


def percent(share):
    """A share, 1 for all, as "93 %"; below 10 % with two digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def times(ratio):
    """A ratio with one decimal, or with its first digit if it is smaller."""
    return f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"


def p_value(p):
    """ "p = 0.03". Rounding takes no p to the other side of 0.05."""
    if p < 0.001:
        return "p < 0.001"
    text = f"{p:.2g}"
    return f"p = {text if (float(text) < 0.05) == (p < 0.05) else f'{p:.4g}'}"


def in_words(names):
    """ "a, b and c"."""
    *others, last = map(str, names)
    return f"{', '.join(others)} and {last}" if others else last


def paragraph(sentences):
    """Sentences as a paragraph of Markdown, the first one in bold."""
    first, *others = map(as_markdown, sentences)
    return " ".join([f"**{first}**", *others])
