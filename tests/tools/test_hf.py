"""
tools/hf.py against readers of its own: the numpy GPT-2 of tests/golden/port.py, a BPE in ten lines,
bytes by hand (I24). transformers is asked in test_outside.py. No network: the hub is a folder.
"""
import hashlib, json, os, re, shutil, struct, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS, TEMPLATE, randomize, save_tiny_run, tiny_config, tiny_gpt

import tools.hf
import train_sft
from data.bpe import train_bpe, write_tiktoken
from data.text import checkpoint_text, load_text, load_tokenizer, tokenizer_text
from prefgpt import (GPT, GPTConfig, ScalarGPT, UserError, last_scores, load_checkpoint, load_model,
                     make_batch, save_checkpoint)
from tools.bench import make_tokenizer
from tools.hf import Config, halves, read_safetensors, write_safetensors

sys.path.append(str(Path(__file__).parents[1] / 'golden'))
from port import body

TEXTS = ["it's the 12th test,  isn't it?\n\n\tThe end. the the then",
         'def f(x):\n    return x ** 2\n', '你好，世界。你好', '😀👩\u200d🚀', 'café naïve \xa0\xad\x85',
         '<|endoftext|>', '# # ## Ġ', '']
SMALL = dict(n_layer=1, n_embd=8, block_size=16, vocab_size=301)


# ----------------------------------------------------------------------------- independent readers

def numpy_hidden(tensors, tokens):
    """GPT-2's last hidden states (T, C) of one row, and the embedding; Conv1D has (in, out)."""
    w = {name.removeprefix('transformer.'): np.asarray(tensor, np.float64)
         for name, tensor in tensors.items()}
    w = {name: weight.T if '.c_' in name else weight for name, weight in w.items()}
    return body(w, np.array([tokens]))['hidden'][0], w['wte.weight']


@torch.no_grad()
def same_logits(policy, tensors, tokens):
    """Our logits of one row are numpy's, which are not flat."""
    hidden, wte = numpy_hidden(tensors, tokens)
    logits = policy.logits(policy(torch.tensor([tokens])))[0].numpy()
    assert np.abs(logits - hidden @ wte.T).max() < 1e-5 and np.abs(logits).max() > 1


def bpe_ids(folder, tokenizer, text):
    """The ids of a text by vocab.json and merges.txt: one merge after the other (Sennrich 2016)."""
    vocab = json.loads((folder / 'vocab.json').read_text('utf-8'))
    version, *merges, end = (folder / 'merges.txt').read_text('utf-8').split('\n')
    assert version.startswith('#version') and end == ''
    # A byte's character: vocab.json gives single bytes their id, the tokenizer says which byte
    character = {tokenizer.decode_single_token_bytes(i): token for token, i in vocab.items()
                 if len(token) == 1}
    ids = []
    for piece in re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+"
                            r'|\s+(?!\S)|\s+', text):
        parts = ' '.join(character[bytes([byte])] for byte in piece.encode())
        for merge in merges:
            parts = re.sub(rf'(?<!\S){re.escape(merge)}(?!\S)', merge.replace(' ', ''), parts)
        ids += [vocab[part] for part in parts.split(' ')]
    return ids


# ----------------------------------------------------------------------------- what is imported

@pytest.fixture(scope='session')
def bpe(tmp_path_factory):
    """A small BPE with merges of letters, spaces and parts of CJK, and EOS = 300."""
    path = tmp_path_factory.mktemp('bpe') / 'small.tiktoken'
    write_tiktoken(path, train_bpe(TEXTS * 3, 301))
    return load_tokenizer(path)


@pytest.fixture(autouse=True)
def small_gpt2(bpe, monkeypatch):
    """The small BPE takes the place of gpt2's tokenizer, which needs a network."""
    monkeypatch.setattr(tools.hf, 'load_tokenizer', {'gpt2': bpe}.__getitem__)


def hf_tensors(prefix='transformer.', **shape):
    """Random tensors under transformers' names, the Conv1D's as (in, out), as numpy arrays."""
    c, rng = tiny_config(**shape), np.random.default_rng(0)
    C, sizes = c.n_embd, {'wte.weight': (c.vocab_size, c.n_embd),
                          'wpe.weight': (c.block_size, c.n_embd)}
    for i in range(c.n_layer):
        for name, size in (('attn.c_attn', (C, 3 * C)), ('attn.c_proj', (C, C)),
                           ('mlp.c_fc', (C, 4 * C)), ('mlp.c_proj', (4 * C, C)),
                           ('ln_1', (C,)), ('ln_2', (C,))):
            sizes |= {f'h.{i}.{name}.weight': size, f'h.{i}.{name}.bias': size[-1:]}
    sizes |= {'ln_f.weight': (C,), 'ln_f.bias': (C,)}
    return {prefix + name: (0.3 * rng.standard_normal(size) + ('ln' in name and 'weight' in name)
                            ).astype('f4') for name, size in sizes.items()}


def write_folder(folder, tensors, tokenizer, config=(), **shape):
    """A Hugging Face GPT-2 folder by hand; the tokenizer's files are tools.hf's own."""
    folder.mkdir(parents=True)
    c = tiny_config(**shape)
    (folder / 'config.json').write_text(json.dumps({
        'model_type': 'gpt2', 'n_positions': c.block_size, 'vocab_size': c.vocab_size,
        'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'n_inner': None,
        'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-05, 'n_ctx': c.block_size,
        **dict(config)}))
    tools.hf.write_tokenizer(folder, tokenizer, c.block_size, pad=False)
    write_safetensors(folder / 'model.safetensors', {
        name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    return folder


@pytest.fixture
def folder(tmp_path, bpe):
    """A good folder to spoil: 1 layer, 8 wide, the small BPE."""
    return write_folder(tmp_path / 'good', hf_tensors(**SMALL), bpe, **SMALL)


def run(*command, out):
    tools.hf.main(Config(command=tuple(map(str, command)), out=str(out)))
    return out


def imported(folder, out):
    """The policy of a folder after import."""
    return load_model(GPT, load_checkpoint(run('import', folder, out=out), ['base']), 'policy',
                      'cpu')


def refused(folder, out, *told):
    """Import of the folder fails with one line that tells all this, and leaves nothing behind."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(UserError) as error:
        run('import', folder, out=out)
    assert all(words in str(error.value) for words in told), error.value
    assert '\n' not in str(error.value)
    assert sorted(path.name for path in out.parent.iterdir()) == before


# ----------------------------------------------------------------------------- safetensors

def raw(entries, data, length=None):
    """The bytes of a .safetensors file from a header, a dict or JSON, and numbers."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(dtype, shape, begin, end):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def test_safetensors_bytes_by_hand(tmp_path):
    """Two tensors, byte for byte; a transposed one, whose rows are not in order in memory, is
    written as it looks. Half precision is read, in any order: 1.5 is 0x3e00, or 0x3fc0 as
    bfloat16."""
    header = (b'{"__metadata__": {"format": "pt"}, '
              b'"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, '
              b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}')
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, {'a': torch.tensor([[1.5], [-2.0]]), 'b': torch.tensor([0.25])})
    assert path.read_bytes() == raw(header + b' ' * (-len(header) % 8),
                                    struct.pack('<fff', 1.5, -2.0, 0.25))
    assert {name: tensor.tolist() for name, tensor in read_safetensors(path).items()} == {
        'a': [[1.5], [-2.0]], 'b': [0.25]}
    x = torch.arange(6.0).view(2, 3)
    write_safetensors(path, {'x': x.t(), 'half': x.half()})
    back = read_safetensors(path)
    assert torch.equal(back['x'], x.t()) and back['half'].dtype == torch.float32

    path.write_bytes(raw({'last': entry('F32', [], 4, 8), 'bf16': entry('BF16', [1], 2, 4),
                          'f16': entry('F16', [1, 1], 0, 2)},
                         b'\x00\x3e\xc0\x3f' + struct.pack('<f', 1.5)))
    assert {name: tensor.float().tolist() for name, tensor in read_safetensors(path).items()} == {
        'f16': [[1.5]], 'bf16': [1.5], 'last': 1.5}


F = struct.pack('<f', 1.0)
BAD_FILES = {
    'shorter than a length': (b'\x01\x00', '2 bytes'),
    'a header of 8 exabytes': (raw({}, b'', 2 ** 63), f'header of {2 ** 63}'),
    'not JSON': (raw(b'{"x"', b''), 'delimiter'),
    'not UTF-8': (raw(b'{"\xff": 1}', b''), 'utf-8'),
    'nested too deep': (raw(b'[' * 10 ** 5, b''), 'recursion'),
    'not an object': (raw(b'[]', b''), 'list'),
    'a name twice': (raw(b'{"x": 1, "x": 1}', b''), "'x' appears twice"),
    'NaN in the header': (raw(b'{"x": NaN}', b''), 'NaN'),
    'no entry': (raw({'x': 1}, b''), "{'x': 1}"),
    'no shape': (raw({'x': {'dtype': 'F32', 'data_offsets': [0, 4]}}, F), "'x'"),
    'an unread dtype': (raw({'x': entry('F64', [1], 0, 8)}, F + F), "{'dtype': 'F64'"),
    'a negative size': (raw({'x': entry('F32', [-1, -1], 0, 4)}, F), "'x'"),
    'a size that is no integer': (raw({'x': entry('F32', [1.0], 0, 4)}, F), "'x'"),
    'the shape does not fill the span': (raw({'x': entry('F32', [3], 0, 8)}, F + F), "'x'"),
    'offsets the wrong way round': (raw({'x': entry('F32', [1], 4, 0)}, F), "'x'"),
    'past the end': (raw({'x': entry('F32', [2], 0, 8)}, F), "'x'"),
    'a hole': (raw({'x': entry('F32', [1], 0, 4), 'y': entry('F32', [1], 8, 12)}, F * 3), "'y'"),
    'an overlap': (raw({'x': entry('F32', [2], 0, 8), 'y': entry('F32', [1], 4, 8)}, F * 2), "'y'"),
    'something after the end': (raw({'x': entry('F32', [1], 0, 4)}, F + b'\0'), '1 bytes after'),
    'a huge tensor': (raw({'x': entry('F32', [2 ** 60], 0, 2 ** 62)}, F), "'x'"),
    'a mask alone': (raw({'h.0.attn.bias': entry('BOOL', [4], 0, 4)}, F), 'Missing key(s)'),
    'a weight of bools': (raw({'h.0.attn.c_attn.bias': entry('BOOL', [4], 0, 4)}, F), 'torch.bool'),
    'another bias': (raw({'other.h.0.attn.bias': entry('U8', [4], 0, 4)}, F), "'other.h.0.attn"),
    **{f'{kept} of it': (kept, '') for kept in (0.0, 0.001, 0.5, 0.999)}}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_bad_safetensors_file_is_refused(name, folder, tmp_path):
    """Whatever is wrong with it: one line with the file, and nothing left behind."""
    data, told = BAD_FILES[name]
    path = folder / 'model.safetensors'
    path.write_bytes(data if isinstance(data, bytes)
                     else path.read_bytes()[:int(path.stat().st_size * data)])
    refused(folder, tmp_path / 'out', str(folder), told)


# ----------------------------------------------------------------------------- weights in

@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_an_imported_model_has_numpys_logits(prefix, tmp_path, bpe):
    """Conv1D's (in, out) became Linear's (out, in); the masks in old files are passed over, a head
    that repeats the embedding too. (I24)"""
    tensors = hf_tensors(prefix, vocab_size=301)
    more = {'lm_head.weight': tensors[f'{prefix}wte.weight']}
    for i in range(2):
        more[f'{prefix}h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 32, 32), 'f4'))
        more[f'{prefix}h.{i}.attn.masked_bias'] = np.array(-1e4, 'f4')
    folder = write_folder(tmp_path / 'hf', tensors | more, bpe, vocab_size=301,
                          config={'n_inner': 64 if prefix else None})    # four times the width
    same_logits(imported(folder, tmp_path / 'out' / 'base'), tensors, [300, 1, 2, 44, 77, 5])


WEIGHT = 'transformer.h.0.attn.c_attn.weight'
BAD_WEIGHTS = {
    'missing': (lambda t: t.pop('transformer.h.0.attn.c_attn.bias'),
                'Missing key(s) in state_dict: "h.0.attn.c_attn.bias"'),
    'unknown': (lambda t: t.update({'transformer.h.1.ln_1.bias': t['transformer.ln_f.bias']}),
                'Unexpected key(s) in state_dict: "h.1.ln_1.bias"'),
    'a reward model': (lambda t: t.update({'score.weight': t['transformer.wte.weight'][:1]}),
                       'Unexpected key(s) in state_dict: "score.weight"'),
    '(out, in)': (lambda t: t.update({WEIGHT: t[WEIGHT].T.copy()}), 'torch.Size([24, 8])'),
    'one dimension': (lambda t: t.update({WEIGHT: t[WEIGHT].ravel()}), 'torch.Size([192])'),
    'more positions': (lambda t: t.update({'transformer.wpe.weight': np.zeros((17, 8), 'f4')}),
                       'torch.Size([17, 8])'),
    'nan': (lambda t: t[WEIGHT].__setitem__((0, 0), np.nan), 'c_attn.weight'),
    'twice': (lambda t: t.update({'ln_f.bias': t['transformer.ln_f.bias']}),
              "'ln_f.bias' is there twice"),
    'not tied': (lambda t: t.update({'lm_head.weight': t['transformer.wte.weight'] + 1}),
                 "'lm_head.weight' is not 'wte.weight'")}


@pytest.mark.parametrize('name', BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name, tmp_path, bpe):
    change, told = BAD_WEIGHTS[name]
    tensors = hf_tensors(**SMALL)
    change(tensors)
    folder = write_folder(tmp_path / 'bad', tensors, bpe, **SMALL)
    refused(folder, tmp_path / 'out', str(folder), told)


@pytest.mark.parametrize('key, value', [
    ('model_type', 'llama'), ('activation_function', 'gelu'), ('layer_norm_epsilon', 1e-6),
    ('scale_attn_weights', False), ('scale_attn_by_inverse_layer_idx', True),
    ('tie_word_embeddings', False), ('n_layer', None), ('n_layer', 0), ('n_layer', 1.0),
    ('n_head', 3), ('n_positions', -1), ('vocab_size', '301'), ('vocab_size', 300),
    ('n_positions', 10 ** 30), ('n_embd', 2 ** 40)])
def test_a_config_that_is_not_ours_is_refused(key, value, tmp_path, bpe):
    """A GPT-2 with exact GELU, say, would load and be another function."""
    folder = write_folder(tmp_path / 'bad', hf_tensors(**SMALL), bpe, config={key: value}, **SMALL)
    refused(folder, tmp_path / 'out', key, str(value) if value else '')


def sparse(path, size, begin=b''):
    """Makes a file of a size that no disk must hold."""
    path.write_bytes(begin)
    os.truncate(path, size)
    return path


def link_out(path, to=None):
    """Moves a file out of its folder, or removes it, and links to it, or to another place."""
    outside = to or path.rename(path.parents[1] / f'moved-{path.name}')
    path.unlink(missing_ok=True)
    path.symlink_to(outside)


G = 10 ** 9
HOSTILE = {
    'a config outside': (lambda f: link_out(f / 'config.json'), 'out of the folder'),
    'weights outside': (lambda f: link_out(f / 'model.safetensors'), 'out of the folder'),
    'merges outside, by ..': (lambda f: link_out(f / 'merges.txt', '../x'), 'out of the folder'),
    'an endless file': (lambda f: link_out(f / 'vocab.json', '/dev/zero'), 'vocab.json: no file'),
    'a circle': (lambda f: link_out(f / 'vocab.json', 'vocab.json'), 'vocab.json: no file'),
    'a pipe': (lambda f: (f / 'merges.txt').unlink() or os.mkfifo(f / 'merges.txt'), 'no file'),
    'a huge vocab.json': (lambda f: sparse(f / 'vocab.json', 5 * G), f'{5 * G} bytes'),
    'a huge weight': (lambda f: sparse(f / 'model.safetensors', 40 * G, raw({
        'x': entry('F32', [10 * G - 100], 0, 40 * G - 400)}, b'')), 'more than a model'),
    'a mask of 9 MB': (lambda f: (f / 'model.safetensors').write_bytes(raw({
        'h.0.attn.bias': entry('U8', [9 * 10 ** 6], 0, 9 * 10 ** 6)}, bytes(9 * 10 ** 6))),
        'Missing key(s)'),
    'many layers': (lambda f: spoil_config(f, n_layer=2 ** 16), 'not the shape of a model'),
    'wide layers': (lambda f: spoil_config(f, n_embd=2 ** 16), 'not the shape of a model'),
    'the widest ones': (lambda f: spoil_config(f, n_layer=256, n_embd=400), 'state_dict')}


def spoil_config(folder, **shape):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | shape))


@pytest.fixture
def little_memory():
    """Lets this process take another half gigabyte, no more."""
    resource = pytest.importorskip('resource')
    limits, statm = resource.getrlimit(resource.RLIMIT_AS), Path('/proc/self/statm')
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2 ** 29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_folder_is_refused(name, folder, tmp_path, little_memory):
    """Somebody else's folder leads nowhere else, and takes neither gigabytes nor minutes."""
    (spoil, told), began = HOSTILE[name], time.time()
    spoil(folder)
    refused(folder, tmp_path / 'out', told)
    assert time.time() - began < 10


def test_a_huge_header_is_not_read(tmp_path, little_memory):
    with pytest.raises(UserError, match=f'a header of {5 * G}'):
        read_safetensors(sparse(tmp_path / 'x', 6 * G, raw({}, b'', 5 * G)))


def test_links_inside_are_followed(folder, tmp_path):
    """A link within the folder is harmless, and the Hub's cache consists of links to blobs/."""
    (folder / 'real').mkdir()
    (folder / 'config.json').rename(folder / 'real' / 'config.json')
    (folder / 'config.json').symlink_to('real/config.json')
    run('import', folder, out=tmp_path / 'one')
    snapshot, blobs = tmp_path / 'model' / 'snapshots' / '0123', tmp_path / 'model' / 'blobs'
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        shutil.copy(path, blobs / f'blob-{path.name}')
        (snapshot / path.name).symlink_to(f'../../blobs/blob-{path.name}')
    run('import', snapshot, out=tmp_path / 'two')


@pytest.mark.parametrize('missing', [['config.json'], ['model.safetensors'], ['vocab.json'],
                                     ['merges.txt'], ['vocab.json', 'merges.txt']])
def test_a_missing_file_is_named(missing, folder, tmp_path, bpe):
    """A pickle does not stand in for the weights. Weights alone have gpt2's ids, but not beside a
    tokenizer in another form: its ids would silently be read as gpt2's."""
    for name in missing:
        (folder / name).rename(folder / 'pytorch_model.bin')
    if len(missing) == 2:
        saved = load_checkpoint(run('import', folder, out=tmp_path / 'alone'), ['base'])
        assert saved['tokenizer'] == tokenizer_text(bpe)
        (folder / 'tokenizer.json').write_text('{}')
    refused(folder, tmp_path / 'out', missing[0])


def test_sft_starts_from_an_imported_model(tiny_data, tmp_path, monkeypatch):
    """The data's tokenizer is compared by content, not by where it came from."""
    tokenizer, _ = load_text(tiny_data)
    monkeypatch.setattr(tools.hf, 'load_tokenizer', {'gpt2': tokenizer}.__getitem__)
    exported = run('export', save_tiny_run(tmp_path / 'run', tiny_data), out=tmp_path / 'hf')
    base = run('import', exported, out=tmp_path / 'base')
    cfg = dict(data=str(tiny_data), init=str(base), steps=2, eval_every=2, max_new_tokens=4,
               device='cpu')
    assert train_sft.main(train_sft.Config(out=str(tmp_path / 'sft'), **cfg))['loss'] > 0
    assert load_checkpoint(tmp_path / 'sft', ['sft'])['template'] == LETTERS


# ----------------------------------------------------------------------------- tokenizer

def test_tokenizer_files_mean_the_same_ids(tmp_path, bpe):
    """By the merges; bytes are spelled as every GPT-2 file does, no two alike."""
    tools.hf.write_tokenizer(tmp_path, bpe, 16, pad=False)
    for text in TEXTS:
        assert bpe_ids(tmp_path, bpe, text) == bpe.encode_ordinary(text)
    assert sum(len(bpe.encode_ordinary(text)) for text in TEXTS) < 0.9 * sum(
        len(text.encode()) for text in TEXTS)                           # there were merges to do
    spelled = {i: token for token, i in json.loads((tmp_path / 'vocab.json').read_text()).items()}
    one = {byte: spelled[bpe.encode_single_token(bytes([byte]))] for byte in range(256)}
    assert ''.join(one[byte] for byte in b' the\n\x00\x7f\xad') == 'ĠtheĊĀġŃ'
    assert ''.join(one[byte] for byte in 'é"~'.encode()) == 'Ã©"~'
    assert len(set(one.values())) == 256 and not any(map(str.isspace, one.values()))


def test_halves_are_the_last_merge():
    """abc by (ab)c although bc is a token too, because ab has the lower rank."""
    ranks = {b'a': 0, b'b': 1, b'c': 2, b'ab': 3, b'bc': 4, b'abc': 5, b'cab': 6, b'cba': 7}
    assert halves(b'abc', ranks) == [b'ab', b'c'] and halves(b'cab', ranks) == [b'c', b'ab']
    assert halves(b'ab', ranks) == [b'a', b'b']
    with pytest.raises(UserError, match="no merges lead to b'cba', rank 7"):
        halves(b'cba', ranks)


@pytest.mark.parametrize('name, change', [
    ('vocab.json', lambda text: text.replace('"a"', '"zzz"')),
    ('vocab.json', lambda text: '{'),
    ('vocab.json', lambda text: text.replace('"<|endoftext|>": 300', '"<|endoftext|>": 301')),
    ('merges.txt', lambda text: '\n'.join(sorted(text.split('\n')))),
    ('merges.txt', lambda text: text.rsplit('\n', 2)[0] + '\n')])
def test_another_tokenizer_than_gpt2s_is_refused(name, change, folder, tmp_path):
    """Another token, EOS, order of the merges, one merge less: ids would be other words; or no
    JSON."""
    text = (folder / name).read_text('utf-8')
    assert change(text) != text
    (folder / name).write_text(change(text), 'utf-8')
    refused(folder, tmp_path / 'out', 'vocab.json')


# ----------------------------------------------------------------------------- out

def save_run(folder, kind, name, model, tokenizer, **extra):
    """A run folder with the model, as a stage leaves it."""
    folder.mkdir()
    save_checkpoint(folder / 'ckpt.pt', kind, 1, train_sft.Config(),
                    checkpoint_text(tokenizer, TEMPLATE), {}, {name: model}, [], **extra)
    return folder


def test_tensors_that_export_does_not_know_are_refused(tmp_path, bpe):
    """An adapter in a checkpoint would be left out by transformers without a word: what is exported
    would be another model."""
    folder = save_run(tmp_path / 'run', 'sft', 'policy', tiny_gpt(1, vocab_size=301), bpe)
    saved = torch.load(folder / 'ckpt.pt', weights_only=True)
    saved['weights']['policy']['h.0.attn.c_attn.lora_A'] = torch.ones(2, 16)
    torch.save(saved, folder / 'ckpt.pt')
    with pytest.raises(UserError, match='run: .*Unexpected key.*lora_A'):
        run('export', folder, out=tmp_path / 'hf')
    assert not (tmp_path / 'hf').exists()


@pytest.mark.parametrize('kind', ['base', 'sft', 'ppo', 'dpo'])
def test_an_exported_policy_gives_numpy_our_logits(kind, tmp_path, bpe):
    """Names with prefix, Conv1D's order, no lm_head; config.json says what transformers would take
    for granted and is not so with us; import of it is the same policy, bit for bit. (I24)"""
    policy = tiny_gpt(1, vocab_size=301)
    folder = run('export', save_run(tmp_path / kind, kind, 'policy', policy, bpe),
                 out=tmp_path / 'hf')
    tensors = read_safetensors(folder / 'model.safetensors')
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in hf_tensors(vocab_size=301).items()}
    same_logits(policy, tensors, [300, 4, 250, 31, 7])
    assert json.loads((folder / 'config.json').read_text()) == {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': 301,
        'n_positions': 32, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'bos_token_id': 300,
        'eos_token_id': 300, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
        'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
        'tie_word_embeddings': True, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    assert json.loads((folder / 'tokenizer_config.json').read_text()) == {
        'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': 32, 'bos_token': '<|endoftext|>',
        'eos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>',
        'clean_up_tokenization_spaces': False}
    back = imported(folder, tmp_path / 'back')
    for name, weight in policy.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


def test_an_exported_reward_model_scores_as_ours(tmp_path, bpe):
    """A ragged batch as transformers reads it: padded with V, scored at the last other id, which is
    EOS. The spare row is zeros, and the shift is in config.json."""
    model = randomize(ScalarGPT(tiny_config(vocab_size=301)), 2)
    folder = run('export', save_run(tmp_path / 'rm', 'rm', 'reward_model', model, bpe, shift=0.75),
                 out=tmp_path / 'hf')
    config = json.loads((folder / 'config.json').read_text())
    assert config['architectures'] == ['GPT2ForSequenceClassification']
    assert (config['vocab_size'], config['pad_token_id'], config['eos_token_id']) == (302, 301, 300)
    assert (config['num_labels'], config['prefgpt_score_shift']) == (1, 0.75)
    tensors = read_safetensors(folder / 'model.safetensors')
    assert tensors['score.weight'].shape == (1, 16)
    assert tensors['transformer.wte.weight'].shape == (302, 16)
    assert not tensors['transformer.wte.weight'][301].any()

    rows = [([5, 6, 7], [8, 300]), ([9], [10, 11, 12, 13, 14, 300]), ([300], [300]), ([1, 2], [3])]
    tokens, _, _, response_mask = make_batch(rows)
    with torch.no_grad():
        ours = last_scores(model, tokens, response_mask)
    for score, (prompt, response) in zip(ours.tolist(), rows):
        padded = prompt + response + [301] * (9 - len(prompt + response))
        last = max(i for i, token in enumerate(padded) if token != config['pad_token_id'])
        hidden = numpy_hidden(tensors, padded)[0][last]
        assert score == pytest.approx(float(hidden @ tensors['score.weight'][0].numpy()), abs=1e-5)

    vocab = json.loads((folder / 'vocab.json').read_text('utf-8'))
    assert (vocab['<|pad|>'], vocab['<|endoftext|>']) == (301, 300)
    assert json.loads((folder / 'tokenizer_config.json').read_text())['pad_token'] == '<|pad|>'


# ----------------------------------------------------------------------------- the hub

def test_the_hubs_models():
    """124M to 1.5B parameters, as published; n_head divides the width."""
    counts = {}
    for name, (*shape, _, _) in tools.hf.HUB.items():
        with torch.device('meta'):
            model = GPT(GPTConfig(1024, 50257, *shape))
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {'gpt2': 124_439_808, 'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080,
                      'gpt2-xl': 1_557_611_200}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: GPT-2's shape and vocabulary size, but 1 layer, 2 wide."""
    shape = dict(n_layer=1, n_head=1, n_embd=2, block_size=1024, vocab_size=50257)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in hf_tensors('', **shape).items()}
    for name in ('gpt2-medium', 'gpt2'):
        path = tmp_path / 'hub' / name / 'resolve' / 'main' / 'model.safetensors'
        path.parent.mkdir(parents=True)
        write_safetensors(path, tensors)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(tools.hf, 'HUB_URL', (tmp_path / 'hub').as_uri())
    monkeypatch.setattr(tools.hf, 'HUB', {'gpt2': (1, 1, 2, 'main', sha256),
                                          'gpt2-medium': (1, 1, 2, 'main', '')})
    tokenizer = make_tokenizer(50257)
    monkeypatch.setattr(tools.hf, 'load_tokenizer', {'gpt2': tokenizer}.__getitem__)
    monkeypatch.chdir(tmp_path)         # where no folder is called gpt2
    (tmp_path / 'out').mkdir()
    return path


def test_a_hub_name_is_downloaded_and_imported(hub, folder, tmp_path, monkeypatch, bpe, capsys):
    """The weights of gpt2 are checked, and one wrong byte is enough; of the others the sum is
    printed, unchecked. What an earlier download left is used up. A folder goes first."""
    (tmp_path / 'out' / 'base.download.part').write_bytes(b'half')
    policy = imported('gpt2', tmp_path / 'out' / 'base')
    assert torch.equal(policy.wte.weight, read_safetensors(hub)['wte.weight'])
    assert 'not checked' not in capsys.readouterr().out
    imported('gpt2-medium', tmp_path / 'out' / 'medium')
    sha256 = tools.hf.HUB['gpt2'][4]
    assert f'gpt2-medium: sha256 {sha256}, not checked' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['base', 'medium']
    hub.write_bytes(hub.read_bytes()[:-1] + b'?')
    refused('gpt2', tmp_path / 'out' / 'other', 'model.safetensors', 'sha256')
    monkeypatch.setattr(tools.hf, 'load_tokenizer', {'gpt2': bpe}.__getitem__)
    folder.rename(tmp_path / 'gpt2')
    assert imported('gpt2', tmp_path / 'out' / 'folder').config.vocab_size == 301


@pytest.mark.parametrize('command, out, told', [
    ((), 'x', 'say import WHERE'), (('export', 'a', 'b'), 'x', 'say import WHERE'),
    (('imprt', 'a'), 'x', 'or export RUN'), (('import', 'a'), '', 'say import WHERE'),
    (('import', 'nowhere'), 'x', 'gpt2-xl.*config.json'), (('export', 'nowhere'), 'x', 'nowhere'),
    (('import', 'gpt2'), '.', 'there already'), (('export', 'RUN'), '.', 'there already')])
def test_a_wrong_command_is_told_in_one_line(command, out, told, tmp_path, monkeypatch):
    """Also what is neither a folder, nor a known name, nor a run; nothing there is overwritten."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        tools.hf.main(Config(command, out))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(folder, random_run, tmp_path, monkeypatch):
    """What fails half way: no --out, and no temporary folder."""
    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tools.hf, 'write_tokenizer', full)      # the weights are written by then
    monkeypatch.setattr(torch, 'save', full)
    for command in (('import', folder), ('export', random_run)):
        with pytest.raises(OSError, match='No space'):
            run(*command, out=tmp_path / 'out')
        assert sorted(tmp_path.iterdir()) == before
