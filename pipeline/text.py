"""Small functions on text: SQuAD's normalization, when two tweets count as the same, question types, tweet features.

Used by the metrics, by the checks for leaked tweets, and by the breakdown of the errors.
"""

import re
import string

# Pictographs, dingbats, transport signs, flags, and the clocks and stars that phones draw in colour. Letters and
# typographic signs such as the copyright sign are left out on purpose.
_EMOJI = re.compile("[\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b05-\u2b55\U0001f000-\U0001faff]")
_QUESTION_WORDS = {"what", "who", "how", "where", "why", "which", "when", "whose"}


def normalize_answer(text):
    """SQuAD's normalization: lower case, no ASCII punctuation, no English articles, single spaces.

    Rajpurkar et al., 2016, https://aclanthology.org/D16-1264 (the official evaluation script).
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def tweet_key(tweet):
    """The text of a tweet without case and spacing: two tweets with the same key count as the same tweet."""
    return " ".join(tweet.split()).casefold()


def question_type(question):
    """The first question word of a question ("what", "who", "how", "where", "why", "which", "when", "whose"), or
    "other". "Who's", "whos" and "whom" count as "who", "what's" and "whats" as "what"."""
    for word in re.findall(r"[a-z]+", re.sub(r"['’]", "", question.lower())):
        for form in (word, word.removesuffix("s"), word.removesuffix("m")):
            if form in _QUESTION_WORDS:
                return form
    return "other"


def tweet_features(tweet):
    """Five booleans about a tweet, as the predictions file reports them: {"has_hashtag": True, ...}."""
    without_urls = re.sub(r"https?://\S+|www\.\S+|pic\.twitter\.com\S*", " ", tweet)
    return {
        "has_hashtag": bool(re.search(r"(?<!\w)[#＃]\w", without_urls)),
        "has_handle": bool(re.search(r"(?<!\w)@\w", without_urls)),
        "has_url": without_urls != tweet,
        "has_number": bool(re.search(r"\d", without_urls)),
        "has_emoji": bool(_EMOJI.search(tweet)),
    }


def reference_list(references):
    """The references themselves, or ValueError unless they are a list of at least one string."""
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of at least one string, not {references!r}")
    return references
