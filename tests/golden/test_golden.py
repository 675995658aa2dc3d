"""
Checks the golden trace: it is what the code computes today, the README names all of it and no more,
the ports in numpy and in C agree with it and make no usual slip unnoticed, and every case of it
contains something.
"""
import json
import re
import shutil
import subprocess
from types import ModuleType

import make
import numpy as np
import port
import pytest
import torch

GOLDEN = make.HERE
FILES = ['model', 'batch', 'sample', 'sft', 'rm', 'dpo', 'ppo', 'edge', 'optimizer']
TEXTS = ['rows.txt', 'run.json', 'text.json', 'toy.tiktoken', 'constants.json']


@pytest.fixture(scope='module')
def stored():
    """Loads the arrays in the repository: {file: {name: array}}."""
    return {file: dict(np.load(GOLDEN / f'{file}.npz')) for file in FILES}


def compare(ours, theirs, tolerance, tolerance_after):
    """Asserts the same names in the same order, shapes and dtypes, and equal numbers to tolerances,
    absolute + relative; tolerance_after is for weights after a step."""
    assert list(ours) == list(theirs) == FILES
    for file in FILES:
        assert list(ours[file]) == list(theirs[file]), file
        for name, a in ours[file].items():
            b, most = theirs[file][name], tolerance_after if 'after' in name else tolerance
            assert (a.shape, a.dtype) == (b.shape, b.dtype), (file, name)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=most, err_msg=name)


def numbers_of(nest, path=''):
    """Yields (path, value) of the leaves of what json.loads returns."""
    if isinstance(nest, (dict, list)):
        for key, value in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from numbers_of(value, f'{path}/{key}')
    else:
        yield path, nest


def test_the_trace_is_what_the_code_computes(stored, tmp_path):
    """The files written anew hold the same numbers, a run of the four scripts too. Catches a change
    of the method that is missing from the porting guide; if it is wanted, run make.py, raise its
    version and change the README."""
    make.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f'{file}.npz' for file in FILES] + TEXTS)
    compare({file: dict(np.load(tmp_path / f'{file}.npz')) for file in FILES}, stored, 1e-6, 1e-6)
    for name in TEXTS:
        now, then = ((folder / name).read_text() for folder in (tmp_path, GOLDEN))
        if name != 'run.json':
            assert now == then, name
            continue
        now, then = (dict(numbers_of(json.loads(text))) for text in (now, then))
        # On another CPU sums are rounded otherwise, and PPO's third step may draw another id
        third = '/ppo/steps/2/'
        ids = [[item for item in each.items() if item[0].startswith(f'{third}ids')]
               for each in (now, then)]
        if ids[0] != ids[1]:
            now, then = ({path: n for path, n in each.items() if not path.startswith(third)}
                         for each in (now, then))
        assert list(now) == list(then)
        for path, number in then.items():
            # Sums are rounded differently on another CPU; what is whole is the same
            about = isinstance(number, float) and not path.endswith('closest')
            assert about or path.endswith('closest') or now[path] == number, path
            most = 1e-3 if path.endswith('shift') else 1e-4
            assert not about or now[path] == pytest.approx(number, rel=most, abs=most), path
        assert min(z for path, z in then.items() if path.endswith('closest')) > 1e-6


def test_the_tolerances_leave_room_for_float32(stored):
    """The same code in float32, as it trains, keeps the tolerances that a port is given."""
    compare(make.trace(torch.float32), stored, 1e-5, 1e-4)


# ----------------------------------------------------------------------------- the README

def readme_tables():
    """Returns the README's tables whose rows begin with a backtick: {heading: [cells of a row]}."""
    tables, heading = {}, None
    for line in (GOLDEN / 'README.md').read_text().splitlines():
        if line.startswith('#'):
            heading = line.strip('# ').strip('`')
        elif line.startswith('| `'):
            name, *cells = (cell.strip() for cell in line.strip('|').split('|'))
            tables.setdefault(heading, []).append([name.strip('`'), *cells])
    return tables


def readme_arrays(tables, sizes):
    """Returns {file: {name: (shape, dtype)}} by the README: W any weight, L a layer, K a step."""
    def shape_of(cell):
        return eval(cell, {}, sizes)                # '(B, T+1)', from our own README

    weights = {name.replace('h.L.', f'h.{layer}.'): shape_of(shape)
               for name, shape, *_ in tables['Weights'] for layer in '01'}
    arrays = {}
    for file in FILES:
        arrays[file] = {}
        for name, shape, dtype, *_ in tables[f'{file}.npz']:
            for step in ('first', 'second'):        # twice the same where no K is in the name
                full = re.sub(r'^K\.', f'{step}.', name)
                if full.endswith('.W'):
                    assert shape == 'as W', name
                    arrays[file] |= {full[:-1] + w: (s, dtype) for w, s in weights.items()}
                else:
                    arrays[file][full] = (shape_of(shape), dtype)
    return arrays


def test_the_readme_names_every_array_and_constant_and_no_other(stored):
    """Names, shapes and dtypes of the README's tables are those of the files, both ways, and every
    constant that made the trace is in its table with its value."""
    tables = readme_tables()
    said = readme_arrays(tables, {name: int(size) for name, size, *_ in tables['Sizes']})
    for file in FILES:
        assert said[file] == {name: (z.shape, str(z.dtype)) for name, z in stored[file].items()}
    assert {name: float(value) for name, value, *_ in tables['Constants']} == make.CONSTANTS


# ----------------------------------------------------------------------------- the numpy port

def differing(results):
    """Returns the names in port.compare's results that differ; a NaN differs."""
    return [name for name, difference, tolerance in results if not difference <= tolerance]


def test_the_port_agrees(stored):
    """The port, in float32, recomputes every array but those that the README marks as given, the
    run, the texts' ids and the constants. It imports numpy and the standard library alone: it
    cannot copy a mistake of ours."""
    tables = readme_tables()
    given = {f'{file}.npz': {name for name, *_, what in tables[f'{file}.npz'] if '*given*' in what}
             for file in FILES[1:]}
    assert {file: set(port.INPUTS.get(file, ())) for file in given} == given
    results = port.compare(GOLDEN)
    names = [name for name, *_ in results]
    assert [name for name in names if '.npz' in name] == [
        f'{file}.npz/{name}' for file in FILES[1:] for name in stored[file]
        if name not in given[f'{file}.npz']]
    # Another CPU rounds sums otherwise, and may draw another id in PPO's third step: see the page
    assert {name.rsplit('.', 1)[0] for name in differing(results)} <= {'run.json/ppo.3'}
    assert max(tolerance for _, _, tolerance in results) < 3e-3
    # Of the run each step's rows and numbers, of the texts each entry
    run, text = (json.loads((GOLDEN / name).read_text()) for name in ('run.json', 'text.json'))
    for stage in ('sft', 'rm', 'dpo', 'ppo'):
        for i, step in enumerate(run[stage]['steps'], 1):
            for name in step.keys() - {'closest'}:
                assert f'run.json/{stage}.{i}.{name}' in names
    assert sum(name.startswith('text.json') for name in names) == (
        len(text['texts']) + len(text['rows'])) == 38
    assert set(re.findall(r'^ *(?:import|from) (\S+)', (GOLDEN / 'port.py').read_text(), re.M)) <= {
        'base64', 'hashlib', 'itertools', 'json', 'math', 'sys', 'types', 'unicodedata', 'pathlib',
        'numpy'}


@pytest.mark.parametrize('right, wrong, first', [
    ('(u * F[:, -1])[:, None]', 'u[:, None]', 'sample.npz/draws'),
    ('F <= (u', 'F < (u', 'sample.npz/draws'),
    ('np.exp(z - z.max(-1, keepdims=True))', 'np.exp(z)', 'edge.npz/logit_slopes'),
    ('-np.logaddexp(np.float32(0), -z)', '-np.log(1 + np.exp(-z))', 'edge.npz/losses'),
    ('(-1, keepdims=True) + 1e-5)', '(-1, keepdims=True)) + 1e-5', 'batch.npz/h0.ln_1'),
    ('(root + k.adam_eps)', '(root + 1e-8)', 'sft.npz/first.after.wte.weight'),
    ('if k.eos not in response:', 'if k.eos not in response[1:]:', 'sample.npz/tokens'),
    ('plain * (plain >= clipped)', 'plain * (plain > clipped)',
     'ppo.npz/first.policy.grads.wte.weight'),
    ('np.sqrt(var + 1e-8)', '(np.sqrt(var) + 1e-8)', 'ppo.npz/flat_white'),
    ('(inside | (plain >= clipped))', '(plain >= clipped)', 'ppo.npz/near.slopes'),
    ('(inside | (plain >= clipped))', 'inside', 'ppo.npz/near.slopes'),
    ('np.where(past, w, ', 'np.where(True, w, ', 'batch.npz/h0.heads'),
    ('return z / root, root', 'return z * np.float32(np.nan), root', 'batch.npz/h0.ln_1')])
def test_a_slip_in_the_port_is_noticed(right, wrong, first):
    """With a usual slip in the port, or a NaN, the first array to differ shows where it is."""
    source, slipped = (GOLDEN / 'port.py').read_text(), ModuleType('slipped')
    assert source.count(right) == 1
    exec(source.replace(right, wrong), slipped.__dict__)
    with np.errstate(all='ignore'):
        assert differing(slipped.compare_arrays(GOLDEN))[0] == first


# ----------------------------------------------------------------------------- the ports in C

COMPILER = next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)
needs_compiler = pytest.mark.skipif(not COMPILER, reason='no C compiler')


def run_c(folder, file, *arguments, flags=()):
    """Compiles a C file of a folder and runs it in the trace's; returns what it printed."""
    program = folder / 'program'
    subprocess.run([COMPILER, '-std=c99', '-pedantic', *flags, '-o', program, file, '-lm'],
                   cwd=folder, check=True)
    return subprocess.run([program, *arguments], cwd=GOLDEN, capture_output=True, text=True).stdout


@pytest.fixture
def sources(tmp_path):
    """Returns a folder with copies of the C files, where nothing else can be included."""
    for name in ('prefgpt.c', 'trace.c'):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


@needs_compiler
def test_the_c_port_trains_as_the_scripts_do(sources):
    """prefgpt.c, from rows and a seed alone, prints the numbers of run.json, libm its only help."""
    said = run_c(sources, 'prefgpt.c', 'rows.txt', 'run.json', flags=['-O3', '-Wall'])
    lines = said.splitlines()
    assert [sum(line.startswith(stage) for line in lines) for stage in make.SCRIPTS] == [
        10, 10, 10, 3]
    assert said.count('agrees') == 3 * 20 + 2 + 3 * 5 and lines[-1] == 'all numbers agree'
    assert set(re.findall(r'#include <(\w+)', (GOLDEN / 'prefgpt.c').read_text())) == {
        'stdint', 'stdio', 'stdlib', 'string', 'tgmath'}


@needs_compiler
@pytest.mark.parametrize('real', ['float', 'double'])
def test_the_functions_in_c_agree_with_the_trace(sources, real):
    """All arrays agree: in float at the guide's tolerances, in double at 1e-7, as it promises."""
    said = run_c(sources, 'trace.c', flags=[f'-Dreal={real}'])
    assert re.search(r'^(59|6\d)\d arrays compared, 0 differ$', said, re.M), said


@needs_compiler
@pytest.mark.parametrize('right, wrong, first', [
    ('cube = 0.044715', 'cube = 0.0447', 'batch/h0.gelu'),
    ('- probability[v]) / temperature', '- probability[v])',
     'ppo/first.policy.grads.wte.weight'),
    ('return fmin(z, 0) - log1p(exp(-fabs(z)))', 'return -log(1 + exp(-z))', 'edge/losses')])
def test_a_slip_in_c_is_noticed(sources, right, wrong, first):
    """In double, the first array that differs is the one that a slip or a naive formula spoils."""
    source = (sources / 'prefgpt.c').read_text()
    assert source.count(right) == 1
    (sources / 'prefgpt.c').write_text(source.replace(right, wrong))
    assert run_c(sources, 'trace.c', flags=['-Dreal=double']).startswith(f'{first} DIFFERS')


# ----------------------------------------------------------------------------- is anything in it?

def test_the_files_are_small(stored):
    """At most 1.5 MB with page and ports; C order, little-endian, three types: easily read."""
    assert sum(path.stat().st_size for path in GOLDEN.iterdir() if path.is_file()) <= 1.5e6
    for arrays in stored.values():
        for name, z in arrays.items():
            assert z.flags.c_contiguous and str(z.dtype) in ('float32', 'int64', 'bool'), name
            assert z.dtype.byteorder in '=|<' and np.isfinite(z).all(), name


def test_the_batch_is_ragged(stored):
    """The batch has padding, a response of one token, rows without EOS, EOS in prompts, the pad's
    id in responses and as a last token; every weight is random, biases and LayerNorms too."""
    batch = stored['batch']
    eos, lengths = make.K.eos, batch['response_lengths']
    assert lengths.min() == 1 and len(set(lengths)) > 3 and len(set(batch['prompt_lengths'])) > 3
    assert not batch['real'].all() and batch['response_mask'].sum(1).tolist() == lengths.tolist()
    starts = batch['prompt_lengths']
    ends = [row[start + n - 1] for row, start, n in zip(batch['tokens'], starts, lengths)]
    assert ends.count(eos) == 6 and 0 in ends
    assert any(eos in row[:start] for row, start, end in zip(batch['tokens'], starts, ends)
               if end != eos)                       # EOS in the prompt of a row without EOS
    for name, z in stored['model'].items():
        assert len(np.unique(z)) == z.size or z.size > 250, name
        assert np.abs(z).max() > 0.01 and z.std() > 0.01, name


def test_every_branch_of_ppo_is_taken(stored):
    """The no-EOS rule changes some scores and leaves others; ratios are 1, then clipped on either
    side with an advantage that pulls there, or within; values and gradients are clipped and not."""
    ppo, mask = stored['ppo'], stored['batch']['response_mask']
    raw, scores, ended = ppo['raw_scores'], ppo['scores'], ppo['ended']
    assert (scores[~ended] == np.minimum(raw[~ended], -1)).all() and (scores == raw)[ended].all()
    assert (raw[~ended] > -1).any() and (raw[~ended] < -1).any() and (raw[ended] < -1).any()
    np.testing.assert_allclose(ppo['first.ratio'], 1, atol=1e-5)
    rows = ppo['minibatches'][1]
    ratio, a = ppo['second.ratio'][mask[rows]], ppo['advantages_white'][rows][mask[rows]]
    for clipped in (ratio > 1.2, ratio < 0.8):
        assert (clipped & (a > 0)).any() and (clipped & (a < 0)).any()
    assert ((abs(ratio - 1) < 0.2) & (abs(ratio - 1) > 0.01)).any()
    clipped = (ppo['second.vf_losses'] > ppo['second.vf_losses_unclipped'] + 1e-3)[mask[rows]]
    assert clipped.any() and not clipped.all()
    norms = [float(z) for arrays in stored.values() for name, z in arrays.items()
             if name.endswith('norm') and z.ndim == 0]
    assert min(norms) < make.K.grad_clip < max(norms)


def test_no_number_is_nothing(stored):
    """No loss, gradient or step is 0, every step moves every tensor, and the samplers differ."""
    shift = 'body.ln_f.bias'        # it moves both scores of a pair alike: no gradient, no decay
    before = {'sft': {'': 'policy'}, 'rm': {'': 'reward_model'}, 'dpo': {'': 'policy'},
              'ppo': {'policy.': 'policy', 'value.': 'value_model', 'ref_': 'ref'}}
    for file, models in before.items():
        for name, z in stored[file].items():
            if file == 'rm' and name.endswith(shift):
                continue
            if 'loss' in name or 'norm' in name or 'grads' in name:
                assert np.abs(z).max() > 1e-4, (file, name)
            for prefix, model in models.items():
                if f'{prefix}after.' in name:
                    weight = name.split('after.')[1]
                    assert not np.array_equal(z, stored['model'][f'{model}.{weight}']), name
    sample = stored['sample']
    assert not np.array_equal(sample['draws'], sample['draws_t07'])
    assert len({sample[f'tokens{end}'].tobytes() for end in ('', '_t07', '_t0')}) == 3
    ends = sample['response_mask'].sum(1)
    assert ends.max() == make.K.max_new_tokens and ends.min() == 1
