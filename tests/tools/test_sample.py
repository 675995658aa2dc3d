"""tools/sample.py on tiny runs: what is shown, and the chat.

    python -m pytest -q tests/tools/test_sample.py
"""
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EOS, write_jsonl

from prefgpt import GPT, UserError, generate, load_checkpoint, load_model, parse_config, rng
from tools import sample
from tools.sample import Config

TOP = Path(__file__).parent.parent.parent
HELD_OUT = ['now say a:', 'do b:', 'say d:', 'now say e:', 'do f:', 'say h:']     # conftest's


@pytest.fixture
def run(sft_run):
    """A run folder as on the command line: it has learned to say a letter and to end."""
    return str(sft_run)


def main(run, *runs, **changes):
    """What main returns, with few short responses."""
    return sample.main(Config(runs=(run, *runs), **{**dict(max_new_tokens=8, device='cpu'),
                                                    **changes}))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that generate was given, as bytes, call by call."""
    calls = []

    def generate_and_keep(policy, prompts, *arguments):
        calls.append([bytes(prompt) for prompt in prompts])
        return generate(policy, prompts, *arguments)
    monkeypatch.setattr(sample, 'generate', generate_and_keep)
    return calls


# ----------------------------------------------------------------------------- side by side

def test_the_first_held_out_prompts_are_answered_greedily(run, random_run, capsys):
    """Without flags: three held-out prompts, one block each, a line for each run, as run.sh calls
    it. A run that answered another one's prompt would show in the order of the lines."""
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
    """--prompts says how many prompts and --n how many samples of each; two runs with the same
    weights meet the same random numbers, and another --seed others."""
    answers = main(run, prompts=2, n=3, temperature=1.0)[run]
    assert asked == [[prompt.encode() for prompt in HELD_OUT[:2] for _ in range(3)]]
    assert len(set(answers[:3])) > 1
    shown = [line for line in capsys.readouterr().out.splitlines() if line in HELD_OUT]
    assert shown == [HELD_OUT[0]] * 3 + [HELD_OUT[1]] * 3
    assert main(run, prompts=2, n=3, temperature=1.0)[run] == answers
    assert main(run, prompts=2, n=3, temperature=1.0, seed=1)[run] != answers


def test_a_typed_prompt_stands_in_the_template(run, asked):
    """--prompt is put into the template, greedily once, at T=1 n times."""
    assert len(main(run, prompt='say {a}')[run]) == 1
    assert len(main(run, prompt='say {a}', n=3, temperature=1.0)[run]) == 3
    assert asked == [[b'user: say {a}\nbot:'], [b'user: say {a}\nbot:'] * 3]


def test_data_and_split_say_which_prompts(run, asked, tiny_data, tmp_path):
    """--data names a folder or a file, --split its half, each prompt counts once, the first ones
    first: repeated prompts would fill --prompts with copies."""
    write_jsonl(tiny_data / 'val.prompts.jsonl', [{'prompt': p} for p in 'aabbcdef'])
    main(run, data=str(tiny_data))
    main(run, data=str(tiny_data), prompts=5)
    main(run, data=str(tiny_data), split='train', prompts=2)
    write_jsonl(tmp_path / 'one.jsonl', [{'prompt': p, 'chosen': 'x', 'rejected': 'y'}
                                         for p in ('p0', 'p1', 'p2')])
    main(run, data=str(tmp_path / 'one.jsonl'))
    main(run, data=str(tmp_path / 'one.jsonl'), split='train')
    assert asked[:3] == [[b'a', b'b', b'c'], [b'a', b'b', b'c', b'd', b'e'], [b'say a:', b'do a:']]
    assert [len(call) for call in asked[3:]] == [1, 2]
    assert sorted(asked[3] + asked[4]) == [b'p0', b'p1', b'p2']


def test_a_prompt_longer_than_the_block_is_cut(run, capsys):
    """A prompt that is too long loses its left end, and says so."""
    main(run, prompt='a' * 500)
    assert '1 prompts cut on the left' in capsys.readouterr().out


def test_no_control_characters_are_shown(run, capsys):
    """What a user or a model writes must not steer the terminal."""
    main(run, prompt='\x1b[2J')
    assert '\x1b' not in capsys.readouterr().out


@pytest.mark.parametrize('changes, words', [
    (dict(runs=()), '0 run folders'), (dict(runs=('RUN', 'RUN'), chat=True), '2 run folders'),
    (dict(chat=True, prompt='hi', n=2, temperature=1.0), '--prompt and --n'),
    (dict(chat=True, data='d', split='train', prompts=1), '--data and --split and --prompts'),
    (dict(history=True), '--history.*add --chat'),
    (dict(n=4), '--n=4.*--temperature=1'), (dict(split='test'), '--split=test.*val'),
    (dict(temperature=-1.0), '--temperature=-1'), (dict(n=0), '--n=0'),
    (dict(prompts=0), '--prompts=0'), (dict(batch_size=0), '--batch_size=0'),
    (dict(max_new_tokens=0), '--max_new_tokens=0'),
    (dict(max_new_tokens=32), 'lower --max_new_tokens'),
    (dict(max_new_tokens=32, chat=True), 'lower --max_new_tokens'),
    (dict(device='nowhere'), '--device=nowhere'), (dict(dtype='float16'), '--dtype=float16'),
    (dict(data='nowhere'), 'nowhere')])
def test_what_cannot_work_is_named(run, changes, words):
    """Flags that contradict each other or make no sense are an error that names the flag and what
    to do, before anything is sampled."""
    runs = tuple(run for _ in changes.get('runs', 'R'))
    with pytest.raises(UserError, match=words):
        sample.main(Config(**{**changes, 'runs': runs}))


# ----------------------------------------------------------------------------- chat

@pytest.fixture
def talk(run, monkeypatch):
    """talk(lines, ...) -> the answers of a chat in which the lines are typed, then Ctrl-D; an
    exception among them is raised in the line's place."""
    def talk(lines, **changes):
        lines = iter(lines)

        def type_line(prompt):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line
        monkeypatch.setattr('builtins.input', type_line)
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO()))
        return main(run, **{'chat': True, **changes})
    return talk


def answer_with(monkeypatch, text, *eos):
    """From now on generate answers one prompt with these bytes, and EOS if it is given."""
    def generate_text(policy, prompts, *arguments):
        tokens = torch.tensor([[*prompts[0], *text, *eos]])
        return tokens, torch.arange(1, tokens.size(1))[None] >= len(prompts[0])
    monkeypatch.setattr(sample, 'generate', generate_text)


def test_every_line_is_a_new_conversation(talk, asked, capsys):
    """Each line stands in the template by itself; the same line gets the same greedy answer; a
    hint says how to leave, and no counts of rows are printed."""
    first, second, third = talk(['say a:', 'say b:', 'say a:'])
    assert asked == [[b'user: say a:\nbot:'], [b'user: say b:\nbot:'], [b'user: say a:\nbot:']]
    assert first == third
    shown = capsys.readouterr().out
    assert 'Ctrl-D' in shown and 'kept' not in shown and first in shown


def test_history_keeps_the_turns_and_loses_their_left_end(talk, run, asked):
    """With --history the prompt is the whole dialogue as from_messages renders it, the last 28
    tokens of it where the block is full: a turn lost, doubled or without its space would show."""
    first, second, _ = talk(['a', 'b', 'c'], history=True, temperature=1.0, max_new_tokens=4)
    whole = f'user: a\nbot: {first}\nuser: b\nbot: {second}\nuser: c\nbot:'.encode()
    assert len(whole) > 28
    assert [prompt for prompt, in asked] == [
        b'user: a\nbot:', f'user: a\nbot: {first}\nuser: b\nbot:'.encode()[-28:], whole[-28:]]


def test_turns_draw_different_random_numbers(talk, run, asked):
    """At T=1 the same line is answered with the numbers of rng(seed, turn, 'eval'): with one
    generator for all turns the same question would get the same answer for ever."""
    answers = talk(['say a:'] * 5, temperature=1.0, seed=3)
    policy = load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')
    for turn, answer in enumerate(answers):
        tokens, mask = generate(policy, [list(b'user: say a:\nbot:')], 8, EOS, 1.0,
                                rng(3, turn, 'eval'))
        ids = [i for i in tokens[:, 1:][mask].tolist() if i != EOS]
        assert answer == bytes(ids).decode(errors='replace').removeprefix(' ')
    assert len(set(answers)) > 1


@pytest.mark.parametrize('line', ['', '   ', '\t'])
def test_an_empty_line_is_asked_again(talk, asked, line):
    """Nothing was said, so nothing is answered, and no random numbers are used up."""
    assert talk([line, 'say a:', line], temperature=1.0) == talk(['say a:'], temperature=1.0)
    assert len(asked) == 2


def test_a_long_line_is_cut_on_the_left(talk, asked, capsys):
    """A line longer than the block is answered from its end, and one short line says so."""
    talk(['x' * 5000 + 'say a:'])
    assert asked == [[(b'x' * 5000 + b'say a:\nbot:')[-24:]]]
    assert '[the first 4993 of 5017 tokens are cut]\n' in capsys.readouterr().out


def test_any_text_can_be_said_and_none_steers_the_terminal(talk, asked, monkeypatch, capsys):
    """Another script and control characters are bytes to the tokenizer; in an answer control
    characters are not printed."""
    talk(['\x1b[2J\x07', '你好'])
    assert asked == [[b'user: \x1b[2J\x07\nbot:'], ['user: 你好\nbot:'.encode()]]

    answer_with(monkeypatch, b' \x1b[2J', EOS)
    assert talk(['say a:']) == ['\x1b[2J']
    assert '\x1b' not in capsys.readouterr().out


def test_an_answer_without_an_end_is_marked(talk, monkeypatch, capsys):
    """An answer that max_new_tokens cut says so, and one that ended does not."""
    answer_with(monkeypatch, b' yes')
    talk(['say a:'])
    answer_with(monkeypatch, b' no', EOS)
    talk(['say a:'])
    shown = capsys.readouterr().out
    assert '\nyes [no end]\n' in shown and '\nno\n' in shown


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk, monkeypatch, capsys):
    """Ctrl-C while it generates: that answer is missing, from the history too, the next is there;
    at the prompt it ends the chat as Ctrl-D does, without an exception."""
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
    assert calls[2] == f'user: a\nbot: {answers[0]}\nuser: c\nbot:'.encode()[-30:]
    assert '[stopped]\n' in capsys.readouterr().out
    assert talk([]) == [] and talk([KeyboardInterrupt()]) == []


def test_a_chat_through_a_pipe(run):
    """Lines from a pipe, some of them no UTF-8, the last without its end: answered, exit status 0,
    nothing on stderr (no traceback) and no control character on stdout."""
    typed = b'say a:\n\n\xff\xfe\x80 say b:\n\x1b[2J\x00\n' + '你好\n'.encode() + b'say c:'
    done = subprocess.run([sys.executable, '-m', 'tools.sample', run, '--chat', '--device=cpu',
                           '--max_new_tokens=8'], input=typed, cwd=TOP, capture_output=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'})
    assert (done.returncode, done.stderr) == (0, b'')
    shown = done.stdout.decode()
    assert shown.count('> ') == 7 and shown.endswith('> \n')   # five answers, '' and the end
    assert shown.replace('\n', '').isprintable()


def test_flags_on_the_command_line():
    """--chat alone is True, and numbers and names come in as they should."""
    cfg = parse_config(Config, ['RUN', '--chat', '--n=4', '--temperature=1', '--history=False'])
    assert cfg == Config(runs=['RUN'], chat=True, n=4, temperature=1.0)
