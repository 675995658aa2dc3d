"""data/judge.py: a reward.py in the forms that people write; anything else is one line."""
import pytest

from data.judge import load_judge
from data.text import DataError


@pytest.mark.parametrize('body, numbers', [
    ('return 0.5', {'reward': 0.5}), ('return 1', {'reward': 1}), ('return True', {'reward': True}),
    ('import numpy; return numpy.float32(0.5)', {'reward': 0.5}),
    ('import torch; return {"reward": torch.tensor(0.5), "x": 2}', {'reward': 0.5, 'x': 2}),
    ('return {"reward": 1, 3: 2.0}', {'reward': 1, '3': 2.0})])
def test_numbers_are_read(tmp_path, body, numbers):
    """A number by itself is the reward; numpy's and torch's scalars become Python's."""
    path = tmp_path / 'reward.py'
    path.write_text(f'def score(prompt, response):\n    {body}\n')
    assert load_judge(path)('p', 'r') == numbers
    assert all(type(number) in (int, float, bool) for number in load_judge(path)('p', 'r').values())


@pytest.mark.parametrize('text, words', [
    ('def score(p, r): return None', 'is None'), ('def score(p, r): return "good"', "is 'good'"),
    ('def score(p, r): return {"reward": None}', 'is .*None'),
    ('def score(p, r): return {"reward": 1.0, "note": "fine"}', 'fine'),
    ('def score(p, r): return {"x": 1.0}', "'reward'"),
    ('def score(p, r): return float("inf")', 'inf'),
    ('def score(p, r): return {"reward": len(p) / len(r)}', 'ZeroDivisionError'),
    ('def score(prompt): return 1.0', 'TypeError'),
    ('def score(p, r): exit()', 'SystemExit'), ('import sys; sys.exit(0)', 'SystemExit'),
    ('def score(p, r): return 10 ** 5000', 'OverflowError'),
    ('def score(p, r) return 1.0', 'SyntaxError'), ('import not_there', 'ModuleNotFoundError'),
    ('reward = 1', 'defines no score')])
def test_anything_else_is_one_line(tmp_path, text, words):
    """The line names the file and, once it is called, the prompt and the response."""
    path = tmp_path / 'reward.py'
    path.write_text(text + '\n')
    with pytest.raises(DataError, match=f'^{path}: .*{words}') as error:
        load_judge(path)('p', '')
    assert '\n' not in str(error.value)
