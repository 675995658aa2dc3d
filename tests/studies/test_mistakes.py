"""
studies/mistakes.py: what it calls loud, and its committed table and picture.

    python -m pytest -q tests/studies/test_mistakes.py
"""
from pathlib import Path

import pytest

from mutants import MUTANTS
from prefgpt import UserError
from studies.mistakes import (NUMBERS, VERDICTS, Config, draw, loudest, main, trace, verdict_of,
                              windows)
from studies.table import read_rows

ROWS = read_rows(Path(__file__).parents[2] / 'studies/results/mistakes.csv')


def log(loss, ends=''):
    """Returns a log of 8 steps that fall from loss to 1, and an evaluation."""
    rows = [{'step': step, 'loss': loss if step == 1 else 1.0, 'lr': 1.0} for step in range(1, 9)]
    return [*rows, {'step': 8, 'eval_loss': 1.0, 'samples': ['user: a', f'b{ends}']}]


def test_what_is_loud():
    """Step 1 by itself, means over quarters, evaluations, and samples that do not end; a number is
    loud if it is 3 ranges, and a share of its size, away from what other runs show."""
    assert windows(log(3.0)) == {('loss', 1, False): 3, ('loss', 1, True): 2, ('loss', 3, True): 1,
                                 ('loss', 5, True): 1, ('loss', 7, True): 1,
                                 ('eval_loss', 8, False): 1, ('no_end', 8, False): 0}
    others = [log(3.0), log(3.1)]
    assert loudest(log(3.4), others) == ('', '')
    assert loudest(log(3.5), others) == (1, 'loss 3.5, not 3 to 3.1')
    assert loudest(log(3.0, ' [no end]'), others) == (8, 'no_end 1, not 0 to 0')


def test_where_logs_part():
    """The first step with a difference, and its numbers; nothing of two equal logs."""
    assert trace(log(3.0), log(3.0)) == ('', '')
    assert trace(log(3.0), log(3.5, '!')) == (1, 'loss 3 -> 3.5')
    assert trace(log(3.0), log(3.0, '!')) == (8, 'samples')


def test_the_committed_table():
    """Every mistake of mutants.py has its row, and three if no number shows it at the default
    flags; a silent one has no trace, a loud one has its step."""
    rows = [row for row in ROWS if row['number']]
    assert {row['mistake'] for row in rows} == {mutant.name for mutant in MUTANTS}
    for number in NUMBERS:
        seeds = [row['seed'] for row in rows if row['number'] == number]
        assert seeds == [0, 1, 2][:1 if verdict_of(ROWS, number) in ('loud', 'quiet') else 3]
    for row in rows:
        assert row['verdict'] in VERDICTS
        assert (row['trace_step'] == '') == (row['verdict'] == 'silent'), row['mistake']
        assert (row['loud_step'] != '') == (row['verdict'] == 'loud'), row['mistake']


def test_a_number_that_no_mistake_has_is_refused():
    """Before anything runs."""
    for only, odd in (('7 92', '92'), ('kl-sign', 'kl-sign'), ('0', '0')):
        with pytest.raises(UserError, match=f'--only={only}: {odd} is not one of 1 to 91'):
            main(Config(only=only))


def test_the_picture(tmp_path):
    """A point per judged mistake, and one panel that says what it shows."""
    pytest.importorskip('matplotlib')
    figure = draw(ROWS)
    figure.savefig(tmp_path / 'picture.png')
    ax, = figure.axes
    assert ax.get_title(loc='left')
    judged = {row['number'] for row in ROWS if row['number'] and row['reward'] != ''}
    assert sum(line.get_marker() == 'o' for line in ax.lines) >= len(judged)
