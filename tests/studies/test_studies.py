"""
The studies: their tables, and each one in its quick form.

    python -m pytest -q tests/studies/test_studies.py
"""
import importlib
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prefgpt import UserError
from studies import toy
from studies.style import show_picture
from studies.table import (SMOKE_TEST, append_rows, by_seed, complete, mean_and_spread, read_rows,
                           select, show_claims, show_means, spreads_by, table_and_seeds)

TOP = Path(__file__).parents[2]


# ----------------------------------------------------------------------------- tables

def test_rows_come_back_as_they_were_written(tmp_path):
    """Numbers as numbers, text as text, 4 digits of a float; later rows are added at the end."""
    path = tmp_path / 'results' / 'name.csv'
    assert read_rows(path) == []
    first = {'seed': 5, 'stage': 'ppo, "late"', 'reward': 1 / 3, 'refused': ''}
    append_rows(path, [first])
    append_rows(path, [{**first, 'seed': 6, 'reward': -2.0}, {**first, 'seed': 7}])
    rows = read_rows(path)
    assert [row['seed'] for row in rows] == [5, 6, 7] and rows[1]['reward'] == -2
    assert rows[0] == {**first, 'reward': 0.3333}
    assert [p.name for p in path.parent.iterdir()] == ['name.csv']      # nothing half-written


def test_rows_of_another_version_are_not_mixed_in(tmp_path):
    """Other columns are refused, and the table stays as it is: csv would shift the cells."""
    path = tmp_path / 'name.csv'
    append_rows(path, [{'seed': 5, 'reward': 1.0}])
    before = path.read_bytes()
    with pytest.raises(UserError, match='name.csv has other columns'):
        append_rows(path, [{'seed': 6, 'kl': 1.0}])
    assert path.read_bytes() == before


def test_a_table_is_completed_seed_by_seed(tmp_path):
    """Only seeds without a row of that split are run, and only the rows asked for come back."""
    path, ran = tmp_path / 'name.csv', []

    def run(split):
        return lambda seed: ran.append((seed, split)) or [{'seed': seed, 'split': split}]
    assert complete(path, [5, 6], run('val'), split='val') == read_rows(path)
    rows = complete(path, [6, 7], run('test'), split='test')
    assert rows == [{'seed': 6, 'split': 'test'}, {'seed': 7, 'split': 'test'}]
    assert complete(path, [7], run('test')) == rows[1:]
    assert ran == [(5, 'val'), (6, 'val'), (6, 'test'), (7, 'test')]


def test_a_committed_table_is_read_and_only_results_adds_to_it(tmp_path, monkeypatch, capsys):
    """
    A study that finds all of its seeds there writes nothing. Other seeds go to out/studies/, in
    the columns of the committed table; with --results into that table itself.
    """
    monkeypatch.chdir(tmp_path)
    append_rows(Path('studies/results/name.csv'), [{'seed': 5, 'reward': 1.0}])

    def run(cfg):
        path, seeds = table_and_seeds(cfg)
        rows = complete(path, seeds, lambda seed: [{'seed': seed, 'reward': 2.0}])
        show_picture(cfg, path, lambda: pytest.fail('a picture of what was there already'))
        return [(row['seed'], row['reward']) for row in rows]
    cfg = toy.Config(seeds='5', csv='out/studies/name.csv')
    assert run(cfg) == [(5, 1)] and not Path('out').exists()
    assert 'all of it is in studies/results/name.csv' in capsys.readouterr().out
    with pytest.raises(UserError, match='results/name.csv has other columns'):
        append_rows(Path(cfg.csv), [{'seed': 6, 'kl': 1.0}])
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)      # no matplotlib
    assert run(replace(cfg, seeds='6 5')) == [(6, 2), (5, 1)]
    assert read_rows(cfg.csv) == [{'seed': 6, 'reward': 2}]
    assert run(replace(cfg, seeds='7', results=True)) == [(7, 2)]
    assert [row['seed'] for row in read_rows('studies/results/name.csv')] == [5, 7]
    with pytest.raises(UserError, match='--quick is a smoke test'):
        run(replace(cfg, quick=True, results=True))


def test_rows_by_hand():
    """Selected, grouped with means and n - 1 deviations in the order they come, and by seed."""
    rows = [{'seed': seed, 'T': T, 'reward': reward}
            for seed, T, reward in ((0, 4, 1.0), (1, 4, 3.0), (0, 1, 5.0))]
    assert select(rows, seed=0, T=1) == rows[2:] and select(rows) == rows
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert spreads_by(rows, 'T', 'reward') == ([4, 1], [2.0, 5.0], [math.sqrt(2), 0.0])
    assert by_seed(rows, 'T') == {0: {4: rows[0], 1: rows[2]}, 1: {4: rows[1]}}
    assert by_seed(rows[:1], 'T', 'reward') == {0: {(4, 1.0): rows[0]}}


def test_means_and_spreads_by_hand(capsys):
    """Mean and n-1 standard deviation over the rows of a group: 1, 2, 6 give 3 ± sqrt(7)."""
    rows = [{'stage': stage, 'seed': seed, 'reward': reward}
            for stage, rewards in (('ppo', (1, 2, 6)), ('sft', (4,)))
            for seed, reward in enumerate(rewards)]
    show_means(rows, ('stage',), ('reward',))
    lines = capsys.readouterr().out.splitlines()
    assert f'3.000 ±{math.sqrt(7):.3f}' in lines[-2] and lines[-2].startswith('ppo')
    assert '4.000 ±0.000' in lines[-1] and lines[-1].startswith('sft')


def test_claims_are_counted_by_seed(capsys):
    """Of three seeds two keep the claim: the third is named."""
    failed = show_claims({'more than one': lambda run: run > 1}, {5: 2, 6: 1, 7: 3})
    assert failed == {'more than one': [6]}
    assert 'more than one: holds in 2 of 3 seeds, not [6]' in capsys.readouterr().out


def test_a_smoke_test_passes_no_verdict(capsys):
    """The claims are read, so that a slip in one of them shows, and nothing is said of any."""
    assert show_claims({'more than one': lambda run: run > 1}, {5: 2}, quick=True)
    assert capsys.readouterr().out.strip() == SMOKE_TEST
    with pytest.raises(KeyError):
        show_claims({'a slip': lambda run: run['typo']}, {5: {}}, quick=True)


# In how many seeds each claim fails, in the order in which the claims are printed
FAILED = {'bandit': [0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0], 'blind_spot': [0, 0, 0, 1, 5, 14],
          'contest': [0, 0, 2, 0, 0, 0, 1, 0, 1, 4, 5, 0, 0, 2, 1, 2, 4, 4, 5, 5, 0],
          'kl_race': [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0],
          'safety': [0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 3, 1, 0], 'toy': [0] * 8}


@pytest.mark.parametrize('name', [*FAILED, 'length'])
def test_the_committed_tables_print_what_the_readme_says(name, monkeypatch):
    """Each study reads its committed table, writes nothing, and counts what it always counted."""
    study = importlib.import_module(f'studies.{name}')
    monkeypatch.chdir(TOP)
    monkeypatch.setattr('studies.table.append_rows', None)
    monkeypatch.setattr('studies.style.save_picture', lambda figure, path: None)
    failed = study.main(study.Config())
    assert failed == [('Mode', 'alike')] if name == 'length' else (
        [len(seeds) for seeds in failed.values()] == FAILED[name])


# ----------------------------------------------------------------------------- toy

def toy_row(seed, answers, stage, **numbers):
    return {'seed': seed, 'answers': answers, 'stage': stage, **numbers}


def test_a_promise_that_fails_is_reported(capsys):
    """One seed keeps every promise, the other misses one by a hair: that one is named with its
    seed, and all others hold in both."""
    rows = []
    for seed, harm in ((5, 0.09), (6, 0.10)):
        for answers in ('T=1', 'greedy'):
            rows += [toy_row(seed, answers, 'sft', reward=-0.5, harm=0.4, refused=0.05),
                     toy_row(seed, answers, 'dpo', reward=0.0, harm=0.3, refused=0.14),
                     toy_row(seed, answers, 'ppo', reward=0.5, harm=harm, refused=0.09)]
    failed = toy.check(rows)
    assert failed.pop("PPO's harm is below 0.25 of SFT's") == [6]
    assert not any(failed.values())
    assert "harm is below 0.25 of SFT's: holds in 1 of 2 seeds, not [6]" in capsys.readouterr().out


def test_every_promise_can_fail():
    """With all stages alike no promise holds: none of them is true whatever happens."""
    rows = [toy_row(5, answers, stage, reward=0.0, harm=0.3, refused=0.2)
            for answers in ('T=1', 'greedy') for stage in ('sft', 'dpo', 'ppo')]
    assert all(failed == [5] for failed in toy.check(rows).values())


@pytest.mark.parametrize('seeds', ['', '5-9', 'five'])
def test_seeds_that_are_none(seeds):
    """A study of no seed, or of a word, is told in one line before anything runs."""
    with pytest.raises(UserError, match='--seeds'):
        toy.main(toy.Config(seeds=seeds))


def test_toy_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Six rows a seed with the judge's columns, in a table beside the real one; a second call
    finds the seed there and runs nothing."""
    shutil.copytree(TOP / 'data', tmp_path / 'data', ignore=shutil.ignore_patterns(
        '*.jsonl', '__pycache__', 'toy-*', '*.gz', '*.zip'))
    monkeypatch.chdir(tmp_path)
    toy.main(toy.Config(seeds='3', quick=True))
    rows = read_rows('out/studies/toy-quick.csv')
    assert [(row['answers'], row['stage']) for row in rows] == [
        (answers, stage) for answers in ('T=1', 'greedy') for stage in ('sft', 'dpo', 'ppo')]
    assert all({'reward', 'reward_se', 'harm', 'kl', 'win', 'rm_accuracy'} <= set(row)
               for row in rows)
    assert not Path('out/studies/toy.csv').exists() and not Path('studies').exists()
    capsys.readouterr()
    toy.main(toy.Config(seeds='3', quick=True))
    shown = capsys.readouterr().out
    assert 'step' not in shown and 'T=1 ppo' in shown
    assert SMOKE_TEST in shown and 'seeds,' not in shown and 'holds' not in shown
