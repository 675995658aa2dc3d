"""tools/sample.py on tiny runs: what is shown, and the chat."""
import io, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from conftest import EOS, write_jsonl

from prefgpt import GPT, UserError, generate, load_checkpoint, load_model, rng
from tools import sample
from tools.sample import Config

TOP = Path(__file__).parent.parent.parent
HELD_OUT = ['now say a:', 'do b:', 'say d:', 'now say e:', 'do f:', 'say h:']     # conftest's


@pytest.fixture
def run(sft_run):
    """A run folder as on the command line: it has learned to say a letter and to end."""
    return str(sft_run)


def main(*runs, **changes):
    """What main returns, with few short responses."""
    return sample.main(Config(runs=runs, **{**dict(max_new_tokens=8, device='cpu'), **changes}))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that generate was given, as bytes, call by call."""
    calls = []

    def generate_and_keep(policy, prompts, *arguments):
        calls.append([bytes(prompt) for prompt in prompts])
        return generate(policy, prompts, *arguments)
    monkeypatch.setattr(sample, 'generate', generate_and_keep)
    return calls


def test_the_first_held_out_prompts_are_answered_greedily(run, random_run, capsys):
    """Three held-out prompts, a block each, a line per run in their order, as run.sh calls it."""
    other = str(random_run)
    answers = main(run, other)
    shown = capsys.readouterr().out.split('\n\n')[1:]
    assert list(answers) == [run, other]
    assert [block.splitlines()[0] for block in shown] == HELD_OUT[:3]
    for i, block in enumerate(shown):
        lines = block.splitlines()
        assert lines[1].split() == [run, *answers[run][i].split()]
        assert lines[2].split()[0] == other
    assert answers == main(run, other)


def test_n_samples_of_every_prompt_stand_next_to_each_other(run, asked, capsys):
    """--n samples of --prompts prompts; the same weights meet the same random numbers, by
    --seed."""
    answers = main(run, prompts=2, n=3, temperature=1.0)[run]
    assert asked == [[prompt.encode() for prompt in HELD_OUT[:2] for _ in range(3)]]
    assert len(set(answers[:3])) > 1
    shown = [line for line in capsys.readouterr().out.splitlines() if line in HELD_OUT]
    assert shown == [HELD_OUT[0]] * 3 + [HELD_OUT[1]] * 3
    assert main(run, prompts=2, n=3, temperature=1.0)[run] == answers
    assert main(run, prompts=2, n=3, temperature=1.0, seed=1)[run] != answers


def test_which_prompts_are_answered(run, asked, tiny_data, tmp_path, capsys):
    """--data names a folder or a file, --split its half, each prompt counts once. --prompt is put
    into the template, loses its left end where it is too long, and does not steer the terminal."""
    write_jsonl(tiny_data / 'val.prompts.jsonl', [{'prompt': p} for p in 'aabbcdef'])
    one = write_jsonl(tmp_path / 'one.jsonl', [{'prompt': p, 'chosen': 'x', 'rejected': 'y'}
                                               for p in ('p0', 'p1', 'p2')])
    main(run, data=str(tiny_data))
    main(run, data=str(tiny_data), prompts=5)
    main(run, data=str(tiny_data), split='train', prompts=2)
    assert asked == [[b'a', b'b', b'c'], [b'a', b'b', b'c', b'd', b'e'], [b'say a:', b'do a:']]
    asked.clear()
    main(run, data=str(one))
    main(run, data=str(one), split='train')
    assert [len(call) for call in asked] == [1, 2]
    assert sorted(asked[0] + asked[1]) == [b'p0', b'p1', b'p2']
    asked.clear()
    capsys.readouterr()
    assert len(main(run, prompt='\x1b[2J {a}', n=3, temperature=1.0)[run]) == 3
    main(run, prompt='a' * 500)
    assert asked == [[b'user: \x1b[2J {a}'] * 3, [(b'a' * 500)[-24:]]]
    shown = capsys.readouterr().out
    assert '1 prompts cut on the left' in shown and '\x1b' not in shown


@pytest.mark.parametrize('changes, words', [
    (dict(runs=''), '0 run folders'), (dict(runs='RR', chat=True), '2 run folders'),
    (dict(chat=True, prompt='hi', n=2, temperature=1.0), '--prompt and --n'),
    (dict(chat=True, data='d', split='train', prompts=1), '--data and --split and --prompts'),
    (dict(history=True), '--history needs --chat'),
    (dict(n=4), '--n=4.*--temperature=1'), (dict(split='test'), '--split=test.*val'),
    (dict(temperature=-1.0), '--temperature=-1'), (dict(n=0), '--n=0'),
    (dict(max_new_tokens=32), 'lower --max_new_tokens'), (dict(data='nowhere'), 'nowhere'),
    (dict(max_new_tokens=32, chat=True), 'lower --max_new_tokens')])
def test_what_cannot_work_is_named(run, changes, words):
    """Flags that contradict each other or make no sense are named before anything is sampled."""
    with pytest.raises(UserError, match=words):
        sample.main(Config(**{**changes, 'runs': tuple(run for _ in changes.get('runs', 'R'))}))


@pytest.fixture
def talk(run, monkeypatch):
    """talk(lines, ...) -> a chat's answers to the lines, then Ctrl-D; an exception is raised."""
    def talk(lines, **changes):
        lines = iter(lines)

        def type_line(prompt):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line
        monkeypatch.setattr('builtins.input', type_line)
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO()))
        return main(run, chat=True, **changes)
    return talk


def test_every_line_is_a_new_conversation(talk, asked, capsys):
    """Each line is in the template by itself, any text is bytes, EOS in words too, the same line
    gets the same greedy answer, and a line longer than the block is answered from its end, which
    one line says."""
    answers = talk(['say a:', '\x1b你好', 'say a:', 'x' * 5000 + 'say a:', '<|endoftext|>\u202e'])
    assert asked == [[b'user: say a:'], ['user: \x1b你好'.encode()],
                     [b'user: say a:'], [(b'x' * 5000 + b'say a:')[-24:]],
                     ['user: <|endoftext|>\u202e'.encode()]]
    assert answers[0] == answers[2]
    shown = capsys.readouterr().out
    assert 'Ctrl-D' in shown and answers[0] in shown
    assert '[the first 4988 of 5012 tokens are cut]\n' in shown


def test_history_keeps_the_turns_and_loses_their_left_end(talk, asked):
    """The prompt is the whole dialogue, as render has it, or its last 28 tokens."""
    first, second, _ = talk(['a' * 9, 'b', 'c'], history=True, temperature=1.0, max_new_tokens=4)
    whole = f'user: aaaaaaaaa {first}\nuser: b {second}\nuser: c'.encode()
    assert len(whole) > 28
    assert [prompt for prompt, in asked] == [
        b'user: aaaaaaaaa', f'user: aaaaaaaaa {first}\nuser: b'.encode()[-28:], whole[-28:]]


def test_turns_draw_different_random_numbers(talk, run):
    """At T=1 a line is answered with the numbers of rng(seed, turn, 'eval'): one generator for all
    turns would answer the same for ever. An empty line is asked again, and is no turn."""
    answers = talk(['', 'say a:', ' \t', *['say a:'] * 4], temperature=1.0, seed=3)
    policy = load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')
    for turn, answer in enumerate(answers):
        tokens, mask = generate(policy, [list(b'user: say a:')], 8, EOS, 1.0,
                                rng(3, turn, 'eval'))
        ids = [i for i in tokens[:, 1:][mask].tolist() if i != EOS]
        assert answer == bytes(ids).decode(errors='replace').removeprefix(' ')
    assert len(answers) == 5 and len(set(answers)) > 1


def test_how_answers_are_shown(talk, monkeypatch, capsys):
    """An answer that max_new_tokens cut says so, and control characters are not printed."""
    answers = iter([b' yes', b' no\x1b[2J'])

    def generate_text(policy, prompts, *arguments):
        text = next(answers)
        tokens = torch.tensor([[*prompts[0], *text, *[EOS] * (text != b' yes')]])
        return tokens, torch.arange(1, tokens.size(1))[None] >= len(prompts[0])
    monkeypatch.setattr(sample, 'generate', generate_text)
    assert talk(['a', 'b']) == ['yes', 'no\x1b[2J']
    assert '\nyes [no end]\nno\ufffd[2J\n' in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk, monkeypatch, capsys):
    """That answer is missing, from the history too; at the prompt it ends the chat as Ctrl-D
    does."""
    calls = []

    def interrupt_second(policy, prompts, *arguments):
        calls.append(bytes(prompts[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(policy, prompts, *arguments)
    monkeypatch.setattr(sample, 'generate', interrupt_second)
    answers = talk(['a', 'b', 'c', KeyboardInterrupt(), 'never asked'], history=True,
                   max_new_tokens=2)
    assert len(answers) == 2 and len(calls) == 3
    assert calls[2] == f'user: a {answers[0]}\nuser: c'.encode()[-30:]
    assert '[stopped]\n' in capsys.readouterr().out
    assert talk([]) == [] and talk([KeyboardInterrupt()]) == []


def test_a_chat_through_a_pipe(run):
    """Lines from a pipe, some no UTF-8: answered, no traceback, no control character."""
    typed = b'say a:\n\n\xff\xfe\x80 say b:\n\x1b[2J\x00\n' + '你好\n'.encode() + b'say c:'
    done = subprocess.run([sys.executable, '-m', 'tools.sample', run, '--chat', '--device=cpu',
                           '--max_new_tokens=8'], input=typed, cwd=TOP, capture_output=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'})
    assert (done.returncode, done.stderr) == (0, b'')
    shown = done.stdout.decode()
    assert shown.count('> ') == 7 and shown.endswith('> \n')   # five answers, '' and the end
    assert shown.replace('\n', '').isprintable()
