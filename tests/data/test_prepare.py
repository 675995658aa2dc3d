"""
data/prepare.py, the gate: files, the template, what is counted, the folder, the commands.
"""
import gzip, importlib, json, os, subprocess, sys
from pathlib import Path

import pytest

from data import look, prepare
from data.prepare import Config, fit, main
from data.rows import read_objects
from data.text import DataError, load_rows, load_text
from data.turns import CHAT, HH_TEMPLATE, Odd, choose_template
from prefgpt import UserError, parse_config

from conftest import BYTE_TOKENS, save_tiny_run, write_jsonl, write_toy_data

TOP = Path(__file__).parent.parent.parent
PAIRS = [{'prompt': f'q {i}', 'chosen': f'c {i}', 'rejected': f'r {i}'} for i in range(20)]
ALPACA = [{'instruction': f'ask {i}', 'input': '', 'output': f'say {i}'} for i in range(20)]


@pytest.fixture
def gate(tmp_path, monkeypatch, capsys):
    """gate(rows or text, flag=...) -> the folder and what was printed; the BPE has 260 tokens."""
    monkeypatch.chdir(tmp_path)

    def gate(*files, **flags):
        for number, rows in enumerate(files):
            text = rows if isinstance(rows, (str, bytes)) else ''.join(
                json.dumps(row) + '\n' for row in rows)
            Path(f'{number}.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
        capsys.readouterr()
        names = tuple(f'{number}.jsonl' for number in range(len(files)))
        main(Config(**{'files': names, 'out': 'out', 'tokenizer': '260', **flags}))
        return tmp_path / 'out', capsys.readouterr().out
    return gate


def rows_of(folder, kind):
    return [row for part in ('train', 'val') for row in load_rows(folder / f'{part}.{kind}.jsonl',
                                                                  kind)]


# ----------------------------------------------------------------------------- files

GOOD = '{"prompt": "a", "completion": " b"}'


def test_forms_of_files_that_are_read(tmp_path):
    """JSON Lines with a BOM, CRLF or CR alone, an array on one line or many, gzip of them; NaN is
    null. Catches U+2028 that ends a line, and a file's last row without a newline."""
    row, path = json.loads(GOOD), tmp_path / 'file'
    for text in (GOOD, f'\ufeff{GOOD}\r\n\r\n {GOOD}\r\n', f'{GOOD}\r{GOOD}\r', f'[{GOOD}, {GOOD}]',
                 json.dumps([row, row], indent=1), GOOD.replace('}', ', "x": NaN}')):
        for data in (text.encode(), gzip.compress(text.encode())):
            path.write_bytes(data)
            found = [each for _, each in read_objects(path)]
            assert found in ([row], [row, row], [{**row, 'x': None}]), text
    path.write_text('{"prompt": "a\u2028b", "completion": "c\u0085d"}', encoding='utf-8')
    assert [row['prompt'] for _, row in read_objects(path)] == ['a\u2028b']
    path.write_text(f'\n{GOOD}\n')
    assert [where for where, _ in read_objects(path)] == [f'{path}:2']
    path.write_text(f'[{GOOD}, 7]')
    assert str(dict(read_objects(path))[f'{path}, row 2']) == 'an object was expected, not int'


@pytest.mark.parametrize('data, words', [
    (b'PAR1\x15\x04', 'parquet: python -c'), ('a'.encode('utf-16'), 'UTF-16: iconv'),
    (b'version https://git-lfs.github.com/spec/v1', 'LFS pointer.*git lfs pull'),
    (b'<!DOCTYPE html>', 'HTML.*again'), (b'prompt,chosen\na,b\n', 'not JSON.*CSV: python -c'),
    (b'{"prompt": "caf\xe9"}', ':1: byte 0xe9 is not UTF-8.*LATIN1'),
    (gzip.compress(GOOD.encode())[:-9], 'cannot be read.*fetch it again'),
    (f'{{"data": [{GOOD}]}}'.encode(), "the rows are under 'data': python -c"),
    (f'[{GOOD},'.encode(), 'an array, but not a whole one'),
    ('[{"a": 1, "a": 2}]', "an array.*'a' appears twice"),
    (f'{GOOD},\n'.encode(), ':1: .*a comma.*sed .* 0.jsonl >'),
    (f'{GOOD}{GOOD}'.encode(), ':1: .*jq -c'),
    (b'{\n "prompt": "a"\n}', ':1: .*not a whole JSON object.*jq -c'),
    (b"{'prompt': 'a'}", ':1: .*Python, not JSON: python -c'),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
    (b'{"a": ' + b'[' * 99999, ':1: .*too many brackets'), (b'', 'no rows'),
    (GOOD.encode() + b'\n{"prompt": ', '--skip')])
def test_files_that_are_no_rows_are_named_in_one_line(gate, data, words):
    """What a file is instead, and what to do; never a traceback, never another tool's message."""
    with pytest.raises(DataError, match=rf'^0\.jsonl.*{words}') as error:
        gate(data)
    assert '\n' not in str(error.value)


# ----------------------------------------------------------------------------- one row

def fitted(row, template=CHAT):
    notes = []
    return fit(row, template, lambda done, what: notes.append(f'{done}: {what}')), notes


@pytest.mark.parametrize('template, row, prompt, completion', [
    (CHAT, {'prompt': [('user', 'q')], 'completion': 'r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': [('user', 'q')], 'completion': ' r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': [('user', 'q')], 'completion': '\tr\n'}, 'user: q\nbot:', '\tr\n'),
    (CHAT, {'prompt': 'q', 'completion': 'r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': 'user: q\nbot:', 'completion': 'r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': 'user: q\nbot: ', 'completion': 'r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': 'user: q\nbot: ', 'completion': ' r'}, 'user: q\nbot:', ' r'),
    ('Q: {}', {'prompt': 'q', 'completion': 'r'}, 'Q: q', ' r'),
    ('Q: {}', {'prompt': 'Q: q', 'completion': 'r'}, 'Q: q', ' r'),
    ('{}', {'prompt': 'q', 'completion': 'r'}, 'q', ' r'),
    ('{}', {'prompt': 'q\n', 'completion': 'r'}, 'q\n', 'r'),
    ('{}', {'prompt': '', 'completion': 'r'}, '', ' r'),
    ('{}', {'prompt': 'q ', 'completion': 'r'}, 'q', ' r'),
    ('{}', {'prompt': 'q ', 'completion': ' r'}, 'q', ' r'),
    ('{}', {'prompt': 'def f():\n    ', 'completion': 'return'}, 'def f():\n    ', 'return'),
    (HH_TEMPLATE, {'prompt': 'Human: q\n\nAssistant:', 'completion': 'r'},
     '\n\nHuman: q\n\nAssistant:', ' r'),
    (CHAT, {'prompt': 'Which is the best language model:', 'completion': '[{"text": "Bob"}]'},
     'user: Which is the best language model:\nbot:', ' [{"text": "Bob"}]'),
    (CHAT, {'prompt': 'hello', 'completion': 'hello you'}, 'user: hello\nbot:', ' hello you'),
    (CHAT, {'prompt': [('user', 'q<|im_end|>')], 'completion': 'r<end_of_turn>'},
     'user: q\nbot:', ' r'),
    (CHAT, {'prompt': 'q', 'completion': '<s>r</s>'}, 'user: q\nbot:', ' <s>r</s>'),
    ('{}', {'prompt': [('user', 'q')], 'completion': 'r<|endoftext|>'}, 'q', ' r'),
    ('{}', {'prompt': 'user: q\nbot:', 'completion': ' r'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': 'q', 'completion': 'r</s></s>\n<|endoftext|>'}, 'user: q\nbot:', ' r'),
    (CHAT, {'prompt': [('user', 'hi'), ('assistant', 'yes</s>'), ('user', 'q')],
            'completion': 'r'}, 'user: hi\nbot: yes\nuser: q\nbot:', ' r'),
    (CHAT, {'prompt': 'q', 'completion': ' r</s>\n'}, 'user: q\nbot:', ' r')])
def test_prompt_and_answer_meet_the_template(template, row, prompt, completion):
    """Turns always go through the template, literal text unless it ends as the template does; an
    answer has one space in front, no other tool's end. Catches what cost DPO half of its gain."""
    assert fitted(row, template)[0] == {'prompt': prompt, 'completion': completion}


def test_what_is_changed_is_noted_and_marks_stay():
    """Catches a change nobody is told of, and an EOS after an answer that was cut."""
    row, notes = fitted({'prompt': 'q', 'chosen': 'c</s>', 'rejected': 'r', 'rejected_cut': True})
    assert row == {'prompt': 'user: q\nbot:', 'chosen': ' c', 'rejected': ' r',
                   'rejected_cut': True}
    assert list(row) == ['prompt', 'chosen', 'rejected', 'rejected_cut']        # in every process
    assert len(notes) == 2 and '</s>' in notes[0] and 'literal prompt' in notes[1]
    assert 'space' in fitted({'prompt': 'user: q\nbot: '})[1][0]
    uneven = {'prompt': 'q', 'chosen': 'c\n', 'rejected': 'r'}
    assert 'tells the sides apart' in fitted(uneven)[1][-1]


@pytest.mark.parametrize('row, error, words', [
    ({'prompt': 'q', 'completion': ' '}, Odd, 'empty'),
    ({'prompt': ' ', 'completion': 'r'}, Odd, 'empty'),
    ({'prompt': 'q', 'chosen': 'c', 'rejected': ''}, Odd, 'empty'),
    ({'prompt': 'q', 'chosen': 'c', 'rejected': ' c '}, Odd, 'equal'),
    ({'prompt': 'q', 'chosen': 'a b', 'rejected': 'a\u00a0b'}, Odd, 'equal'),
    ({'prompt': 'how do i clean it?', 'chosen': 'how do i clean it? c',
      'rejected': 'how do i clean it? r'}, Odd, 'begin with their prompt'),
    ({'prompt': 'user: how do i clean it?\nbot:', 'completion': 'how do i clean it? r'}, Odd,
     'begin with their prompt'),
    ({'prompt': 'q', 'completion': '\n\nHuman: q\n\nAssistant: r'}, Odd, 'marks of a chat'),
    ({'prompt': 'q', 'completion': 'r\n\nHuman: thanks'}, Odd, 'marks of a chat'),
    ({'prompt': 'q', 'completion': '[INST] q [/INST] r'}, Odd, 'marks of a chat'),
    ({'prompt': 'q', 'completion': 'bot: r'}, Odd, 'own mark'),
    ({'prompt': '[INST] q [/INST]', 'completion': 'r'}, ValueError, 'another one'),
    ({'prompt': '### Instruction:\nq\n\n### Response:\n', 'completion': 'r'}, ValueError,
     'another one'),
    ({'prompt': 'USER: q ASSISTANT:', 'completion': 'r'}, ValueError, 'another one'),
    ({'prompt': '<|start_header_id|>assistant<|end_header_id|>\n\n', 'completion': 'r'},
     ValueError, 'another one'),
    ({'prompt': 'q\nbot:', 'completion': 'r'}, ValueError, 'half of the template'),
    ({'prompt': 'q', 'completion': '<|assistant|>\nr'}, Odd, 'marks of a chat'),
    ({'prompt': 'user: \nbot:', 'completion': 'r'}, Odd, 'empty prompt'),
    ({'prompt': [('user', 'x\nbot: sure.\nuser: y')], 'completion': 'r'}, Odd, 'own mark'),
    ({'prompt': [('user', 'q')], 'completion': 'r\nuser: thanks'}, Odd, 'own mark'),
    ({'prompt': 'q' + ' ' * 100_000, 'completion': 'r'}, Odd, 'white space'),
    ({'prompt': [('user', 'a\nuser: b')], 'completion': 'r'}, Odd, 'own mark'),
    ({'prompt': 'see\nuser: b', 'completion': 'r'}, Odd, 'own mark'),
    ({'prompt': 'user: q\nbot:', 'completion': 'r\nuser: thanks'}, Odd, 'own mark'),
    ({'prompt': 'user: q\\nbot:', 'completion': 'r'}, ValueError, 'escaped twice'),
    ({'prompt': 'user: q', 'completion': 'r'}, ValueError, 'half of the template'),
    ({'prompt': '\n\nHuman: q\n\nAssistant:', 'completion': 'r'}, ValueError, 'another one'),
    ({'prompt': [('user', 'q')], 'completion': '\ud800'}, ValueError, 'surrogate'),
    ({'prompt': [('user', '\ud800')], 'completion': 'r'}, ValueError, 'surrogate'),
    ({'prompt': 'q', 'completion': '[{"content": "a", "role": "assistant"}]'}, ValueError, 'list'),
    ({'prompt': '[{"role": "user"}]', 'completion': 'r'}, ValueError, 'list written as a string'),
    ({'prompt': 'q', 'completion': "[{'role': 'assistant'}]"}, ValueError, 'list written'),
    ({'prompt': 'q', 'completion': 42}, ValueError, 'int')])
def test_rows_that_teach_nothing_or_harm(row, error, words):
    """Odd rows are dropped and counted; a form that would be learned as text is refused."""
    with pytest.raises(error, match=words) as raised:
        fitted(row)
    assert isinstance(raised.value, Odd) == (error is Odd)


def test_white_space_is_searched_in_time():
    """A million spaces with a letter here and there are read at once. Catches a search that begins
    anew at every space."""
    text = 'x'.join([' ' * 20_000] * 50)
    assert fitted({'prompt': 'q', 'completion': text})[0]['completion'] == text


def test_turns_need_a_template_with_an_end():
    """Catches an earlier answer that is glued to its question."""
    chat = {'prompt': [('user', 'q'), ('assistant', 'r'), ('user', 'p')], 'completion': 's'}
    for template in ('{}', 'Q: {}'):
        with pytest.raises(ValueError, match='turns need a template'):
            fitted(chat, template)


@pytest.mark.parametrize('prompts, flag, saved, template', [
    ([[('user', 'q')]], '', None, CHAT), (['q', [('user', 'q')]], '', None, CHAT),
    (['q', 'p'], '', None, '{}'), (['user: q\nbot:'], '', None, CHAT),
    (['user: q\nbot: ', 'user: p\nbot:'], '', None, CHAT),
    (['\n\nHuman: q\n\nAssistant:'], '', None, HH_TEMPLATE),
    (['q'], 'Q: {}\\nA:', None, 'Q: {}\nA:'), (['q'], '', ('sft', CHAT), CHAT),
    ([[('user', 'q')]], '', ('base', '{}'), CHAT)])
def test_the_template_is_told_from_the_rows(prompts, flag, saved, template):
    """The flag's, else the run's unless it is a base model, else what the rows seem to need."""
    saved = saved and dict(zip(('stage', 'template'), saved))
    rows = [{'prompt': prompt} for prompt in prompts]
    assert choose_template(flag, rows, saved) == template
    with pytest.raises(UserError, match='--template.*once'):
        choose_template('no place', rows, saved)
    mixed = rows + [{'prompt': 'p'}, {'prompt': 'user: q\nbot:'}]
    if not (flag or saved):                     # one odd row does not decide for the others
        with pytest.raises(UserError, match="literal prompts are in the template .*--template='"):
            choose_template('', mixed, None)
    assert choose_template('{}\n', mixed, None) == '{}\n'      # its last line break counts
    with pytest.raises(UserError, match="the run's is 'user"):
        choose_template('Q: {}', rows, {'stage': 'sft', 'template': CHAT})


# ----------------------------------------------------------------------------- the folder

def test_files_become_a_folder(gate):
    """Demonstrations of one file and pairs of another, by question on one side of the split in all
    files, in one template. Catches pairs whose prompts are not those of the demonstrations."""
    shared = [{**row, 'prompt': f'ask {i}'} for i, row in enumerate(PAIRS)]
    folder, said = gate(ALPACA, shared)
    tokenizer, text = load_text(folder)
    assert text['template'] == CHAT and 256 < tokenizer.n_vocab <= 260
    held_out = {kind: {row['prompt'] for row in load_rows(folder / f'val.{kind}.jsonl', kind)}
                for kind in ('sft', 'pairs', 'prompts')}
    assert held_out['sft'] == held_out['pairs'] == held_out['prompts'] and len(held_out['sft']) == 1
    assert {row['prompt'] for row in rows_of(folder, 'sft')} == {
        f'user: ask {i}\nbot:' for i in range(20)}
    assert {'prompt': 'user: ask 3\nbot:', 'chosen': ' c 3', 'rejected': ' r 3'} in rows_of(
        folder, 'pairs')
    assert '40 rows, 40 kept' in said and '20 literal prompts put into the template' in said
    with pytest.raises(UserError, match='out holds rows'):
        gate(PAIRS)


def test_kinds(gate):
    """Pairs alone give demonstrations, too; --kind writes one kind; pairs cannot be made of SFT."""
    folder, _ = gate(PAIRS)
    assert {row['completion'] for row in rows_of(folder, 'sft')} == {f' c {i}' for i in range(20)}
    folder, _ = gate(PAIRS, out='pairs', kind='pairs')
    assert {path.name for path in Path('pairs').glob('*.jsonl')} == {
        'train.pairs.jsonl', 'val.pairs.jsonl'}
    counts = [main(Config(files=('0.jsonl',), out=f'one{kind}', tokenizer='260', kind=kind))
              for kind in ('', 'sft', 'prompts') if gate(ALPACA, out=f'first{kind}')]
    assert [sorted(each) for each in counts] == [
        ['train.prompts', 'train.sft', 'val.prompts', 'val.sft'], ['train.sft', 'val.sft'],
        ['train.prompts', 'val.prompts']]
    with pytest.raises(DataError, match='--kind=pairs'):
        gate(ALPACA, out='none', kind='pairs')
    for flags, words in (({'kind': 'rm'}, '--kind=rm: sft, pairs or prompts'),
                         ({'drop': 'dual-unsave'}, '--drop=dual-unsave: dual-safe')):
        with pytest.raises(UserError, match=words):
            gate(ALPACA, out='none', **flags)
    with pytest.raises(DataError, match='sft: too few rows to hold some out'):
        gate(PAIRS, ALPACA[:1], out='none')     # one demonstration is not 20 chosen sides
    assert not Path('none').exists()
    assert '3 prompts without an answer' in gate(ALPACA, [
        {'messages': [{'role': 'user', 'content': f'w {i}'}]} for i in range(3)], out='asked')[1]


def test_everything_is_counted(gate):
    """What was kept, dropped and why with the first three places, nulls, keys that were not read,
    repeats, contradictions, rows beyond --limit. Catches a row or key that goes without a word."""
    rows = [*[{**row, 'id': 1, 'label': None} for row in PAIRS],
            *[{**PAIRS[0], 'chosen': ''}] * 4, {**PAIRS[0], 'rejected': None}, PAIRS[1],
            {'prompt': 'q 2', 'chosen': 'r 2', 'rejected': 'c 2'}, PAIRS[3], PAIRS[4]]
    _, said = gate(rows, limit=27)
    for words in ('27 rows, 22 kept',
                  '4 rows dropped: an empty chosen text (0.jsonl:21, 0.jsonl:22, 0.jsonl:23)',
                  '1 row dropped: null for rejected (0.jsonl:25)',
                  "20 rows whose key 'id' was not read",
                  "20 rows with null for 'label'", '1 row repeating another, kept',
                  '2 pairs contradicted by another, kept',
                  '2 rows beyond --limit=27, not read'):
        assert words in said, (words, said)


def test_all_bad_rows_are_gathered_and_skip_drops_them(gate, capsys):
    """Two reasons in one call, not one row per call; nothing is written. --skip goes on."""
    rows = [*PAIRS, {'prompt': 'P', 'answer': 'r'}, {'prompt': 'P', 'answer': 's'},
            {**PAIRS[0], 'label': 0}]
    with pytest.raises(DataError, match=r"0\.jsonl:21: 2 of 23 rows .* be read: prompt, answer"):
        gate(rows)
    said = capsys.readouterr().out
    assert '2 rows cannot be read: ' in said and "1 row cannot be read: 'label' beside" in said
    assert not Path('out').exists()
    assert '23 rows, 20 kept' in gate(rows, skip=True)[1]
    with pytest.raises(DataError, match=r'0\.jsonl:1: 20 of 20 rows dropped: an empty'):
        gate([{**row, 'chosen': ''} for row in PAIRS], out='none')
    with pytest.raises(UserError, match='only one prompt'):
        gate(PAIRS[:1], out='none')


def test_tokenizers(gate, tmp_path, byte_tokenizer, monkeypatch):
    """A size trains one on the training rows alone; a file is taken; a run gives its own and its
    template. Catches held-out text in the vocabulary, and a run whose template is not the rows'."""
    seen, write = [], prepare.write_tokenizer
    monkeypatch.setattr(prepare, 'write_tokenizer', lambda out, name, texts, size: write(
        out, name, seen.extend(texts) or seen, size))
    folder, _ = gate(PAIRS)
    for row in load_rows(folder / 'val.pairs.jsonl', 'pairs'):
        assert row['chosen'] not in seen and row['prompt'] not in seen
    Path('my.tiktoken').write_text(BYTE_TOKENS)
    folder, _ = gate(PAIRS, out='taken', tokenizer='my.tiktoken')
    assert load_text(Path('taken'))[0].n_vocab == 257
    data = write_toy_data(tmp_path / 'letters')
    save_tiny_run(tmp_path / 'run', data)
    gate(PAIRS, out='of_run', tokenizer='run')
    tokenizer, text = load_text(Path('of_run'))
    assert (tokenizer.n_vocab, text['template']) == (257, 'user: {}')
    assert all(row['prompt'].startswith('user: q') for row in rows_of(Path('of_run'), 'pairs'))
    for wrong, words in (('nowhere', 'nowhere: no checkpoint there'), ('100', 'at least 257'),
                         ('no.tiktoken', 'no.tiktoken: no such file')):
        with pytest.raises(UserError, match=words):
            gate(PAIRS, out='none', tokenizer=wrong)
    assert not Path('none').exists()


def test_look_shows_rows_by_mask(gate, monkeypatch, capsys):
    """Prompt, response and EOS are marked, in colour on a terminal; a cut answer has no EOS.
    Control characters are not printed; rows in both splits are counted."""
    row = {'prompt': 'user: q\x1b\nbot:', 'chosen': ' c', 'chosen_cut': True}
    assert look.paint(row, 'chosen') == (
        'prompt [user: q\ufffd\nbot:] response [ c] no EOS, because it is cut')
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
        assert look.paint({'prompt': 'q', 'completion': ' r'}, 'completion') == (
            '\033[90mq\033[0m\033[32m r\033[0m\033[7mEOS\033[0m')
    gate(PAIRS, out='folder')
    Path('folder/val.sft.jsonl').write_bytes(Path('folder/train.sft.jsonl').read_bytes())
    capsys.readouterr()
    counts = main(Config(files=('folder',), look=True))
    assert counts['train.pairs'] == counts['train.sft'] == 17
    shown = capsys.readouterr().out
    assert '17 rows of val.sft are also in train.sft' in shown
    assert 'train.pairs   chosen      tokens: 50% up to' in shown and 'prompt [q ' in shown


def test_the_commands_that_are_printed_work(gate):
    """Each command runs as it is printed, but for its numbers of steps. Catches a flag that does
    not exist, and sizes for which no row is left."""
    _, said = gate(ALPACA, [{**row, 'prompt': f'ask {i}'} for i, row in enumerate(PAIRS)])
    commands = [line for line in said.splitlines() if line.startswith('python ')]
    assert [line.split()[1] for line in commands] == [
        'train_sft.py', 'train_rm.py', 'train_ppo.py', 'train_dpo.py', '-m', '-m', '-m']
    assert commands[-1].endswith('--chat')
    for line in commands:
        _, *words = line.replace('-m ', '').split()
        few = ['--steps=1', '--eval_every=1'] if 'train_' in line else []
        few += ['--rollout_size=4', '--batch_size=4'] if 'ppo.py' in line else []
        module = importlib.import_module(words[0].removesuffix('.py'))
        if '--chat' not in line:
            module.main(parse_config(module.Config, [*words[1:], *few, '--device=cpu']))
    done = subprocess.run([sys.executable, *commands[-1].split()[1:], '--device=cpu'], input='hi\n',
                          env={**os.environ, 'PYTHONPATH': str(TOP)}, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count('> ') == 2, done.stderr
    assert {path.parent.name for path in Path('out').rglob('ckpt.pt')} == {
        'sft', 'rm', 'ppo', 'dpo'}


def test_a_mistake_is_one_line(tmp_path):
    """No file, no --out and a wrong flag give one line, as every script's mistakes do."""
    path = write_jsonl(tmp_path / 'rows.jsonl', PAIRS)
    for words, said in ((['--out=x'], 'name the files'), ([str(path)], 'name the files'),
                        ([str(path), '--out=x', '--safe_rlhf=safest'], 'safest'),
                        ([str(path), '--out=x', '--val=1'], '--val=1.0: above'),
                        ([str(path), 'other', '--look'], 'one folder'),
                        (['nowhere.jsonl', '--out=x'], 'nowhere.jsonl: cannot be read')):
        with pytest.raises(UserError, match=said):
            main(parse_config(Config, words))
    done = subprocess.run([sys.executable, '-m', 'data.prepare', 'nowhere', '--out=x'], cwd=TOP,
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith('error: nowhere: cannot be read')
    assert done.stderr.count('\n') == 1
