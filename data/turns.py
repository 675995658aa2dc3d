"""
Turns and templates: how a chat, or a question, becomes the literal prompt that a model sees, and
how the question is found in it again, for the split.
"""
import zlib
from collections import Counter

from prefgpt import UserError

CHAT = 'user: {}\nbot:'
HH_TEMPLATE = '\n\nHuman: {}\n\nAssistant:'
KNOWN = (HH_TEMPLATE, '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n', CHAT)
ROLES = {'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'system': 'system', 'developer': 'system'}
ENDS = ('<|endoftext|>', '</s>', '<|im_end|>', '<|eot_id|>', '<|end_of_text|>', '<eos>')


class Odd(ValueError):
    """A row that says nothing, as real data holds some: empty, equal, without a preference."""


class Unknown(ValueError):
    """A row whose keys are no shape that is read; convert may have the command that helps."""


def read_turns(row, key):
    """Returns a list of turns, {role, content} or ShareGPT's {from, value}, as (role, text)."""
    if not isinstance(row[key], list) or not all(isinstance(turn, dict) for turn in row[key]):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, neither text nor a list of turns')
    turns = []
    for turn in row[key]:
        role, text = turn.get('role', turn.get('from')), turn.get('content', turn.get('value'))
        if not isinstance(role, str) or role not in ROLES or turn.get('tool_calls'):
            raise ValueError(f'{key!r} has a turn of {role!r} or a tool call; only user, assistant '
                             'and system are read: leave such rows out')
        if isinstance(text, list):                          # parts: {"type": "text", "text": ...}
            text = ''.join(part['text'] for part in text)
        if not isinstance(text, str):
            raise ValueError(f"{key!r} has a turn whose 'content' is {type(text).__name__}")
        text.encode()                           # a lone surrogate fails here, at a known line
        turns.append((ROLES[role], text))
    if turns and row[key][-1].get('weight') == 0:
        raise Odd('the last turn has weight 0')
    return turns


def from_transcripts(chosen, rejected):
    """Cuts two whole dialogues at the LAST assistant turn: (prompt, chosen, rejected)."""
    marker = '\n\nAssistant:'
    cuts = [text.rfind(marker) + len(marker) for text in (chosen, rejected)]
    if min(cuts) < len(marker) or chosen[:cuts[0]] != rejected[:cuts[1]]:
        raise Odd("transcripts that do not share everything up to the last '\\n\\nAssistant:'")
    return chosen[:cuts[0]], chosen[cuts[0]:], rejected[cuts[1]:]


def check_turns(turns):
    """Raises Odd unless turns are a system's, or none, and then user, assistant, ..., user."""
    roles = [role for role, _ in turns]
    if (roles[roles[:1] == ['system']:] + ['assistant']) != ['user', 'assistant'] * (
            (len(roles) + 1) // 2):
        raise Odd('turns that are not (system), user, assistant, ..., user, assistant')
    if not all(text.strip() for _, text in turns):
        raise Odd('an empty turn')


def render(turns, template):
    """Returns turns that end with the user's as one prompt. A turn begins on a new line."""
    end = '' if template.startswith('\n') else '\n'
    form = {'user': template, 'assistant': '{}' + end, 'system': '{}' + end}
    return ''.join(form[role].replace('{}', spaced(text) if role == 'assistant' else text)
                   for role, text in turns)


def spaced(text, before=''):
    """Returns an answer that begins with a space, unless it or what is before brings one."""
    return text if text[:1].isspace() or before[-1:].isspace() else ' ' + text


def clean_template(text, where):
    """Returns a template without an editor's last newline; raises UserError if it cannot work."""
    text = text.replace('\r\n', '\n').removesuffix('\n').replace('\\n', '\n')
    if text.count('{}') != 1 or text.endswith((' ', '\t')):
        raise UserError(f'{where}: {text!r} must hold {{}} once, the place of the question, and '
                        'not end in a space: each answer brings its own')
    return text


def without_end(text, note):
    """Returns an answer without another tool's EOS in words: ours is an id, which follows."""
    for mark in ENDS:
        if text.rstrip().endswith(mark):
            note('without it', f'answers that ended in {mark}')
            return text.rstrip().removesuffix(mark)
    return text


def put_into(prompt, template, note):
    """Returns a literal prompt in the template, unless it ends as it does already."""
    start, end = template.split('{}')
    if '\n' in end and prompt.endswith(end.replace('\n', '\\n')):
        raise ValueError("line breaks spelled '\\n': the text was escaped twice")
    if end.strip() and prompt.endswith(end + ' '):
        note('moved to the answer', 'a space at the end of a prompt')
        prompt = prompt.rstrip(' ')
    if template == '{}' or prompt.endswith(end) and (end or prompt.startswith(start)):
        return prompt
    if not prompt.strip():
        raise Odd('an empty prompt')
    note('put into the template', 'literal prompts')
    return template.replace('{}', prompt)


def choose_template(flag, rows, saved):
    """Returns the template: the flag's, the run's, or the one that these rows seem to have."""
    if flag:
        return clean_template(flag, '--template')
    if saved and saved['stage'] != 'base':
        return saved['template']
    literal = [row['prompt'].rstrip(' ') for row in rows if isinstance(row['prompt'], str)]
    for template in KNOWN:
        end = template.split('{}')[1].rstrip(' ')
        if literal and all(prompt.endswith((end, end.replace('\n', '\\n'))) for prompt in literal):
            return template
    return CHAT if len(literal) < len(rows) or not rows else '{}'


def question_of(prompt, template):
    """Returns a prompt's first question, the same in any wrapping."""
    start, end = template.split('{}')
    prompt = prompt.split(start, 1)[-1] if start else prompt
    return (prompt.split(end, 1)[0] if end else prompt).strip()


def split_rows(rows, template, share=0.1):
    """Returns (train, val): a hash of the questions holds out a share, with all their rows."""
    asked = Counter(question_of(row['prompt'], template) for row in rows)
    if len(asked) < 2:
        raise UserError('only one prompt, so none can be held out: bring rows with others')
    # A question that most rows ask stays: training would have next to nothing
    order = sorted((text for text in asked if len(rows) < 3 or asked[text] <= len(rows) / 2),
                   key=lambda text: (zlib.crc32(text.encode()), text))
    held_out = set(order[:max(1, int(len(asked) * share))])
    sides = [], []
    for row in rows:
        sides[question_of(row['prompt'], template) in held_out].append(row)
    return sides
