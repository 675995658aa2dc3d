"""
Checks that the list in tests/mutants.py is up to date: every mutant fits the line that it changes.

Killing all of them takes minutes (`python tests/mutants.py`). Two are killed here, which checks the
program itself.
"""
import re

import pytest

from mutants import MUTANTS, TOP, Mutant, check, mutated, parse


def test_every_mutant_fits_one_line_and_compiles():
    """Each line occurs once in its file, and the changed file differs and compiles. All names
    differ, and each mutant names invariants that have tests."""
    mutants = parse(MUTANTS)
    assert len(mutants) >= 90 and len({mutant.name for mutant in mutants}) == len(mutants)
    known = set(re.findall(r'\bI\d+\b', ' '.join(
        path.read_text() for path in (TOP / 'tests').glob('test_*.py'))))
    for mutant in mutants:
        text = mutated(mutant)
        compile(text, mutant.name, 'exec')
        assert text != (TOP / mutant.file).read_text(), mutant.name
        assert mutant.invariants and set(mutant.invariants) <= known, mutant.name


def test_a_line_that_is_not_there_or_there_twice_is_refused():
    """A mutant whose line is gone, or occurs twice, raises an error with the count. The comment
    after a line may change."""
    for line, times in (('    no such line', '0'), ('@torch.no_grad()', '2')):
        with pytest.raises(AssertionError, match=f'stale: its line is {times} times in'):
            mutated(Mutant('train_ppo.py', 'stale', ['I1'], line, '    pass'))
    text = (TOP / 'train_ppo.py').read_text()
    line = next(line for line in text.split('\n') if '  # (B,' in line)
    bare = line.split('  #')[0].rstrip()
    for known in (line, bare, f'{bare}  # another comment'):
        assert mutated(Mutant('train_ppo.py', 'fits', ['I1'], known, 'HERE')) == text.replace(
            line, 'HERE')


@pytest.mark.parametrize('name', ['prefgpt/shift-forgotten', 'train_ppo/gae-without-lambda'])
def test_two_mutants_are_killed(name):
    """I25: the tests notice targets that are not shifted, and advantages without lambda."""
    mutant, = [mutant for mutant in parse(MUTANTS) if mutant.name == name]
    killed, by, test, _ = check(mutant)
    assert killed, test
    assert by == mutant.invariants[0]


def test_a_crash_is_not_taken_for_killed():
    """I25: a mutant that keeps the stages from running proves nothing about the invariants."""
    mutant = parse(MUTANTS)[0]._replace(replacement='    raise RuntimeError("no batch")')
    killed, _, what, _ = check(mutant)
    assert not killed and what == 'does not run: RuntimeError: no batch'
