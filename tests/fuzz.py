"""
Feeds mutated files to all that reads files: rows, tokenizers, safetensors, checkpoints, logs, and
what judges return. Each must be read or refused by a UserError, which is one line; a checkpoint or
a run that is read must be the one that was saved. Anything else is a fault.

    python tests/fuzz.py 20000              # so many mutants in all: minutes
    python tests/fuzz.py rows 17            # one of them again, with its traceback

Prints a table; the exit status is 1 if there was a fault. The same number makes the same mutant.
"""
import contextlib, io, json, shutil, sys, tempfile
from collections import Counter
from pathlib import Path
from random import Random

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / 'tests')]

import torch
from conftest import AB_MERGED, STAGES, contents, write_toy_data

import data.prepare
import train_sft
from data.judge import load_judge
from data.text import RESPONSES, build_tokenizer, load_split, load_text
from prefgpt import UserError, load_checkpoint
from tools.hf import read_safetensors, write_safetensors

NASTY = [b'', b'\0', b'\n', b'"', b'\\', b'{', b']', b', ', b'null', b'NaN', b'1e400', b'-1', b'[[',
         b'9' * 400, b'\xff', b'\xef\xbb\xbf', b'\\ud800', b'\\u001b[2J', '\u202e\u2028'.encode(),
         b'<|endoftext|>', b'</s>', b'\\nuser: x\\nbot:', b'\\n\\nHuman: x', b' ' * 100_001 + b'a',
         b'"prompt": ', b'"label": true, ', b'"messages": [', b'"role": "tool"', b'YWI= 1\n']
ROWS = ['{"prompt": "Why?", "completion": "Light."}',
        '{"prompt": "Why?", "chosen": "Light.", "rejected": "No.", "score_chosen": 2, '
        '"score_rejected": 1}',
        '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": '
        '"Light."}]}',
        '{"instruction": "Why?", "input": "", "output_1": "Light.", "output_2": "No.", '
        '"preference": 1}']
JUDGE = 'import numpy, torch\ndef score(prompt, response): return %s\n'
RESULTS = ('1.0 True -2 10**400 10**5000 1e39 float("nan") None "1" "\\ud800" b"" [] [1.0] {} () '
           '1/0 1j score int exit() range(3) [][1] numpy.float32(1) numpy.float64("inf") '
           'numpy.ones(2) torch.tensor(2.0) torch.ones(2) torch.zeros(0) score(prompt,response) '
           '{"reward":1.0} {"reward":numpy.ones(1)} {"reward":1,2:3} {"x":1.0}').split()


def damage(rng, data):
    """Returns bytes with one to three parts flipped, taken out, copied or put in; or cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, other, size = (rng.randrange(n) for n in (len(data) + 1, len(data) + 1, 9))
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:at + size])
        put_in = rng.choice([flipped, b'', data[other:other + size], *[rng.choice(NASTY)] * 3])
        data[at:at + size * rng.randrange(2)] = put_in
    return bytes(data[:at] if rng.random() < 0.1 else data)


def good_files(top):
    """Writes what the mutants are made from: data, a run halfway and at its end, tensors."""
    write_toy_data(top / 'data')
    (top / 'data' / 'bytes.tiktoken').write_text(AB_MERGED)
    cfg = train_sft.Config(data=f'{top}/data', out=f'{top}/run', n_layer=1, n_head=2, n_embd=8,
                           block_size=16, steps=2, eval_every=1, max_new_tokens=2, device='cpu')
    train_sft.main(cfg)
    shutil.copytree(top / 'run', top / 'half')
    (top / 'half' / 'ckpt.prev.pt').rename(top / 'half' / 'ckpt.pt')
    write_safetensors(top / 'x.safetensors', {'x': torch.ones(2, 3), 'y': torch.ones(())})
    return cfg


def rows(rng, top, cfg):
    """Feeds rows to the gate; what it writes must be what load_split reads."""
    path, out, array = top / 'mutant', top / 'out', rng.random() < 0.2
    lines = [row.replace('Why', f'Why {i}') for row in ROWS for i in range(6)]
    path.write_bytes(damage(rng, (f"[{', '.join(lines)}]" if array else '\n'.join(lines)).encode()))
    data.prepare.main(data.prepare.Config((str(path),), str(out), f'{top}/data/bytes.tiktoken',
                                          val=0.5, skip=rng.random() < 0.8))
    for kind in [kind for kind in RESPONSES if (out / f'train.{kind}.jsonl').exists()]:
        load_split(out, kind, load_text(out)[1]['template'])


def tokenizers(rng, top, cfg):
    """Feeds a tokenizer and a template to load_text; texts must come back from their ids."""
    folder = shutil.copytree(top / 'data', top / 'mutant')
    path = folder / rng.choice(['tokenizer', 'bytes.tiktoken', 'template.txt'])
    path.write_bytes(damage(rng, path.read_bytes()))
    tokenizer, text = load_text(folder)
    for each in (tokenizer, build_tokenizer(text['tokenizer'])):
        ids = each.encode_ordinary('ab é\0\n <|endoftext|>')
        assert each.decode(ids) == 'ab é\0\n <|endoftext|>', 'another text'


def safetensors(rng, top, cfg):
    """Feeds a .safetensors file to its reader, which accounts for every byte."""
    (top / 'mutant').write_bytes(damage(rng, (top / 'x.safetensors').read_bytes()))
    read_safetensors(top / 'mutant')


def checkpoints(rng, top, cfg):
    """Feeds a checkpoint to load_checkpoint; what is read must be what was saved."""
    (top / 'mutant').write_bytes(damage(rng, (top / 'run' / 'ckpt.pt').read_bytes()))
    read = load_checkpoint(top / 'mutant', STAGES)
    assert contents(read) == contents(load_checkpoint(top / 'run', STAGES)), 'other contents'


def logs(rng, top, cfg):
    """Resumes a run beside a log; it must end as ever, and its new rows must be whole."""
    out = shutil.copytree(top / 'half', top / 'mutant')
    (out / 'log.jsonl').write_bytes(damage(rng, (out / 'log.jsonl').read_bytes()))
    train_sft.main(train_sft.Config(**{**vars(cfg), 'out': str(out), 'resume': True}))
    ends = [load_checkpoint(each, ['sft'])['weights'] for each in (out, top / 'run')]
    assert contents(ends[0]) == contents(ends[1]), 'other weights'
    last = (out / 'log.jsonl').read_bytes().split(b'\n')[-3:]
    assert [json.loads(line)['step'] for line in last[:2]] == [2, 2] and last[2] == b''


def judges(rng, top, cfg):
    """Calls a reward.py that returns anything; finite Python floats by name must come out."""
    forms = ['%s'] * 3 + ['{"reward":%s,"x":%s}', '[%s,%s]', '%s+%s', '{"reward":1.0,%s:%s}']
    form = rng.choice(forms)
    (top / 'reward.py').write_text(JUDGE % (form % tuple(rng.choices(RESULTS, k=form.count('%s')))))
    found = load_judge(top / 'reward.py')('p', 'r')
    assert 'reward' in found and {*map(type, found)} == {str}
    assert all(type(value) is float and abs(value) < 1e38 for value in found.values())


KINDS = {kind.__name__: kind for kind in (rows, tokenizers, safetensors, checkpoints, logs, judges)}


def try_one(kind, number, top, cfg):
    """Tries one mutant in the folder top; returns 'read' or 'refused', or raises the fault."""
    kept, paths = {*top.iterdir()}, list(sys.path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            KINDS[kind](Random(f'{kind} {number}'), top, cfg)
        return 'read'
    except UserError:
        return 'refused'
    finally:
        sys.path[:] = paths                     # load_judge adds the folder of a reward.py
        for path in {*top.iterdir()} - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fuzz(total, top):
    """Tries so many mutants of all kinds; returns kind -> counts, and a line for every fault."""
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = good_files(top)
    table, faults = {kind: Counter() for kind in KINDS}, []
    for number in range(total // len(KINDS)):
        for kind in KINDS:
            try:
                table[kind][try_one(kind, number, top, cfg)] += 1
            except (Exception, SystemExit) as error:
                table[kind]['faults'] += 1
                faults.append(f'{kind} {number}: {type(error).__name__}: {str(error)[:150]!r}')
    return table, faults


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as name:
        if sys.argv[1] in KINDS:
            sys.exit(try_one(sys.argv[1], int(sys.argv[2]), Path(name), good_files(Path(name))))
        table, faults = fuzz(int(sys.argv[1]), Path(name))
    for kind, counts in table.items():
        print(f'{kind:12}{counts.total():7} tried, {counts["read"]:6} read, {counts["refused"]:6} '
              f'refused, {counts["faults"]:4} faults')
    print(*faults, sep='\n')
    sys.exit(bool(faults))
