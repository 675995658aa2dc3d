"""
Judges whether a film review is positive: naive Bayes, in numpy, for data/sentiment.

    log odds(text) = sum over the different words w of text of
                     log P(w | positive) - log P(w | negative)
    P(w | class)   = (sentences of the class that hold w, + 1) / (the same summed over words, + V)

prepare.py trains it on a half of the sentences that neither the policies nor the reward model ever
see, so that a policy which fools its reward model does not fool the judge with the same mistake.

A word counts once, however often it is repeated; a word that is not in the judge's half does not
count. There is no class prior: both files hold equally many sentences. The judge knows no word
order and no negation ("not good" is "not" plus "good"), nor what a sentence is: read it next to
samples and evaluate's distinct-2.

    from data.sentiment.reward import score
    score('review: the film is', ' a moving surprise .')  ->  {'reward': 1.2, 'positive': 1.0}
"""
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.text import DataError

TABLES = Path(__file__).with_name('judge.npz')
WORD = re.compile(r"[\w']+|[^\w\s]")  # "isn't" is one word, "," another, "by-the-book" five
CLIP = 8.0  # nats: 1 real sentence in 50 goes beyond, and its label is then almost certain
JUDGE = {}  # word -> weight, read from TABLES at the first call of score


def words(text):
    """Returns the different lower-case words of `text`, in the order in which they appear."""
    return list(dict.fromkeys(WORD.findall(text.lower())))


def fit(positive, negative):
    """Trains on two lists of sentences; returns {word: weight} in nats, above 0: positive."""
    holding = [Counter(word for text in sentences for word in words(text))
               for sentences in (positive, negative)]   # in how many sentences each word is
    vocabulary = sorted(holding[0] | holding[1])
    counts = np.array([[held[word] for word in vocabulary] for held in holding])
    totals = counts.sum(axis=1, keepdims=True)
    logprobs = np.log((counts + 1) / (totals + len(vocabulary)))  # Laplace: no word is impossible
    return dict(zip(vocabulary, (logprobs[0] - logprobs[1]).tolist()))


def log_odds(judge, text):
    """Returns log P(positive) - log P(negative) of `text`, in nats; 0 if it has no known word."""
    return sum((judge[word] for word in words(text) if word in judge), 0.0)


def save(path, judge):
    """Writes {word: weight} to an .npz of plain arrays; the same judge gives the same bytes."""
    np.savez(path, words=np.array(list(judge)), weights=np.array(list(judge.values())))


def load(path):
    """Reads {word: weight}; raises DataError if there is no such file."""
    if not path.is_file():
        raise DataError(f"{path}: the judge's tables are missing; "
                        'run: python -m data.sentiment.prepare')
    with np.load(path, allow_pickle=False) as tables:
        return dict(zip(tables['words'].tolist(), tables['weights'].tolist()))


def score(prompt, response):
    """
    Judges one response (text): {'reward': float, 'positive': 1.0 or 0.0}.

    `reward` is the log odds of the whole response, clipped to +-CLIP: once a sentence is certainly
    positive, more praise earns nothing. Words are treated as independent, so the log odds are too
    extreme: read them as an order, not as probabilities. `positive` is 1.0 where they are above 0;
    without a known word both are 0.0. The prompt is not read: the policy did not write it.
    """
    if not JUDGE:
        JUDGE.update(load(TABLES))
    odds = log_odds(JUDGE, response)
    return {'reward': max(-CLIP, min(CLIP, odds)), 'positive': float(odds > 0)}
