"""Small functions on text: SQuAD's normalization, when two tweets count as the same, question types, tweet features, and
the check of what `answer()` is given.

Used by the metrics, by the checks for leaked tweets, by the breakdown of the errors, and by `answer()`.
"""

import html
import re
import string
from collections.abc import Sequence

_QUESTION_WORDS = {"what", "who", "how", "where", "why", "which", "when", "whose"}
UNPAIRED_SURROGATE = "contains an unpaired surrogate, which is not a valid character: fix the text"

_TOP_LEVEL = "com|org|net|edu|gov|mil|int|info|biz|app|dev|news|live|blog|shop|site|online|tech|link|page|video|[a-z]{2}"
_LINK = re.compile(
    r"(?:https?|ftp)\s?:\s?/\S*"  # TweetQA's links end behind the slashes: "#Vogue100https:// VOGUE (@BritishVogue)"
    r"|(?<!\w)htt(?:ps?)?:?(?:…|\.\.\.)"  # a retweet ends even earlier: "http…"
    r"|(?<!\w)www\d?\.\S*"
    r"|pic\.(?:twitter|x)\.com\S*"  # often without a blank before it
    rf"|(?<![\w@.-])(?:[\w-]+\.)+(?:{_TOP_LEVEL})(?::\d+)?/\S*",  # t.co/a1, youtu.be/…, example.com/path
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE)
_HANDLE = re.compile(r"@[A-Za-z0-9_]+")
# A letter is needed: "#1" is a number. "C#" and "F#m" are notes. In TweetQA a line break before a hashtag is lost, so
# that many directly follow a word.
_HASHTAG = re.compile(r"(?<!\b[A-Ga-g])[#＃](?=\w*[^\W\d_])")
# Unicode's emoji (emoji-data.txt, property Emoji), whose blocks are taken as a whole above U+1F300. Those of older
# blocks that phones draw as text, such as © and ↔, count only with the variation selector that asks for a picture.
_EMOJI = re.compile(
    "[\u231a\u231b\u23e9-\u23ec\u23f0\u23f3\u25fd\u25fe\u2600-\u2604\u260e\u2611\u2614\u2615\u2618\u261d\u2620\u2622\u2623\u2626"
    "\u262a\u262e\u262f\u2638-\u263a\u2640\u2642\u2648-\u2653\u265f\u2660\u2663\u2665\u2666\u2668\u267b\u267e\u267f\u2692-\u2697"
    "\u2699\u269b\u269c\u26a0\u26a1\u26a7\u26aa\u26ab\u26b0\u26b1\u26bd\u26be\u26c4\u26c5\u26c8\u26ce\u26cf\u26d1\u26d3\u26d4\u26e9"
    "\u26ea\u26f0-\u26f5\u26f7-\u26fa\u26fd\u2702\u2705\u2708-\u270d\u270f\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744"
    "\u2747\u274c\u274e\u2753-\u2755\u2757\u2763\u2764\u2795-\u2797\u27a1\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55\U0001f004\U0001f0cf"
    "\U0001f170\U0001f171\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a\U0001f1e6-\U0001f1ff\U0001f201\U0001f202\U0001f21a"
    "\U0001f22f\U0001f232-\U0001f23a\U0001f250\U0001f251\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f7e0-\U0001f7f0"
    "\U0001f90c-\U0001f9ff\U0001fa70-\U0001faff](?!\ufe0e)"
    "|[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u2328\u23cf\u23ed-\u23ef\u23f1\u23f2\u23f8-\u23fa\u24c2\u25aa"
    "\u25ab\u25b6\u25c0\u25fb\u25fc\u2934\u2935\u2b05-\u2b07\u3030\u303d\u3297\u3299]\ufe0f"
    "|[0-9#*]\ufe0f?\u20e3"  # a keycap
)


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
    """Five booleans about a tweet, as the predictions file reports them: {"has_hashtag": True, ...}.

    has_url: a link, also one that is cut off behind `https://`: with a scheme, or with `www.`, or a host and a path
        (`t.co/a1`). The name of a site alone (CNN.com) is not one.
    has_hashtag: # and a word that has a letter. A # alone and #1 are not hashtags.
    has_handle: @ and a letter, a digit or an underscore, also directly behind a word. An e-mail address is not one.
    has_number: a digit, also in a word or a hashtag (1st, #Thor3), but not in a link, a handle or an e-mail address.
        Numbers in words (twenty) do not count.
    has_emoji: an emoji of Unicode's list, keycaps and flags included. ☆, ♡, ✓ and © are text.
    """
    text = html.unescape(tweet) if "&" in tweet else tweet  # some tweets have &#39; for an apostrophe
    without_links = _LINK.sub(" ", text)
    words = _EMAIL.sub(" ", without_links)
    return {
        "has_hashtag": bool(_HASHTAG.search(words)),
        "has_handle": bool(_HANDLE.search(words)),
        "has_url": without_links != text,
        "has_number": bool(re.search(r"\d", _HANDLE.sub(" ", words))),
        "has_emoji": bool(_EMOJI.search(words)),
    }


def reference_list(references):
    """The references themselves, or ValueError unless they are a list of at least one string."""
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of at least one string, not {references!r}")
    return references


def has_unpaired_surrogate(text):
    """Whether a string contains half of a surrogate pair, which no tokenizer and no file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def paired_texts(question, tweet):
    """The question and the tweet that `answer()` is given, as two lists of strings of the same length.

    A single text is repeated for each of the others. Raises TypeError for what is not a text or a sequence of texts,
    and ValueError for lists of different lengths and for text that cannot be encoded. Positions are counted from 0.
    """
    questions, tweets = _as_texts("question", question), _as_texts("tweet", tweet)
    if isinstance(question, str):
        questions = questions * len(tweets)
    elif isinstance(tweet, str):
        tweets = tweets * len(questions)
    if len(questions) != len(tweets):
        raise ValueError(f"{len(questions)} questions, but {len(tweets)} tweets: the lists must have the same length")
    return questions, tweets


def _as_texts(name, value):
    """A list of strings of one argument of `answer()`."""
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        texts = list(value)
    elif getattr(value, "ndim", None) == 1:  # a Series, an Index, an array of numpy or pandas
        texts = list(value)
    else:
        kind = type(value).__name__
        if getattr(value, "ndim", None) is not None:
            hint = " (give one of its columns)" if kind == "DataFrame" else f" with {value.ndim} dimensions"
        else:
            hint = "" if value is None or isinstance(value, (bytes, bytearray)) else " (list(...) makes a list of it)"
        raise TypeError(
            f"{name} must be a string, or a list, tuple, Series or one-dimensional array of strings, not {kind}{hint}"
        )
    for position, text in enumerate(texts):
        where = name if isinstance(value, str) else f"{name} at position {position}"
        if not isinstance(text, str):
            missing = text is None or type(text).__name__ in ("NAType", "NaTType")
            missing = missing or (isinstance(text, float) and text != text)
            problem = f"is missing ({text}): it" if missing else f"is {type(text).__name__}: it"
            raise TypeError(f"{where} {problem} must be a string")
        if has_unpaired_surrogate(text):
            raise ValueError(f"{where} {UNPAIRED_SURROGATE}")
    return [str(text) for text in texts]  # numpy has its own class of str
