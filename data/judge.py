"""
Loads a reward.py: anybody's score(prompt, response), beside a data set or elsewhere.
"""
import importlib.util, math

from data.text import DataError, read_text


def load_judge(path):
    """Returns a reward.py's score as judge(prompt, response) -> a dict of finite numbers."""
    read_text(path)                             # a clear error if the file is not there
    spec = importlib.util.spec_from_file_location('judge', path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:                  # it is anybody's code
        raise DataError(f'{path}: {type(error).__name__}: {error}') from None
    if not callable(getattr(module, 'score', None)):
        raise DataError(f'{path}: it defines no score(prompt, response)')

    def judge(prompt, response):
        """Calls score. A number by itself is the reward; numpy's and torch's become Python's."""
        found = None
        try:
            found = said = module.score(prompt, response)
            said = said if isinstance(said, dict) else {'reward': said}
            said = {name: number if isinstance(number, (int, float)) else number.item()
                    for name, number in said.items()}
            if 'reward' in said and all(map(math.isfinite, said.values())):
                return said
        except Exception as error:
            found = f'{found!r} ({type(error).__name__}: {error})'
        raise DataError(f"{path}: score({prompt!r}, {response!r}) is {found}, not finite numbers "
                        "with a 'reward'")
    return judge
