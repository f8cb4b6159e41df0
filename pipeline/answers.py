"""Reading the Answer of a row, however it was written: a list, a text, or a list that some program wrote as text.

Used by `data.py` for each row. What cannot be read raises ValueError with the reason; `data.py` adds file and row.
"""

import ast
import json
import re

_ESCAPE = r"""\\[\\'"abfnrtvxuUN0-7\n]"""  # any other is not an escape of Python's, which would warn of it
_QUOTED = rf"""(?:'(?:[^'\\]|{_ESCAPE})*'|"(?:[^"\\]|{_ESCAPE})*")"""
_TOKEN = re.compile(
    rf"\s*(?:(?P<text>[uUbB]?{_QUOTED})"
    r"|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*|<NA>)"
    r"|(?P<mark>[\[\](){},:=]))",
    re.DOTALL,
)
_CONSTANTS = {"None": None, "null": None, "nan": None, "NaN": None, "NaT": None, "NA": None, "<NA>": None}
_CONSTANTS |= {"True": True, "False": False, "true": True, "false": False, "True_": True, "False_": False}
_CALLS = {"array", "str_", "str", "list", "tuple", "set", "frozenset", "deque", "Series", "Index", "c"}
_CALLS |= {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "StringDType", "StringArray"}
_CLOSING = {"[": "]", "(": ")", "{": "}"}

_OBJECTS = (
    r"(?:(?:array|Index|Series|frozenset|set|deque|list|tuple|c)\(\s*[\[{('\"]"  # c("a", "b") is R's
    r"|[A-Za-z_][\w.]*\(\s*[\[{(]\s*[\[{('\"]"  # OrderedDict([('text', …
    r"|shape: \(\d+,\)\s)"  # of polars
)
_PRINTED = re.compile(
    r"""\(*\s*[\[{][\[({\s]*[uUbB]?['"‘’“”]"""  # ['  [["  {'
    rf"|\(\s*[uUbB]?{_QUOTED}\s*,"  # ('a', but not ("a" she said)
    r"|[\[({]\s*(?:None|null|nan|NaN|NaT|<NA>)\s*[,\]})]"
    r"|[\[({]\s*(?:np|numpy|pd|pandas)\.\w"
    r"|[\[{]\s*[A-Za-z_][\w.]*\(\s*['\"]"  # [Decimal('5')]
    rf"|[\[({{]?\s*{_OBJECTS}"
    r"|(?:np|numpy|pd|pandas)\.\w+\("
    r"|\[(?=(?:[^\[\]]|\[[^\[\]]*\])*\]$)[^,]*,|\{(?=[^{}]*\}$)[^,]*,"  # [a, b], as pandas shows a list in a table
    r"|\{\s*\w+\s*[:=]"  # {text=[a]}
    r"|<\w+Array>|<pyarrow\.|<.* at 0x[0-9a-f]+>$"
    r"|.*\bdtype: [\w\[\], ]+$",  # a whole Series, printed
    re.DOTALL,
)
_MAY_BE_PRINTED = re.compile(rf"""\s*(?:[\[({{<"']|(?:np|numpy|pd|pandas)\.|{_OBJECTS})""")
_STRING_ARRAY = re.compile(r"<\w+Array>\s*(\[.*\])\s*Length: \d+, dtype: \S+", re.DOTALL)
MISSING = {"nan", "NaN", "NaT", "None", "<NA>"}  # how Python and pandas write a missing value into a text


def read_references(answer):
    """(references, how many were missing) of the raw Answer of a row.

    answer: None, a text (see `parse_answer`), a list of texts, SQuAD's {"text": [...], "answer_start": [...]}, or a
        list of {"text": ...}. Of a list, what is None, NaN or blank is left out.

    The references are strings, or what was there in place of one. Raises ValueError if they cannot be read.
    """
    if isinstance(answer, str):
        if answer.strip() in MISSING:
            word = answer.strip()
            raise ValueError(f'is {word}, as pandas writes a missing value: remove the row, or write ["{word}"]')
        answer = parse_answer(answer)
    if isinstance(answer, dict):
        answer = [answer]
    if _is_missing(answer):
        return [], 0
    if not isinstance(answer, (list, tuple)):
        raise ValueError(f"must be text or a list of texts, not {type(answer).__name__}")
    entries = []
    for entry in answer:
        if isinstance(entry, str):
            entries.append(entry)
        elif isinstance(entry, dict):
            if "text" not in entry:
                raise ValueError(f"is an object without 'text': it has {list(entry)}"[:200])
            text = entry["text"]
            entries += text if isinstance(text, (list, tuple)) else [text]
        else:
            entries.append(entry)
    references = [entry for entry in entries if not _is_missing(entry)]
    for reference in references:
        # Lists as text have one of these characters; to look for them is faster than the expression.
        suspect = isinstance(reference, str) and ("[" in reference or "(" in reference or "{" in reference)
        if suspect and _printed_list(reference) is not None:
            raise ValueError("has a list inside a list: write each reference as one text")
    return references, len(entries) - len(references)


def parse_answer(text):
    """The references in an Answer that is a text: those of a list written as text, or else [text].

    Lists are read as JSON, Python, numpy (1 and 2), pandas and R write them: ["a", "b"], ('a', 'b'), {'a'}, ['a' 'b'],
    [np.str_('a')], array(['a'], dtype=object), Index([...]), <StringArray> ..., c("a", "b"); SQuAD's {'text': [...]}
    too.

    What looks like a list and cannot be read as one raises ValueError. A text looks like one if it
    - starts with [ or { and then a quote, a missing value (None, nan), or a name with brackets (np.str_('…'));
    - or starts with ( and then a quoted text and a comma;
    - or is in square or curly brackets as a whole and has a comma: [a, b];
    - or starts as an array, an Index, {text=… or an object that has no text (<map object at 0x…>);
    - or ends as a printed Series does (dtype: object).
    All other text is one answer, unchanged: [laughs], (me), "quoted" words, [he] said, 236k (236,000). An answer that
    does look like a list can be given as a JSON list of one: ["[laughs, cries]"].
    """
    if not _MAY_BE_PRINTED.match(text) and "dtype: " not in text:
        return [text]
    printed = _printed_list(text)
    if printed is not None:
        return printed
    if _PRINTED.match(text.strip()):
        start = " ".join(text.split())[:40]
        raise ValueError(
            f'looks like a list and cannot be read as one ({start!r}): write it as JSON, ["first", "second"]'
        )
    return [text]


def _printed_list(text):
    """The list (or SQuAD's dict) that a text holds, or None."""
    if not _MAY_BE_PRINTED.match(text):
        return None
    text = text.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = _parse_printed(text)
        except (ValueError, SyntaxError, TypeError, IndexError, RecursionError):
            return None
    if isinstance(value, str) and value != text:  # quoted once more: "['a', 'b']"
        return _printed_list(value)
    return value if isinstance(value, (list, dict)) else None


def _parse_printed(text):
    """The value that Python, numpy or pandas printed. numpy puts no commas between texts (['a' 'b']), which Python
    would read as the one text 'ab', so that `ast.literal_eval` alone would be wrong."""
    by_pandas = _STRING_ARRAY.fullmatch(text)
    if "\\" in text and (
        by_pandas or text.startswith(("Index(", "pd.Index("))
    ):  # pandas puts quotes around a text and does not escape in it
        raise ValueError
    if by_pandas:
        text = by_pandas[1]
    tokens, place = [], 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if not token:
            raise ValueError
        tokens.append((token.lastgroup, token[token.lastgroup]))
        place = token.end()
    tokens.reverse()  # the next one is popped from the end
    is_call = tokens[-1][0] == "name"
    value = _parse_value(tokens)
    if tokens:
        raise ValueError
    return [value] if is_call and isinstance(value, str) else value  # np.str_('a')


def _parse_value(tokens):
    kind, piece = tokens.pop()
    if kind in ("text", "number"):
        return ast.literal_eval(piece)
    if kind == "name":
        name = piece.rpartition(".")[2] or piece
        if tokens and tokens[-1] == ("mark", "("):
            if name not in _CALLS:
                raise ValueError
            tokens.pop()
            items, *_ = _parse_items(tokens, ")")
            if name == "c":
                return items
            return [] if not items else items[0] if len(items) == 1 else _no_value()
        return _CONSTANTS[name] if name in _CONSTANTS else _no_value()
    if piece not in _CLOSING:
        raise ValueError
    items, pairs, commas = _parse_items(tokens, _CLOSING[piece])
    if pairs:
        return pairs if piece == "{" and not items else _no_value()
    if piece == "(" and items and not commas:  # ('a') is a text in brackets
        return items[0] if len(items) == 1 else _no_value()
    return items


def _parse_items(tokens, closing):
    """(items, {key: value}, how many commas) up to the closing bracket; keywords such as dtype=object are left out."""
    items, pairs, commas = [], {}, 0
    while tokens[-1] != ("mark", closing):
        if tokens[-1] == ("mark", ","):
            tokens.pop()
            commas += 1
        elif tokens[-2] == ("mark", "="):
            del tokens[-2:]
            if tokens[-1][0] == "name" and tokens[-2] != ("mark", "("):  # dtype=object
                tokens.pop()
            else:
                _parse_value(tokens)
        else:
            value = _parse_value(tokens)
            if tokens[-1] == ("mark", ":"):
                tokens.pop()
                pairs[value] = _parse_value(tokens)
            else:
                items.append(value)
    tokens.pop()
    return items, pairs, commas


def _no_value():
    raise ValueError


def _is_missing(entry):
    """Whether a reference is None, NaN or blank."""
    return not entry.strip() if isinstance(entry, str) else entry is None or entry != entry
