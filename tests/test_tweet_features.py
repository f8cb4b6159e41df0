"""The features of a tweet, as its writer or reader would see them; and on the real data, how many tweets have each."""

import json

import pytest

from helper_functions import tweet_features


def features(tweet):
    return {name.removeprefix("has_") for name, there in tweet_features(tweet).items() if there}


LINKS = """
#Vogue100https:// British Vogue (@name)
Second Termhttps://8 Fars
http:// someone
HTTPS://T.CO/aB3
see Https://t.co/a1#b
RT: who do you have? http…
RT: breaks it down. https:/…
cut off https://…
cut off HTTP...
https: //t.co/abc
t.co/Ab9
(T.CO/abc)
pic.twitter.com/abc123
readypic.twitter.com/abc123
PIC.TWITTER.COM/ABC
pic.x.com/abc
www.example.com
WWW.Example.org/2017
www.…
youtu.be/dQw4w9WgXcQ
YouTu.be/dQw4
YOUTU.BE/DQW4
T.Co/Abc
readyyoutu.be/dQw4
bit.ly/2x3y
goo.gl/maps/abc
example.com/path
example.com:8080/path?q=1
bbc.co.uk/news/12345
nyti.ms/2abc
fb.me/123
instagram.com/p/BcD1
sub-domain.gov.uk/a-b_c
ftp://files.example.com
"""


@pytest.mark.parametrize("tweet", LINKS.strip().split("\n"))
def test_a_link_is_seen_however_it_is_written_and_its_digits_are_no_number(tweet):
    assert "url" in features(tweet)
    assert ("number" in features(tweet)) == ("100" in tweet)  # of #Vogue100
    assert "emoji" not in features(tweet)


NO_LINKS = """
CNN.com story
InsideHoops.com NBA
write to careers@arbys.com
Washington, D.C./Maryland
w/o w/e and/or
he did.He/she
he did.he/she
said it.It/they
3.5/10
http is a protocol
awww.so sweet
T.Swift
the U.S. of A.
://
Mr. Smith/Jones
"""


@pytest.mark.parametrize("tweet", NO_LINKS.strip().split("\n"))
def test_what_is_not_a_link(tweet):
    assert "url" not in features(tweet)


HASHTAGS = """
#Gold at last
(#gold)
.#gold
&#Gold
＃日本
#2A rights
#6Californias
#été
@kanyewest#VMAs
love#CallGod
#a_b
"""


@pytest.mark.parametrize("tweet", HASHTAGS.strip().split("\n"))
def test_hashtags(tweet):
    assert "hashtag" in features(tweet)


NO_HASHTAGS = """
#1 in the charts
we're #1!
# Kelly Clarkson
sealing the WIN!!#
I&#39;m here
&#10;And
#️⃣
C#minor
in F#m
c#
t.co/a#b
##
#!
"""


@pytest.mark.parametrize("tweet", NO_HASHTAGS.strip().split("\n"))
def test_what_is_not_a_hashtag(tweet):
    assert "hashtag" not in features(tweet)


@pytest.mark.parametrize(
    "tweet", [".@team wins", "(@a_1)", "by@team", "“@NASA: go”", "@Verizon@giphy", "RT @x:", "@1stteam"]
)
def test_handles(tweet):
    assert features(tweet) == {"handle"}  # a handle's digits are no number


@pytest.mark.parametrize(
    "tweet",
    ["a.b@mail.com", "first.last+2@my-mail.co.uk.", "@ Jeopardy!", "lunch @ noon", "@", "@!", "x@y.org, z@y.org"],
)
def test_what_is_not_a_handle(tweet):
    assert features(tweet) == set()


@pytest.mark.parametrize(
    "tweet", ["won 3", "the 1st", "4pm", "#1", "2nd-half", "50%", "MH370", "1️⃣", "٣ days", "in 2016."]
)
def test_numbers(tweet):
    assert "number" in features(tweet)


@pytest.mark.parametrize(
    "tweet",
    ["twenty", "no one", "@user123 hi", "I&#39;m", "t.co/12", "me2@mail4.com", "https://8", "½ a pound", "IV", "²"],
)
def test_what_is_not_a_number(tweet):
    assert "number" not in features(tweet)


EMOJI = [
    "love ❤️ it",
    "❤",
    "♥",
    "🇺🇸",
    "👩‍👩‍👧",
    "🤙🏾",
    "1️⃣",
    "#️⃣",
    "*⃣",
    "☀",
    "✈️",
    "⌚",
    "⏱",
    "™️",
    "©️",
    "‼️",
    "↔️",
    "▶️",
    "🫠",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "☹",
    "⭐",
]


@pytest.mark.parametrize("tweet", EMOJI)
def test_emoji(tweet):
    assert "emoji" in features(tweet)


@pytest.mark.parametrize(
    "tweet",
    ["™", "©", "®", "→", "★ ☆ ♡ ✓ ♪", "日本語", "ㅤ\u200d", "🅙🅐🅨", "𝔼𝕓", "①", ":-)", "¯\\_(ツ)_/¯", "1", "☺︎", "️", "⠀"],
)
def test_what_is_not_an_emoji(tweet):
    assert "emoji" not in features(tweet)


def test_nothing_and_everything():
    assert features("") == features("plain words — and “quotes”") == set()
    assert features("🚀 #Go2 @nasa www.nasa.gov") == {"emoji", "hashtag", "number", "handle", "url"}


def test_the_real_tweets(tweet_qa):
    """The counts of the 6,732 distinct tweets, of which samples were looked at."""
    tweets = {
        row["Tweet"]
        for name in ("train", "validation", "test")
        for row in json.loads((tweet_qa / f"{name}.json").read_text())
    }
    assert len(tweets) == 6732
    counts = {name: sum(tweet_features(tweet)[name] for tweet in tweets) for name in tweet_features("")}
    assert counts == {"has_hashtag": 2458, "has_handle": 6729, "has_url": 51, "has_number": 6728, "has_emoji": 539}
    cut_off = [tweet for tweet in tweets if "https://" in tweet or "http://" in tweet]
    assert len(cut_off) == 49 and all(tweet_features(tweet)["has_url"] for tweet in cut_off)


def test_long_text_takes_no_long_time():
    """None of the expressions looks at a text again and again."""
    for part in ("x", "a.", "#1", "a@a.", "-", "http", "@", "1", "&#", "w.", "#️"):
        tweet_features(part * (200_000 // len(part)))
