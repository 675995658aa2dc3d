"""
The list of tests/mutants.py is kept up to date: every mutant still fits the line that it changes.

Whether each of them is killed takes minutes, and is asked by `python tests/mutants.py`. Here two
are, so that the asking itself is known to work.
"""
import re

import pytest

from mutants import MUTANTS, TOP, Mutant, check, mutated, parse


def test_every_mutant_fits_one_line_and_compiles():
    """Each line is exactly once in its file, and what becomes of it is another file that compiles;
    names are different, and each names an invariant that has a test."""
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
    """A mutant of a line that has changed since, or that is not alone, is named with the count. A
    comment after the line may change."""
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
    """I25: the suite notices targets that are not shifted, and advantages without lambda."""
    mutant, = [mutant for mutant in parse(MUTANTS) if mutant.name == name]
    killed, by, test, _ = check(mutant)
    assert killed, test
    assert by == mutant.invariants[0]


def test_a_crash_is_not_taken_for_killed():
    """I25: a mutant with which no stage runs proves nothing about the invariants."""
    mutant = parse(MUTANTS)[0]._replace(replacement='    raise RuntimeError("no batch")')
    killed, _, what, _ = check(mutant)
    assert not killed and what == 'does not run: RuntimeError: no batch'
