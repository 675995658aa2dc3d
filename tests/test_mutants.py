"""
Checks that the table in tests/mutants.py is up to date: every mutant fits the code that it changes.

Killing all of them takes minutes (`python tests/mutants.py`). Two are killed here, which checks the
program itself.
"""
import re

import pytest

from mutants import MUTANTS, TOP, check, mutated


def test_every_mutant_fits_its_file_and_compiles():
    """What each replaces occurs once in its file, and the changed file compiles. All names differ,
    and each mutant names invariants that have tests."""
    assert len(MUTANTS) >= 90 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    known = set(re.findall(r'\bI\d+\b', ' '.join(
        path.read_text() for path in (TOP / 'tests').glob('test_*.py'))))
    for mutant in MUTANTS:
        compile(mutated(mutant), mutant.name, 'exec')
        assert mutant.new != mutant.old, mutant.name
        assert mutant.invariants and set(mutant.invariants) <= known, mutant.name


@pytest.mark.parametrize('name', ['prefgpt/shift-forgotten', 'train_ppo/gae-without-lambda'])
def test_two_mutants_are_killed(name):
    """I25: the tests notice targets that are not shifted, and advantages without lambda."""
    mutant, = [mutant for mutant in MUTANTS if mutant.name == name]
    by, test = check(mutant)
    assert by == mutant.invariants[0], test


def test_a_crash_is_not_taken_for_killed():
    """I25: a mutant that keeps the stages from running proves nothing about the invariants."""
    mutant = MUTANTS[0]._replace(new='raise RuntimeError("no batch")')
    assert check(mutant) == ('', 'does not run: RuntimeError: no batch')
