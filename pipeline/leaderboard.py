"""BLEU-1, ROUGE-L and METEOR as TweetQA's leaderboard computes them, for the final evaluation.

`leaderboard_scores` is public through `helper_functions.py`. METEOR is a Java process that takes seconds to start.
"""

import os
import shutil
import subprocess
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError, reason
from pipeline.metrics import METRICS
from pipeline.text import normalize_answer, reference_list


def check_leaderboard():
    """Import what `leaderboard_scores` needs, and start Java, before any training.

    Returns whether METEOR can be computed. Raises InputError if a library cannot be imported.
    """
    try:
        from nltk.translate.bleu_score import sentence_bleu  # noqa: F401
        from pycocoevalcap.meteor import meteor
        from pycocoevalcap.rouge.rouge import Rouge  # noqa: F401
    except Exception as error:  # not only ImportError: nltk looks for folders when it is imported
        raise InputError(f"the leaderboard's metrics cannot be imported ({reason(error)}); reinstall them") from None
    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    try:
        command = ["java", "-version"]
        return jar.is_file() and not subprocess.run(command, capture_output=True, timeout=60).returncode
    except (OSError, subprocess.SubprocessError):
        return False


def leaderboard_scores(predictions, references):
    """BLEU-1, ROUGE-L and METEOR of each example, computed as by TweetQA's official script (tweetqa_eval.py).

    predictions: a list of n strings. references: a list of n lists of strings, all of which count at once.
    Returns {"bleu1": [...], "rougeL": [...], "meteor": [...]}, n floats in [0, 1] each. METEOR needs Java: without it
    the key "meteor" is missing. A blank prediction gets 0.0 in all three.

    Both sides are normalized by `normalize_answer`, then scored by the components that the script uses:
    bleu1: Papineni et al., 2002, https://aclanthology.org/P02-1040, nltk's sentence_bleu for unigrams: precision,
        clipped by the largest count of a word in any reference, times the brevity penalty against the reference of
        nearest length.
    rougeL: Lin, 2004, https://aclanthology.org/W04-1013, pycocoevalcap's Rouge: F with beta = 1.2 of the longest common
        subsequence, from the best precision and the best recall over the references, maybe of different ones.
        1.0 if prediction ("!") and a reference are both empty after normalization.
    meteor: Denkowski and Lavie, 2014, https://aclanthology.org/W14-3348, pycocoevalcap's Meteor (version 1.5, English,
        with its stems, synonyms and paraphrases), the best over the references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} examples")
    # {index: the normalized texts}, without the blank predictions: the form that pycocoevalcap takes.
    answered = [i for i, prediction in enumerate(predictions) if prediction.strip()]
    predicted = {i: [normalize_answer(predictions[i])] for i in answered}
    gold = {i: [normalize_answer(reference) for reference in reference_list(references[i])] for i in answered}
    columns = {
        "bleu1": _bleu1_scores(predicted, gold),
        "rougeL": _rouge_scores(predicted, gold),
        "meteor": _meteor_scores(predicted, gold),
    }
    return {
        name: [column.get(i, 0.0) for i in range(len(predictions))]
        for name, column in columns.items()
        if column is not None
    }


def _bleu1_scores(predicted, gold):
    """{index: BLEU-1} of normalized texts."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each answer without a common bigram, whose weight is 0
        return {
            i: float(sentence_bleu([text.split() for text in gold[i]], text.split(), weights=(1, 0, 0, 0)))
            for i, [text] in predicted.items()
        }


def _rouge_scores(predicted, gold):
    """{index: ROUGE-L} of normalized texts."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return {i: rouge.calc_score(texts, gold[i]) for i, texts in predicted.items()}


def _meteor_scores(predicted, gold):
    """{index: METEOR} of normalized texts, or None where Java is missing or does not run."""
    if not shutil.which("java"):
        return None
    if not predicted:  # METEOR fails on an empty list
        return {}
    try:
        with _meteor() as meteor:
            _, scores = meteor.compute_score(gold, predicted)
    except UnicodeError:  # an unpaired surrogate: the text is wrong, not Java
        raise
    except (OSError, ValueError):  # it did not start, or ended without a number
        return None
    return dict(zip(predicted, scores, strict=True))


@contextmanager
def _meteor():
    """A pycocoevalcap Meteor whose Java process is ended afterwards, whatever happens, Ctrl-C included."""
    from pycocoevalcap.meteor.meteor import Meteor

    before = os.environ.get("JAVA_TOOL_OPTIONS")
    # In locales with a decimal comma, METEOR cannot read its own numbers.
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US"
    try:
        meteor = Meteor()
    finally:
        del os.environ["JAVA_TOOL_OPTIONS"]
        if before is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = before
    try:
        yield meteor
    finally:
        # Its own clean-up, __del__, waits forever for a lock that an interrupted compute_score keeps.
        meteor.lock = threading.Lock()
        meteor.meteor_p.kill()
        meteor.meteor_p.communicate()  # closes the pipes and waits for the end


def with_leaderboard_scores(scored):
    """{role: (metrics, frame)} with the metrics of the leaderboard added to both (None without Java for METEOR).

    All splits are scored at once: METEOR takes longer to start than to score them.
    """
    frames = [frame for _, frame in scored.values()]
    predictions = [text for frame in frames for text in frame["prediction"]]
    scores = leaderboard_scores(predictions, [references for frame in frames for references in frame["references"]])
    result, start = {}, 0
    for role, (metrics, frame) in scored.items():
        names = [metric.name for metric in METRICS if not metric.each_epoch and metric.name not in metrics]
        columns = {name: scores[name][start : start + len(frame)] for name in names if name in scores}
        frame = frame.assign(**columns)
        means = {name: float(frame[name].mean()) if name in scores else None for name in names}
        result[role] = (metrics | means, frame)
        start += len(frame)
    return result
