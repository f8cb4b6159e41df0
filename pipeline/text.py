"""Small functions on text: SQuAD's normalization, when two tweets count as the same, question types, tweet features,
and the check of what `answer()` is given.

Used by the metrics, by the checks for leaked tweets, by the breakdown of the errors, and by `answer()`.
"""

import html
import re
import string
from collections.abc import Sequence
from numbers import Integral

_QUESTION_WORDS = {"what", "who", "how", "where", "why", "which", "when", "whose"}
UNPAIRED_SURROGATE = "contains an unpaired surrogate, which is not a valid character: fix the text"

_DOMAINS = (
    "com|org|net|edu|gov|mil|info|biz|app|dev|news|live|blog|shop|site|online|tech|link|page|co|ly|gl|gd|uk|tv|io|fm|"
    # Many of these are words too, and "did.It/they" is not a link.
    "(?-i:ae|ai|am|ar|at|au|be|br|ca|cc|ch|cl|cn|cz|de|dk|es|eu|fi|fr|gg|gr|gs|hk|hu|id|ie|il|im|in|is|it|jp|ke|kr|la|"
    "li|lt|me|ms|mu|mx|my|ng|nl|no|nz|pe|ph|pk|pl|pt|ro|ru|sa|se|sg|sh|so|st|th|tl|to|tr|tw|ua|us|vc|ws|za)|(?-i:BE|ME|TO|IT|US)"
)
_LINK = re.compile(
    r"(?:https?|ftp)\s?:\s?/[^\s…—]*"  # TweetQA's links end behind the slashes: "#Vogue100https:// Vogue (@Vogue)"
    r"|(?<!\w)htt(?:ps?)?:?(?:…|\.\.\.)"  # in a retweet they end even earlier: "http…"
    r"|(?<!\w)www\d?\.[^\s…—]*"
    r"|pic\.(?:twitter|x)\.com[^\s…—]*"  # often without a blank before it
    rf"|(?<![\w@.-])(?:[\w-]+\.)+(?:{_DOMAINS})(?::\d+)?/[^\s…—]*",  # t.co/a1, youtu.be/…, example.com/path
    re.IGNORECASE,
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE)
_HANDLE = re.compile(r"@[A-Za-z0-9_]+")
# A letter is needed: "#1" is a number. "C#" and "F#m" are notes. In TweetQA a line break before a hashtag is lost, so
# that many directly follow a word.
_HASHTAG = re.compile(r"(?<!\b[A-Ga-g])[#＃](?=\w*[^\W\d_])")
# Unicode's emoji (emoji-data.txt, property Emoji), whose blocks are taken as a whole above U+1F300. Those of older
# blocks that phones draw as text, such as © and ↔, count only with the variation selector that asks for a picture.
_EMOJI = re.compile(
    "[\u231a\u231b\u2328\u23cf\u23e9-\u23f3\u23f8-\u23fa\u25fd\u25fe"
    "\u2600-\u2604\u260e\u2611\u2614\u2615\u2618\u261d\u2620\u2622\u2623\u2626"
    "\u262a\u262e\u262f\u2638-\u263a\u2640\u2642\u2648-\u2653\u265f\u2660\u2663\u2665\u2666\u2668\u267b\u267e\u267f\u2692-\u2697"
    "\u2699\u269b\u269c\u26a0\u26a1\u26a7\u26aa\u26ab\u26b0\u26b1\u26bd\u26be\u26c4\u26c5\u26c8\u26ce\u26cf\u26d1\u26d3\u26d4\u26e9"
    "\u26ea\u26f0-\u26f5\u26f7-\u26fa\u26fd\u2702\u2705\u2708-\u270d\u270f\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744"
    "\u2747\u274c\u274e\u2753-\u2755\u2757\u2763\u2764\u2795-\u2797\u27a1\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55\U0001f004\U0001f0cf"
    "\U0001f170\U0001f171\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a\U0001f1e6-\U0001f1ff\U0001f201\U0001f202\U0001f21a"
    "\U0001f22f\U0001f232-\U0001f23a\U0001f250\U0001f251\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f7e0-\U0001f7f0"
    "\U0001f90c-\U0001f9ff\U0001fa70-\U0001faff](?!\ufe0e)"
    "|[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u24c2\u25aa"
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
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_counts(**options):
    """Raise ValueError or TypeError for an option of `answer()` that is not a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


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


def _is_sequence(value):
    """Whether a value has texts in an order: a list, a tuple, a column of `datasets`; a Series, an array."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", None) == 1


def _as_texts(name, value):
    """A list of strings of one argument of `answer()`."""
    if isinstance(value, str):
        texts = [value]
    elif _is_sequence(value):
        texts = list(value)
    else:
        kind, dimensions = type(value).__name__, getattr(value, "ndim", None)
        if kind == "DataFrame":
            kind += ": give one of its columns"
        elif dimensions is not None:
            kind += f" with {dimensions} dimensions"
        raise TypeError(
            f"{name} must be a string, or a list, tuple, Series or one-dimensional array of strings, not {kind}"
        )
    for position, text in enumerate(texts):
        where = name if isinstance(value, str) else f"{name} at position {position}"
        if not isinstance(text, str):
            missing = text is None or type(text).__name__ in ("NAType", "NaTType")
            missing = missing or (isinstance(text, float) and text != text)
            problem = f"missing ({text})" if missing else type(text).__name__
            raise TypeError(f"{where} is {problem}: it must be a string")
        if has_unpaired_surrogate(text):
            raise ValueError(f"{where} {UNPAIRED_SURROGATE}")
    return [str(text) for text in texts]  # numpy has its own class of str
