"""
Loads a reward.py: anybody's score(prompt, response), beside a data set or elsewhere.
"""
import runpy, sys
from pathlib import Path

from data.text import DataError, read_text


def load_judge(path):
    """Returns a reward.py's score as judge(prompt, response) -> a dict of finite floats."""
    read_text(path)                             # a clear error if the file is not there
    sys.path.append(str(Path(path).resolve().parent))   # it may import its neighbours
    try:
        score = runpy.run_path(path, run_name='judge').get('score')
    except (Exception, SystemExit) as error:    # it is anybody's code
        raise DataError(f'{path}: {type(error).__name__}: {error}') from None
    if not callable(score):
        raise DataError(f'{path}: it defines no score(prompt, response)')

    def judge(prompt, response):
        """Calls score. A number by itself is the reward; every number becomes a Python float."""
        found = None
        try:
            found = said = score(prompt, response)
            said = said if isinstance(said, dict) else {'reward': said}
            said = {str(name): float(number if isinstance(number, (int, float)) else number.item())
                    for name, number in said.items()}
            if 'reward' in said and all(abs(number) < 1e38 for number in said.values()):
                return said
            found = repr(found)
        except (Exception, SystemExit) as error:        # sys.exit() would end a run as a success
            found = f'{shown(found)} ({type(error).__name__}: {error})'
        raise DataError(f"{path}: score({prompt!r}, {response!r}) is {found}, not finite numbers "
                        "with a 'reward'")
    return judge


def shown(value):
    """Returns a value's repr, which a class of anybody's may have spoilt."""
    try:
        return repr(value)
    except Exception:
        return f'of type {type(value).__name__}'
