"""
The diffs of studies/methods/: each applies exactly, says what it should, and its equations hold.

    python -m pytest -q tests/studies/test_diffs.py         # python tests/diffs.py asks far more
"""
import doctest
import importlib.util
import re
import shutil
import sys

import pytest

import diffs
from studies.methods.table import SCRIPTS, kl_gradients, patched_copy


@pytest.mark.skipif(not shutil.which('git'), reason='a diff is applied with git')
@pytest.mark.parametrize('name', diffs.NAMES)
def test_a_diff_applies_and_its_equations_hold(name, tmp_path, monkeypatch):
    """It applies without an offset and compiles; every function that it adds has a doctest with
    numbers by hand, and all of them hold; lines have 100 columns at most."""
    folder = patched_copy(name, tmp_path / name)
    script = folder / f'{SCRIPTS[name]}.py'
    text, before = script.read_text(), (diffs.TOP / script.name).read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert [text.count(old) for old, _ in diffs.SLIPS[name]] == [1] * 6     # of diffs.py --slips
    spec = importlib.util.spec_from_file_location(f'{name}_script', script)
    monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    results = {test.name.partition('.')[2]: doctest.DocTestRunner().run(test)
               for test in doctest.DocTestFinder().find(module) if test.examples}
    assert results and not any(result.failed for result in results.values())
    functions = set(re.findall(r'^(?:class|def) (\w+)', text, re.MULTILINE))
    known = set(re.findall(r'^(?:class|def) (\w+)', before, re.MULTILINE))
    assert functions - known - set(results) <= {'add_lora', 'add_gradient', 'approx_kl'}


@pytest.mark.parametrize('name', diffs.NAMES)
def test_a_header_is_complete(name):
    """About eight lines: what, equation, source, what to watch, the result, and the check."""
    header = diffs.header(name)
    assert len(header.strip().splitlines()) <= 14 and max(map(len, header.splitlines())) <= 100
    for part in (' = ', 'arXiv', '\nwatch: ', '\nresult: ', '\ncheck: '):
        assert part in header, part
    assert diffs.check_line(name)[0] == SCRIPTS[name]


def test_the_place_of_the_kl_decides_which_kl_it_is():
    """k1 in the reward has KL(pi, ref)'s gradient and k3 in the loss KL(ref, pi)'s; they differ."""
    pi_ref, k1, ref_pi, k3 = kl_gradients().values()
    assert (k1 - pi_ref).abs().max() < 1e-12 and (k3 - ref_pi).abs().max() < 1e-12
    assert (pi_ref - ref_pi).abs().max() > 0.1
