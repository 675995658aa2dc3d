"""
The exercises: their tables fit the code, a right function passes and a wrong one is named, and no
copy of a hunt says what is planted in it.

    python -m pytest -q tests/test_exercises.py
"""
import ast
import contextlib
import io
import json
import re

import numpy as np
import pytest

import exercises
import hunts
from conftest import STAGES
from mutants import MUTANTS
from prefgpt import parse_config

TESTS = hunts.TOP / 'tests'


def called(*words):
    """Returns what the command prints; an exit with a status other than 0 is raised."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exercises.main(*words)
    return out.getvalue()


def test_every_mistake_has_its_hunt():
    """The names are those of mutants.py; stages, flags, rows and cases are there."""
    assert set(hunts.HUNTS) == {mutant.name for mutant in MUTANTS}
    cases, used = hunts.TABLES['case'], {hunt.case for hunt in hunts.HUNTS.values()}
    assert used - {''} == set(cases)
    assert not re.search('[a-z]- ', str(hunts.TABLES))      # a name, broken where a line ends
    for number, name in hunts.NUMBERS.items():
        hunt = hunts.HUNTS[name]
        flags, rows = hunts.hunt_flags(number, *hunts.FEW[hunt.stage])
        parse_config(STAGES[hunt.stage].Config, flags)
        assert rows in ('', 'zero', 'space', 'special', 'marked', 'long', 'short'), name
        assert name.split('/')[0] in ('prefgpt', 'text', f'train_{hunt.stage}'), name
        assert hunts.mutant_of(number).name == name


def test_every_function_has_its_judges_and_hints():
    """Files, functions, tests and golden arrays exist; a blank function keeps its docstring."""
    assert len(exercises.FILL_IN) == 15
    for name, exercise in exercises.FILL_IN.items():
        text = (hunts.TOP / exercise['file']).read_text()
        _, node = exercises.find(exercises.blank(text, name), name)
        assert ast.get_docstring(node) and len(node.body) == 2 and ast.get_docstring(
            node) == ast.get_docstring(exercises.find(text, name)[1])
        assert len(exercise['hints']) == 3 and exercise['tests']
        for test, meaning in exercise['tests'].items():
            file, function = test.split('::')
            assert f'\ndef {function}(' in (TESTS / file).read_text() and len(meaning) > 30
        for file, patterns in exercise['golden'].items():
            stored = np.load(TESTS / 'golden' / f'{file}.npz').files
            for pattern in patterns.split():
                assert any(re.fullmatch(pattern, array) for array in stored), (name, pattern)


def test_start_check_and_hint(tmp_path):
    """A function that is not written, a wrong one and the right one; hints come one by one."""
    folder = tmp_path / 'copy'
    assert 'write the body of cap_unfinished' in called('start', 'cap_unfinished', str(folder))
    file = folder / 'train_ppo.py'
    blank = file.read_text()
    assert 'torch.where(ended' not in blank
    assert 'not written yet' in exercises.check('cap_unfinished', folder)
    for number in (1, 2, 3, 3):
        assert called('hint', 'cap_unfinished', str(folder)).startswith(f'hint {number} of 3: ')
    file.write_text(blank.replace(exercises.MISSING, 'return scores.clamp(max=no_eos_score)'))
    said = exercises.check('cap_unfinished', folder)
    assert said.startswith('test_methods.py::test_cap_unfinished_by_hand fails:\nE ')
    assert 'a response that ended keeps its score' in said
    file.write_text((hunts.TOP / 'train_ppo.py').read_text())
    assert called('check', 'cap_unfinished', str(folder)).startswith('cap_unfinished is correct: ')
    with pytest.raises(SystemExit, match='exists'):
        exercises.start('cap_unfinished', folder)
    assert 'torch.where(ended' in called('answer', 'cap_unfinished', None)


def test_a_golden_array_that_differs_is_named(monkeypatch):
    """The place and both numbers; nothing if all agree."""
    monkeypatch.syspath_prepend(TESTS / 'golden')
    import make
    stored = dict(np.load(make.HERE / 'ppo.npz'))
    monkeypatch.setattr(make, 'trace', lambda: {'ppo': stored})
    assert exercises.golden_difference('ppo', 'advantages returns') == ''
    stored['returns'] = stored['returns'].copy()
    stored['returns'][1, 2] = np.nan
    said = exercises.golden_difference('ppo', 'advantages returns')
    assert said.startswith('returns[1, 2] is nan, not ')


def test_a_copy_does_not_name_its_mistake(tmp_path):
    """One file differs, and no file of the copy has the mistake's name."""
    mutant = hunts.mutant_of(59)
    hunts.plant(mutant, tmp_path / 'copy')
    files = [path for path in (tmp_path / 'copy').rglob('*') if path.is_file()]
    texts = {path.relative_to(tmp_path / 'copy'): path.read_bytes() for path in files}
    assert [str(path) for path, text in texts.items()
            if text != (hunts.TOP / path).read_bytes()] == [mutant.file]
    name = mutant.name.split('/')[1].encode()
    assert not any(name in text or b'utant' in text for text in texts.values())
    assert not any('tests' in path.parts for path in texts)
    assert mutant.new in called('answer', '59', None) and 'I16' in called('answer', '59', None)


@pytest.mark.parametrize('rows, key, found', [
    ('special', 'prompt', '<|endoftext|>'), ('zero', 'completion', '\0'),
    ('marked', 'completion_cut', True), ('space', 'completion', 'a b.'),
    ('short', 'prompt', '\nbot:')])
def test_changed_rows(rows, key, found):
    """Each kind of rows has what lets a mistake show; ordinary rows stay as they are."""
    row = {'prompt': 'user: x?\nbot:', 'completion': ' a b.'}
    changed = hunts.changed_row(rows, 1, row)
    assert found == changed[key] or found in changed[key]
    assert hunts.changed_row('', 1, row) == row


def test_logs_are_compared_row_by_row():
    """Small differences are none; then the first that is one, a row too many, and a NaN."""
    log = [{'step': 1, 'loss': 2.0}, {'step': 1, 'eval_loss': 1.0, 'samples': ['a']}]
    other = json.loads(json.dumps(log))
    assert list(hunts.differences(log, other)) == []
    other[0]['loss'] = 2.001
    assert list(hunts.differences(log, other)) == []
    other[0]['loss'], other[1]['samples'] = float('nan'), ['b']
    assert [name for _, name, *_ in hunts.differences(log, other)] == ['loss', 'samples']
    assert list(hunts.differences(log, log + log[:1])) == [(2, 'rows', 2, 3)]


@pytest.mark.parametrize('words', [('hunt', '0'), ('hunt', '²'), ('hunt', ''), ('start', 'kl')])
def test_what_is_no_exercise_is_told(words):
    """A number or name that there is not, and a digit that is no number."""
    with pytest.raises(SystemExit, match='no such exercise, see list'):
        called(*words, None)


def test_a_hunt_says_whether_the_logs_agree(tmp_path, monkeypatch, capsys):
    """Of a mistake that no log shows, an edit elsewhere in the file is not called its mend."""
    mutant, folder = hunts.mutant_of(11), tmp_path / 'copy'
    file = folder / mutant.file
    folder.mkdir()
    file.write_text(hunts.mutated(mutant))

    def run_stage(where, stage, out, flags):
        out.mkdir(parents=True)
        loss = 3.0 if 'differs' in file.read_text() and where == folder else 2.0
        (out / 'log.jsonl').write_text(json.dumps({'step': 1, 'loss': loss}) + '\n')
        return hunts.read_log(out), []
    for name, fake in (('TOP', tmp_path), ('run_stage', run_stage),
                       ('write_rows', lambda *_: tmp_path)):
        monkeypatch.setattr(hunts, name, fake)
    for edit, said in (('', 'The log does not show this one: read the code.'),
                       ('# an edit', 'The logs agree: it is mended, if they differed before.'),
                       ('# differs', 'Find the line, mend it there, and call hunt 11 again')):
        file.write_text(hunts.mutated(mutant) + edit)
        hunts.hunt(11, folder)
        assert said in capsys.readouterr().out


def test_the_page_names_what_exists():
    """Hunts, functions and training commands of EXERCISES.md can be called as they are written."""
    text = (TESTS / 'EXERCISES.md').read_text()
    for word, name in re.findall(r'exercises\.py (start|check|hint|hunt|answer) (\w+)', text):
        assert name in exercises.FILL_IN or int(name) in hunts.NUMBERS, (word, name)
    commands = re.findall(r'python train_(\w+)\.py((?: --[\w./=-]+)*)', text)
    assert len(commands) >= 12
    for stage, flags in commands:
        parse_config(STAGES[stage].Config, flags.split())
    for file in re.findall(r'`([\w/]+\.(?:py|md))`', text):
        assert (hunts.TOP / file).exists(), file
