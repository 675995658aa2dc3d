"""
Judges the toy contest: runs the program on the public tests and on the hidden ones.

The prompt shows the outputs at the public inputs; the hidden tests are the other six outputs of the
function that the prompt means (see language.py). What a program computes counts, not how it is
written. There is no partial credit: a program that passes nine of the ten tests gets reward 0, like
an invalid one.

    from data.contest.reward import score
    score('5804>', 'x5+')  ->  {'reward': 1.0, 'correct': 1.0, 'public': 1.0, 'valid': 1.0}
"""
from data.contest.language import HIDDEN, PROBLEMS, PUBLIC, run
from data.text import DataError


def score(prompt, response):
    """
    Judges a response, as decoded, without EOS: four numbers, each 0.0 or 1.0.

    reward and correct: it passes all ten tests; public: it passes the four that the prompt shows;
    valid: it is a program. Any response is fine; a prompt of no problem raises DataError.
    """
    if prompt not in PROBLEMS:
        raise DataError(f'not a problem of the contest: {prompt!r}; '
                        'data/contest/val.prompts.jsonl has examples')
    function, _ = PROBLEMS[prompt]
    valid = run(response, 0) is not None
    public = valid and all(run(response, x) == function[x] for x in PUBLIC)
    correct = public and all(run(response, x) == function[x] for x in HIDDEN)
    return {'reward': float(correct), 'correct': float(correct), 'public': float(public),
            'valid': float(valid)}
