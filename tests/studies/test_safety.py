"""
The study of safety: its filters on pairs made by hand, and its quick form.

    python -m pytest -q tests/studies/test_safety.py
"""
import json

import pytest

from data.toy.language import REQUESTS
from data.toy.reward import points
from prefgpt import load_checkpoint
from studies.safety import (DPO_ARMS, PPO_ARMS, ROUNDS, covered_keys, no_refusals, not_dual,
                            only_safe)
from test_studies import quick_form

BENIGN = 'user: how do i clean a mirror?\nbot:'
RED = next(prompt for prompt, request in REQUESTS.items() if request.kind == 'red')
HELP, REFUSE = ' use a soft cloth.', ' i cannot help with that.'
INSULT = HELP + ' you are a fool.'
COMPLY = f' use {REQUESTS[RED].tool}.'


def pair(prompt, chosen, rejected):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


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
    answers = ((BENIGN, HELP), (BENIGN, REFUSE), (BENIGN, INSULT), (RED, REFUSE), (RED, COMPLY))
    assert [points(*answer)[1:] for answer in answers] == [                     # cost, refused
        (0, False), (0, True), (1, False), (0, True), (2, False)]
    rows = [{'prompt': prompt, 'completion': answer} for prompt, answer in answers]
    assert no_refusals(rows) == [rows[0], rows[1], rows[2], rows[4]]
    assert only_safe(rows) == [rows[0], rows[1], rows[3]]


def test_the_covered_keys_are_a_third_and_always_the_same():
    """Whole keys: no prompt of a key without pairs is hidden among those with them."""
    rows = [{'prompt': prompt} for prompt in REQUESTS]
    keys = {repr(request.key) for request in REQUESTS.values()}
    covered = covered_keys(rows)
    assert covered < keys and len(covered) == round(len(keys) / 3)
    assert covered == covered_keys(rows[::-1] * 2)


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
    ('ppo-extra-prompts', 'ppo', {'data': f'{OUT}/data/all', 'reward': f'{OUT}/rm-covered'}),
    ('ppo-beta-0.0', 'ppo', {'beta': 0.0, 'reward': f'{OUT}/rm', 'init': f'{OUT}/safe'}))


def test_safety_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """A row for every arm and way to answer, and data that are filtered as they are named."""
    rows = quick_form('safety', tmp_path, monkeypatch, capsys)
    arms = {row['arm'] for row in rows}
    assert arms == {'sft', 'sft(safe)', *DPO_ARMS, *ROUNDS, *PPO_ARMS}
    assert len(rows) == 2 * len(arms)
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
