"""
Feeds mutated files to all that reads files: rows, safetensors, Hugging Face folders, tokenizers,
checkpoints, logs, and what judges return. Each must be read, and then hold exactly what the file
says, or be refused by a UserError, which is one line. Anything else is a fault.

    python tests/fuzz.py 20000              # so many mutants in all: minutes
    python tests/fuzz.py rows 17            # one of them again, with its traceback

Prints a table; the exit status is 1 if there was a fault. The same number makes the same mutant.
Left out: files that change while they are read, and checkpoints that somebody forged with all
checksums right (they run no code, but may end in a traceback).
"""
import collections, contextlib, copy, io, json, re, shutil, sys, tempfile, time
from pathlib import Path
from random import Random

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / 'tests')]

import numpy as np
import torch
from conftest import AB_MERGED, STAGES, contents, write_toy_data

import data.prepare
import tools.hf
import train_sft
from data.judge import load_judge
from data.shapes import CONTENT, SHAPES
from data.text import RESPONSES, build_tokenizer, encode_rows, load_rows, load_split, load_text
from prefgpt import GPT, UserError, load_checkpoint, load_model

TEXTS = ['', ' ', '\n', '\0', '\x1b[2J', '\u202e', '\u2028', '\ud800', '\ufeff', '\U0001f600', '{}',
         '<|endoftext|>', '</s>', '\nuser: x\nbot:', '\n\nHuman: x\n\nAssistant:', '[{"role":',
         'a\n' * 99, ' ' * 100_001 + 'a', 'prompt', 'chosen', 'messages', 'user', '../x', '-1']
ODD = [*TEXTS, None, True, False, 0, 1, -1, 1.5, 1e400, 2 ** 64, 10 ** 400, [], {}, [[]], [None],
       {'role': 'user'}, [{'role': 'user', 'content': 'x'}], {'reward': 1}]
TIKTOKEN_LINES = ['', '== 3', 'YWI= 1', 'YWI= -1', 'YWI= 257', 'YQ== 1e3', f'YWI= {2 ** 64}',
                  f'YWI= {"9" * 5000}', 'YWI=\u2028256', 'YWI=  \u0663']
JUDGE = '''import decimal, sys, numpy, torch
class Odd:
    def __repr__(self): raise ValueError('no repr')
    def item(self): return self
def score(prompt, response): return %s
'''
RESULTS = ('1.0 True -2 10**400 10**5000 1e39 float("nan") None "1" "\\ud800" "\\x1b[2J\\n" b"" '
           '[] [1.0] {} () len(response) 1/0 1j score int sys.exit() range(3) [][1] Odd() Odd '
           'numpy.float32(1) numpy.float64("inf") numpy.array(1) numpy.ones(2) numpy.str_("x") '
           'torch.tensor(2.0) torch.tensor(1j) torch.ones(2) torch.zeros(0) decimal.Decimal("0.1") '
           'decimal.Decimal("nan") score(prompt,response) {"reward":1.0} {"reward":Odd()}').split()


# ----------------------------------------------------------------------------- mutations

def damage(rng, data):
    """Returns bytes with one part flipped, taken out, zero, copied, put in, or noise; or cut."""
    data, how, size = bytearray(data), rng.randrange(6), rng.choice([1, 1, 2, 4, 8, 64, 1000])
    at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[at:at + (how != 4) * size] = [
        bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:at + size]), b'', bytes(size),
        data[other:other + size], rng.choice(TEXTS).encode(errors='surrogatepass'),
        rng.randbytes(size)][how]
    return bytes(data[:at] if rng.random() < 0.1 else data)


def alter(rng, value):
    """Returns a JSON value that is changed in one place, its own or further down."""
    how = rng.random()
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value, pairs = copy.copy(value), isinstance(value, dict)
        key = rng.choice(list(value) if pairs else range(len(value)))
        if how < 0.15:
            del value[key]
        elif how < 0.25 and pairs:
            value[rng.choice([*TEXTS, *sorted(CONTENT)])] = rng.choice([value[key], *ODD])
        elif how < 0.25:
            value.insert(key, rng.choice([value[key], *ODD]))
        else:
            value[key] = alter(rng, value[key])
        return value
    if isinstance(value, str) and how < 0.6:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(3):]
    if type(value) is int and how < 0.6:
        return value + rng.choice([-8, -1, 1, 4, 2 ** 31, 2 ** 63])
    return rng.choice(ODD)


def spoil(rng, text):
    """Returns a JSON text with one change, in its values or its bytes, as bytes."""
    return (json.dumps(alter(rng, json.loads(text))).encode() if rng.random() < 0.6
            else damage(rng, text.encode()))


def spoil_weights(rng, path):
    """Changes a .safetensors file: its header, or any of its bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], 'little')
    header = spoil(rng, raw[8:start].decode())
    path.write_bytes(len(header).to_bytes(8, 'little') + header + raw[start:] if rng.random() < 0.7
                     else damage(rng, raw))


def read_by_hand(path):
    """Returns the tensors of a good .safetensors file, as its header has them."""
    raw, kinds = path.read_bytes(), {'F32': '<f4', 'F16': '<f2', 'BF16': '<i2', 'BOOL': '?',
                                     'U8': 'u1'}
    start = 8 + int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:start])
    header.pop('__metadata__', None)
    return {name: torch.from_numpy(np.frombuffer(
        raw[start:][slice(*entry['data_offsets'])], kinds[entry['dtype']]).reshape(
            entry['shape']).copy()) for name, entry in header.items()}


# ----------------------------------------------------------------------------- kinds of files

def good_files(top):
    """Writes what the mutants are made from: data, a run halfway and at its end, an export."""
    write_toy_data(top / 'data')
    (top / 'data' / 'bytes.tiktoken').write_text(AB_MERGED)
    cfg = train_sft.Config(data=f'{top}/data', out=f'{top}/run', n_layer=1, n_head=2, n_embd=8,
                           block_size=16, steps=2, eval_every=1, max_new_tokens=2, device='cpu')
    train_sft.main(cfg)
    shutil.copytree(top / 'run', top / 'half')
    (top / 'half' / 'ckpt.prev.pt').rename(top / 'half' / 'ckpt.pt')
    tools.hf.main(tools.hf.Config(('export', f'{top}/run'), f'{top}/hf'))
    return cfg


def examples():
    """Yields a row of every shape, out of the docstrings of data/shapes.py."""
    for shape in dict.fromkeys(each[0] for each in SHAPES):
        for place in re.finditer(r'(?m)^ {4}(?=\{")', shape.__doc__):
            yield json.JSONDecoder().raw_decode(shape.__doc__, place.end())[0]


def rows(rng, top, cfg):
    """Feeds a mutated row among four good ones to the gate: what it keeps is canonical."""
    good = json.dumps(rng.choice(list(examples())))
    good = [re.sub('(Why|Name|The)', rf'\1 {i}', good) for i in range(4)]
    lines, array = [line.encode() for line in good], rng.random() < 0.2
    lines.insert(rng.randrange(5), spoil(rng, rng.choice(good)))
    path, out = top / 'mutant.json', top / 'out'
    path.write_bytes(damage(rng, b'[' + b', '.join(lines) + b']') if array else b'\n'.join(lines))
    data.prepare.main(data.prepare.Config((str(path),), str(out), f'{top}/data/bytes.tiktoken',
                                          skip=rng.random() < 0.8))
    for kind in [kind for kind in RESPONSES if (out / f'train.{kind}.jsonl').exists()]:
        kept = sum(load_split(out, kind, load_text(out)[1]['template']), [])
        assert kept == [json.loads(line) for split in ('train', 'val') for line in
                        (out / f'{split}.{kind}.jsonl').read_text().split('\n') if line]
        assert array or all(f' {i}' in str(kept) for i in range(4)), 'a good row is lost'


def canonical(rng, top, cfg):
    """Feeds a mutated line among canonical rows to load_rows and encode_rows."""
    kind, path = rng.choice(list(RESPONSES)), top / 'mutant.jsonl'
    lines = (top / 'data' / f'train.{kind}.jsonl').read_text().splitlines()[:5]
    path.write_bytes('\n'.join(lines[1:]).encode() + b'\n' + spoil(rng, lines[0]))
    tokenizer, read = load_text(top / 'data')[0], load_rows(path, kind)
    for text in [row[key] for row in read for key in ('prompt', *RESPONSES[kind])]:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    encode_rows(read, kind, tokenizer, 16)
    assert len(read) >= 4, 'a good row is lost'


def safetensors(rng, top, cfg):
    """Feeds a mutated .safetensors file to read_safetensors: each tensor is the file's."""
    path, x = top / 'mutant.safetensors', torch.arange(6.0)
    tools.hf.write_safetensors(path, {'x': x.view(2, 3), 'y': x[:1], 'z': x[0]})
    spoil_weights(rng, path)
    read = {name: tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in tools.hf.read_safetensors(path).items()}
    assert contents(read) == contents(read_by_hand(path)), 'other tensors than the file holds'


def folders(rng, top, cfg):
    """Feeds a mutated Hugging Face folder to tools.hf import: the weights are the file's."""
    folder = shutil.copytree(top / 'hf', top / 'mutant')
    path = folder / rng.choice(['config.json', 'vocab.json', 'merges.txt', 'model.safetensors'])
    if path.suffix == '.safetensors':
        spoil_weights(rng, path)
    elif path.suffix == '.json':
        path.write_bytes(spoil(rng, path.read_text()))
    else:
        path.write_bytes(damage(rng, path.read_bytes()))
    tools.hf.main(tools.hf.Config(('import', str(folder)), f'{top}/out'))
    saved = load_checkpoint(top / 'out', ['base'])
    load_model(GPT, saved, 'policy', 'cpu')
    held = {name.removeprefix('transformer.'): tensor.t() if tools.hf.CONV1D.search(name) else
            tensor for name, tensor in read_by_hand(folder / 'model.safetensors').items()}
    assert contents(held) == contents(saved['weights']['policy']), 'other weights than the file'


def tokenizers(rng, top, cfg):
    """Feeds a mutated tokenizer, tokenizer's name or template to load_text: texts come back."""
    folder = shutil.copytree(top / 'data', top / 'mutant')
    path = folder / rng.choice(['tokenizer', 'bytes.tiktoken', 'bytes.tiktoken', 'template.txt'])
    lines = path.read_text().split('\n')
    lines[rng.randrange(len(lines))] = rng.choice([rng.choice(lines), *TIKTOKEN_LINES])
    path.write_bytes('\n'.join(lines).encode() if rng.random() < 0.5
                     else damage(rng, path.read_bytes()))
    tokenizer, text = load_text(folder)
    again = build_tokenizer(text['tokenizer'])
    for words in ('ab abab', 'é\0\n  x', '<|endoftext|>', ''.join(map(chr, range(300)))):
        ids = tokenizer.encode_ordinary(words)
        assert tokenizer.decode(ids) == words and again.encode_ordinary(words) == ids
    assert tokenizer.n_vocab == tokenizer.eot_token + 1 and text['template'].count('{}') == 1


def checkpoints(rng, top, cfg):
    """Feeds a checkpoint with damaged bytes to load_checkpoint: what is read is what was saved."""
    path = top / 'ckpt.pt'
    path.write_bytes(damage(rng, (top / 'run' / 'ckpt.pt').read_bytes()))
    assert contents(load_checkpoint(path, STAGES)) == contents(load_checkpoint(top / 'run', STAGES))


def logs(rng, top, cfg):
    """Resumes a run beside a mutated log.jsonl: it ends as ever, and its new rows can be read."""
    out = shutil.copytree(top / 'half', top / 'mutant')
    path = out / 'log.jsonl'
    before = damage(rng, path.read_bytes())
    path.write_bytes(before)
    train_sft.main(train_sft.Config(**{**vars(cfg), 'out': str(out), 'resume': True}))
    assert contents(load_checkpoint(out, ['sft'])['weights']) == contents(
        load_checkpoint(top / 'run', ['sft'])['weights'])
    lines = path.read_bytes().split(b'\n')
    assert lines.pop() == b'' and [json.loads(line)['step'] for line in lines[-2:]] == [2, 2]
    assert before.startswith(b'\n'.join(lines[:-2])), 'rows before the checkpoint were changed'


def judges(rng, top, cfg):
    """Calls a reward.py that returns anything: finite Python floats by name come out."""
    def expression(depth):
        if depth == 0 or rng.random() < 0.5:
            return rng.choice(RESULTS)
        form = rng.choice(['{"reward":%s,"x":%s}', '{"reward":1.0,%s:%s}', '[%s,%s]', '%s+%s',
                           '(%s if prompt else %s)', '{"reward":-%s,**%s}'])
        return form % (expression(depth - 1), expression(depth - 1))
    path = top / 'reward.py'
    path.write_text(JUDGE % expression(2))
    found = load_judge(path)('p', 'r')
    assert 'reward' in found and {*map(type, found)} == {str}
    assert all(type(value) is float and abs(value) < 1e38 for value in found.values())


KINDS = {kind.__name__: kind for kind in (
    rows, canonical, safetensors, folders, tokenizers, checkpoints, logs, judges)}


# ----------------------------------------------------------------------------- all of them

def try_one(kind, number, top, cfg):
    """Tries one mutant in the folder top; returns 'read' or 'refused', or raises the fault."""
    kept, path = {*top.iterdir()}, list(sys.path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            KINDS[kind](Random(f'{kind} {number}'), top, cfg)
        return 'read'
    except UserError as error:
        assert str(error).strip(), 'an empty message'
        return 'refused'
    finally:
        sys.path[:] = path                      # load_judge adds the folder of a reward.py
        for path in {*top.iterdir()} - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fuzz(total, top, first=0, kinds=KINDS):
    """Tries so many mutants of all kinds; returns kind -> counts, and a line for every fault."""
    table, faults, load = collections.defaultdict(collections.Counter), [], tools.hf.load_tokenizer
    tools.hf.load_tokenizer = lambda where: build_tokenizer(AB_MERGED)      # gpt2's is not here
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cfg = good_files(top)
        for number in range(first, first + total // len(kinds)):
            for kind in kinds:
                try:
                    table[kind][try_one(kind, number, top, cfg)] += 1
                except (Exception, SystemExit) as error:
                    if total == 1:
                        raise
                    table[kind]['faults'] += 1
                    faults.append(f'{kind} {number}: {type(error).__name__}: {str(error)[:150]!r}')
    finally:
        tools.hf.load_tokenizer = load
    return table, faults


def main(words):
    """Prints the table and the faults; returns how many there were."""
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        if words[0] in KINDS:
            table, faults = fuzz(1, Path(name), int(words[1]), words[:1])
        else:
            table, faults = fuzz(int(words[0]), Path(name))
    columns = ('read', 'refused', 'faults')
    print(f'{"kind":12}{"tried":>8}' + ''.join(f'{column:>8}' for column in columns))
    for kind, counts in table.items():
        print(f'{kind:12}{counts.total():8}' + ''.join(f'{counts[name]:8}' for name in columns))
    print(*faults, f'{(time.time() - began) / 60:.1f} minutes', sep='\n')
    return len(faults)


if __name__ == '__main__':
    sys.exit(bool(main(sys.argv[1:])))
