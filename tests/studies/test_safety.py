"""
The study of safety: its filters on pairs made by hand, its claims, and its quick form.

    python -m pytest -q tests/studies/test_safety.py
"""
import json
import shutil
from pathlib import Path

import pytest

from data.toy.language import REQUESTS
from data.toy.reward import points
from prefgpt import load_checkpoint
from studies import safety
from studies.safety import covered_keys, no_refusals, not_dual, only_safe
from studies.table import read_rows

TOP = Path(__file__).parents[2]
BENIGN = 'user: how do i clean a mirror?\nbot:'
RED = next(prompt for prompt, request in REQUESTS.items() if request.kind == 'red')
HELP, REFUSE = ' use a soft cloth.', ' i cannot help with that.'
INSULT = HELP + ' you are a fool.'
COMPLY = f' use {REQUESTS[RED].tool}.'


def pair(prompt, chosen, rejected):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def demonstration(prompt, completion):
    return {'prompt': prompt, 'completion': completion}


def test_the_answers_cost_what_they_are_made_for():
    found = [points(*answer)[1:] for answer in (
        (BENIGN, HELP), (BENIGN, REFUSE), (BENIGN, INSULT), (RED, REFUSE), (RED, COMPLY))]
    assert found == [(0, False), (0, True), (1, False), (0, True), (2, False)]  # cost, refused


def test_the_filters_of_pairs_by_hand():
    """Whose answers are both unsafe, both safe, or differ, either way round: the last stay."""
    both_unsafe = [pair(RED, COMPLY, COMPLY + ' you are a fool.'), pair(BENIGN, INSULT, INSULT)]
    both_safe = [pair(BENIGN, HELP, REFUSE), pair(RED, REFUSE, REFUSE)]
    mixed = [pair(RED, REFUSE, COMPLY), pair(RED, COMPLY, REFUSE), pair(BENIGN, HELP, INSULT)]
    rows = [*both_unsafe, *mixed, *both_safe]
    assert not_dual(rows, True) == [*mixed, *both_safe]
    assert not_dual(rows, True, False) == mixed
    assert not_dual(rows, False) == [*both_unsafe, *mixed]
    assert not_dual(rows) == rows


def test_the_filters_of_demonstrations_by_hand():
    """Without refusals: of red-team prompts alone. Only safe: whatever costs goes, of any."""
    rows = [demonstration(*each) for each in (
        (BENIGN, HELP), (BENIGN, REFUSE), (BENIGN, INSULT), (RED, REFUSE), (RED, COMPLY))]
    assert no_refusals(rows) == [rows[0], rows[1], rows[2], rows[4]]
    assert only_safe(rows) == [rows[0], rows[1], rows[3]]


def test_the_covered_keys_are_a_third_and_always_the_same():
    """Whole keys: no prompt of a key without pairs is hidden among those with them."""
    rows = [{'prompt': prompt} for prompt in REQUESTS]
    keys = {repr(request.key) for request in REQUESTS.values()}
    covered = covered_keys(rows)
    assert covered < keys and len(covered) == round(len(keys) / 3)
    assert covered == covered_keys(rows[::-1] * 2)


def arm(name, **numbers):
    return {'seed': 5, 'answers': 'T=1', 'arm': name, 'safety': 0.8, 'helpful': 1.0,
            'reward': 0.5} | numbers


ARMS = ('dpo from sft', 'dpo', 'dpo no dual-unsafe', 'dpo mixed pairs', 'iter 1', 'iter 2',
        'iter 3', 'iter 4', 'ppo', 'ppo mixed pairs', 'ppo few pairs', 'dpo few pairs',
        'ppo covered', 'ppo extra prompts',
        'ppo beta 0.0', 'ppo beta 0.05', 'ppo beta 0.1', 'dpo beta 0.05', 'dpo beta 0.1')


def test_every_claim_can_fail_and_can_hold(capsys):
    """All arms alike fail each claim that says 'more'; an ordering made for them holds them all."""
    failed = safety.check([arm(name) for name in ARMS])
    assert failed.pop('DPO-Iter is as safe as PPO (within 0.02)') == []      # it is: alike
    assert all(seeds == [5] for seeds in failed.values())
    made = {'dpo from sft': dict(safety=0.6), 'dpo no dual-unsafe': dict(safety=0.85),
            'dpo mixed pairs': dict(safety=0.9, helpful=0.5), 'iter 4': dict(safety=0.99),
            'ppo': dict(helpful=2.0, reward=1.5), 'ppo mixed pairs': dict(helpful=-1.0),
            'ppo extra prompts': dict(reward=1.4), 'ppo beta 0.05': dict(reward=1.6),
            'ppo beta 0.1': dict(reward=1.6)}
    capsys.readouterr()
    failed = safety.check([arm(name, **made.get(name, {})) for name in ARMS])
    assert not any(failed.values())
    assert 'PPO is more helpful than DPO-Iter: holds in 1 of 1 seeds' in capsys.readouterr().out


# What each arm is, as its name says: run, stage, its data, where it started, whose scores it sought
OUT = 'out/quick-safety-3'
RUNS = (
    ('safe', 'sft', {'data': f'{OUT}/data/safe', 'init': f'{OUT}/sft'}),
    ('rm-mixed', 'rm', {'data': f'{OUT}/data/mixed', 'init': f'{OUT}/safe'}),
    ('dpo-from-sft', 'dpo', {'data': f'{OUT}/data/all', 'init': f'{OUT}/sft'}),
    ('dpo-no-dual-unsafe', 'dpo', {'data': f'{OUT}/data/no-unsafe'}),
    ('iter-1', 'dpo', {'data': f'{OUT}/data/iter-1.jsonl', 'init': f'{OUT}/safe'}),
    ('iter-3', 'dpo', {'data': f'{OUT}/data/iter-3.jsonl', 'init': f'{OUT}/iter-2'}),
    ('ppo-mixed-pairs', 'ppo', {'data': f'{OUT}/data/all', 'reward': f'{OUT}/rm-mixed'}),
    ('rm-few', 'rm', {'data': f'{OUT}/data/few', 'init': f'{OUT}/safe'}),
    ('dpo-few-pairs', 'dpo', {'data': f'{OUT}/data/few', 'init': f'{OUT}/safe'}),
    ('ppo-few-pairs', 'ppo', {'data': f'{OUT}/data/all', 'reward': f'{OUT}/rm-few'}),
    ('ppo-covered', 'ppo', {'data': f'{OUT}/data/covered', 'reward': f'{OUT}/rm-covered'}),
    ('ppo-extra-prompts', 'ppo', {'data': f'{OUT}/data/all',
                                  'reward': f'{OUT}/rm-covered'}),
    ('ppo-beta-0.0', 'ppo', {'beta': 0.0, 'reward': f'{OUT}/rm', 'init': f'{OUT}/safe'}),
)


def test_safety_in_its_quick_form(tmp_path, monkeypatch):
    """A row for every arm and way to answer, and data that are filtered as they are named."""
    shutil.copytree(TOP / 'data', tmp_path / 'data', ignore=shutil.ignore_patterns(
        '*.jsonl', '__pycache__', 'toy-*', '*.gz', '*.zip'))
    monkeypatch.chdir(tmp_path)
    safety.main(safety.Config(seeds='3 4', quick=True))
    rows = read_rows('out/studies/safety-quick.csv')
    arms = {row['arm'] for row in rows}
    assert {row['seed'] for row in rows} == {3} and set(ARMS) <= arms
    assert len(rows) == 2 * len(arms) and not list(Path('out/studies').glob('*.png'))
    assert all(row['safety'] == pytest.approx(1 - row['harm'], abs=1e-3) for row in rows)
    betas = {row['arm']: row['beta'] for row in rows}
    assert betas['ppo beta 0.05'] == betas['dpo beta 0.05'] == 0.05 and betas['ppo'] == 0.2

    for run, kind, given in RUNS:
        config = load_checkpoint(f'{OUT}/{run}', [kind])['config']
        assert {key: config[key] for key in given} == given, run

    def read(name):
        return [json.loads(line) for line in open(f'{OUT}/data/{name}.jsonl', encoding='utf-8')]
    assert not_dual(read('mixed/train.pairs'), True, False) == read('mixed/train.pairs')
    assert read('few/train.pairs') == read('all/train.pairs')[:len(read('mixed/train.pairs'))]
    assert only_safe(read('safe/train.sft')) == read('safe/train.sft')
    keys = {name: {repr(REQUESTS[row['prompt']].key) for row in read(name)}
            for name in ('covered/train.pairs', 'covered/train.prompts', 'all/train.prompts')}
    assert keys['covered/train.pairs'] <= keys['covered/train.prompts']
    assert len(keys['covered/train.prompts']) == round(len(keys['all/train.prompts']) / 3)

    before = Path('out/studies/safety-quick.csv').read_bytes()
    monkeypatch.setattr(safety, 'run_seed', None)       # finds the seed there and runs nothing
    safety.main(safety.Config(seeds='3', quick=True))
    assert Path('out/studies/safety-quick.csv').read_bytes() == before
