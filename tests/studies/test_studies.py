"""
The studies: their tables, claims and pictures, and the quick form of each.

    python -m pytest -q tests/studies/test_studies.py
"""
import importlib, math, random, shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from prefgpt import UserError
from studies import toy
from studies.style import show_picture
from studies.table import (SMOKE_TEST, append_rows, by_seed, complete, mean_and_spread, read_rows,
                           select, show_claims, show_means, spreads_by, table_and_seeds)

TOP = Path(__file__).parents[2]


def test_rows_come_back_as_they_were_written(tmp_path):
    """Numbers as numbers, text as text, 4 digits of a float; later rows are added at the end. Other
    columns are refused, and the table stays as it is: csv would shift the cells."""
    path = tmp_path / 'results' / 'name.csv'
    assert read_rows(path) == []
    first = {'seed': 5, 'stage': 'ppo, "late"', 'reward': 1 / 3, 'refused': ''}
    append_rows(path, [first])
    append_rows(path, [{**first, 'seed': 6, 'reward': -2.0}, {**first, 'seed': 7}])
    with pytest.raises(UserError, match='name.csv has other columns'):
        append_rows(path, [{'seed': 8, 'kl': 1.0}])
    rows = read_rows(path)
    assert [row['seed'] for row in rows] == [5, 6, 7] and rows[1]['reward'] == -2
    assert rows[0] == {**first, 'reward': 0.3333}
    assert [p.name for p in path.parent.iterdir()] == ['name.csv']      # nothing half-written


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
    for seeds in ('', '5-9', 'five'):
        with pytest.raises(UserError, match='--seeds'):
            run(replace(cfg, seeds=seeds))


def test_rows_by_hand(capsys):
    """Selected, by seed, and grouped with means and n - 1 deviations in the order they come: 1, 2,
    6 give 3 ± sqrt(7)."""
    rows = [{'seed': seed, 'T': T, 'reward': reward}
            for seed, T, reward in ((0, 4, 1.0), (1, 4, 3.0), (0, 1, 5.0))]
    assert select(rows, seed=0, T=1) == rows[2:] and select(rows) == rows
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert spreads_by(rows, 'T', 'reward') == ([4, 1], [2.0, 5.0], [math.sqrt(2), 0.0])
    assert by_seed(rows, 'T') == {0: {4: rows[0], 1: rows[2]}, 1: {4: rows[1]}}
    assert by_seed(rows[:1], 'T', 'reward') == {0: {(4, 1.0): rows[0]}}
    show_means([{'stage': 'ppo', 'reward': reward} for reward in (1, 2, 6)]
               + [{'stage': 'sft', 'reward': 4}], ('stage',), ('reward',))
    *_, ppo, sft = capsys.readouterr().out.splitlines()
    assert ppo.split() == ['ppo', '3.000', f'±{math.sqrt(7):.3f}']
    assert sft.split() == ['sft', '4.000', '±0.000']


def test_claims_are_counted_by_seed(capsys):
    """Of three seeds two keep the claim: the third is named. In the quick form claims are read, so
    that a slip in one shows, and nothing is said of any."""
    claims = {'more than one': lambda run: run > 1}
    assert show_claims(claims, {5: 2, 6: 1, 7: 3}) == {'more than one': [6]}
    assert 'more than one: holds in 2 of 3 seeds, not [6]' in capsys.readouterr().out
    assert show_claims(claims, {5: 2}, quick=True)
    assert capsys.readouterr().out.strip() == SMOKE_TEST
    with pytest.raises(KeyError):
        show_claims({'a slip': lambda run: run['typo']}, {5: {}}, quick=True)


# In how many seeds each claim fails, in the order in which the claims are printed
FAILED = {'bandit': [0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0], 'blind_spot': [0, 0, 0, 1, 5, 14],
          'contest': [0, 0, 0, 0, 0, 5, 0, 0, 0, 3, 5, 0, 0, 2, 3, 3, 2, 4, 5, 4, 0],
          'kl_race': [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0],
          'safety': [0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0], 'toy': [0] * 8}


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


# Claims that hold where all runs are alike: that one number is not far from, or below, another
ALIKE = {'bandit': [3, 6, 10], 'blind_spot': [2], 'contest': [5], 'kl_race': [7], 'safety': [6],
         'toy': []}


@pytest.mark.parametrize('name', FAILED)
def test_every_claim_can_fail_and_can_hold(name):
    """Where all numbers are 0.5, no claim holds but those; of numbers drawn at random each one is
    false somewhere, and true somewhere unless a committed seed keeps it."""
    claims = importlib.import_module(f'studies.{name}').CHECKS.values()

    def run(number):        # bandit's runs hold numbers, the others' hold rows
        return defaultdict(number if name == 'bandit' else lambda: defaultdict(number))
    assert [i for i, holds in enumerate(claims) if holds(run(lambda: 0.5))] == ALIKE[name]
    random.seed(0)
    runs = [run(lambda: random.uniform(-1, 1)) for _ in range(300)]
    for holds, failed in zip(claims, FAILED[name]):
        found = {bool(holds(run)) for run in runs}
        assert False in found and (True in found or failed <= 2)


@pytest.mark.parametrize('name, panels', [('bandit', 6), ('contest', 6), ('kl_race', 5),
                                          ('length', 8), ('safety', 5)])
def test_the_pictures(name, panels, tmp_path):
    """All panels of a picture can be drawn of a single seed, and say what they show."""
    pytest.importorskip('matplotlib')
    rows = read_rows(TOP / f'studies/results/{name}.csv')
    rows = select(rows, seed=rows[0]['seed'])
    figure = importlib.import_module(f'studies.{name}').draw(rows)
    figure.savefig(tmp_path / 'picture.png')
    assert len(figure.axes) == panels
    assert all(ax.get_title(loc='left') or ax.get_xlabel() for ax in figure.axes)


def quick_form(name, folder, monkeypatch, capsys, seeds='3 4'):
    """
    Runs a study's quick form, twice, in a folder; returns its rows. It runs the first seed, writes
    one table and no picture, and passes no verdict. The second time it runs nothing.
    """
    study = importlib.import_module(f'studies.{name}')
    shutil.copytree(TOP / 'data', folder / 'data', ignore=shutil.ignore_patterns(
        '*.jsonl', '__pycache__', 'toy-*', 'contest-*', '*.gz', '*.zip'))
    monkeypatch.chdir(folder)
    cfg = study.Config(seeds=seeds, quick=True)
    study.main(cfg)
    first, path = capsys.readouterr().out, Path(f'out/studies/{name}-quick.csv')
    assert list(path.parent.iterdir()) == [path] and not Path('studies').exists()
    monkeypatch.setattr('studies.table.append_rows', None)
    study.main(cfg)
    shown = capsys.readouterr().out
    assert first.endswith(shown) and SMOKE_TEST in shown and 'hold' not in shown
    rows = read_rows(path)
    assert {row['seed'] for row in rows} == {int(seeds[0])}
    assert all(f'python -m studies.{name} ' in row['command'] for row in rows)
    return rows


def test_toy_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Six rows a seed with the judge's columns."""
    rows = quick_form('toy', tmp_path, monkeypatch, capsys)
    assert [(row['answers'], row['stage']) for row in rows] == [
        (answers, stage) for answers in ('T=1', 'greedy') for stage in ('sft', 'dpo', 'ppo')]
    assert all({'reward', 'reward_se', 'harm', 'kl', 'win', 'rm_accuracy'} <= set(row)
               for row in rows)
