"""
Turns and templates: how a chat, or a question, becomes a canonical row, whose prompt is the literal
text that a model sees; and how the question is found in it again, for the split.
"""
import re, zlib
from collections import Counter

from prefgpt import UserError

CHAT = 'user: {}\nbot:'
HH_TEMPLATE = '\n\nHuman: {}\n\nAssistant:'
KNOWN = (HH_TEMPLATE, '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n', CHAT)
ROLES = {'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'system': 'system', 'developer': 'system'}
ENDS = ('<|endoftext|>', '</s>', '<|im_end|>', '<|eot_id|>', '<|end_of_text|>', '<eos>')
# Keys that change what a row means, and that no training script reads
FOREIGN = ('messages', 'conversations', 'response', 'rejected_response', 'label', 'kto_tag',
           'is_safe', 'weight', 'system', 'history', 'tools', 'tool_calls', 'images')
SIDES = ('completion', 'chosen', 'rejected')


class Odd(ValueError):
    """A row that says nothing, as real data holds some: empty, equal, without a preference."""


class Unknown(ValueError):
    """A row whose keys are no shape that is read; convert may have the command that helps."""


def unique_keys(pairs):
    """Raises ValueError on a repeated key: json keeps its last value (an object_pairs_hook)."""
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key {max(keys, key=keys.count)!r} appears twice')
    return dict(pairs)


def string_of(row, key):
    """Returns row[key]; raises ValueError if it is missing or not a string that can be encoded."""
    if not isinstance(row.get(key), str):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, not a string' if key in row else
                         f'missing {key!r} (keys: {", ".join(row)})')
    row[key].encode()                           # a lone surrogate fails here, at a known line
    return row[key]


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
    # An answer of before begins as the one to come will: after the template's end
    return ''.join(form[role].replace('{}', spaced(text, template) if role == 'assistant' else text)
                   for role, text in turns)


def spaced(text, before=''):
    """Returns an answer that begins with a space, unless it or what is before brings one."""
    return text if text[:1].isspace() or before[-1:].isspace() else ' ' + text


def clean_template(text, where):
    """Returns a template, `\\n` as a line break; raises UserError if it cannot work."""
    text = text.replace('\r\n', '\n').replace('\\n', '\n')
    if text.count('{}') != 1 or text.endswith((' ', '\t')):
        raise UserError(f'{where}: {text!r} must hold {{}} once, the place of the question, and '
                        'not end in a space: each answer brings its own')
    return text


def without_end(text, note):
    """Returns an answer without another tool's EOS in words: ours is an id, which follows."""
    while mark := next((mark for mark in ENDS if text.rstrip().endswith(mark)), ''):
        note('answers', f'that ended in {mark}, which was cut off')
        text = text.rstrip().removesuffix(mark)
    return text


def put_into(prompt, template, note):
    """Returns a literal prompt in the template, unless it is already. Refuses half a template."""
    start, end = template.split('{}')
    if '\n' in end and prompt.endswith(end.replace('\n', '\\n')):
        raise ValueError("line breaks spelled '\\n': the text was escaped twice")
    if end.strip() and prompt.endswith(end + ' '):
        note('prompts', 'whose last space now begins the answer')
        prompt = prompt.rstrip(' ')
    if template == '{}' or prompt.endswith(end) and (end or prompt.startswith(start)):
        return prompt
    if not prompt.strip():
        raise Odd('an empty prompt')
    ends = tuple(known.split('{}')[1] for known in KNOWN)
    if start.strip() and prompt.startswith(start) or prompt.rstrip(' ').endswith(ends):
        raise ValueError(f'a literal prompt in half of the template {template!r}, or in another '
                         'one: see --template')
    note('literal prompts', 'put into the template, as questions and turns are')
    return template.replace('{}', prompt)


def fit(row, template, note):
    """Returns a row in canonical form; raises Odd or ValueError. note counts what it changed."""
    sides = [key for key in SIDES if key in row]
    texts = [without_end(string_of(row, key), note) for key in sides]
    if isinstance(row['prompt'], list):
        turns = [(role, without_end(text, note) if role == 'assistant' else text)
                 for role, text in row['prompt']]
        check_turns(turns)
        if template == '{}' and len(turns) > 1:
            raise ValueError("turns need a template: --template='user: {}\\nbot:'")
        inside, prompt = [text for _, text in turns], render(turns, template)
    else:
        inside, prompt = [string_of(row, 'prompt')], put_into(row['prompt'], template, note)
    asked = inside[-1].strip()
    for mark in ('\n' + template.lstrip('\n')).split('{}'):
        said = texts + inside * (len(prompt) > len(inside[-1]))     # unless it came in the template
        if mark.strip() and any(mark in text for text in said):
            raise Odd(f"text with the template's own mark {mark!r}")
    out = {'prompt': prompt}
    for key, text in zip(sides, texts):
        if not text.strip():
            raise Odd(f'an empty {key} text')
        out[key] = spaced(text, prompt)
        out |= {f'{key}_cut': True} if row.get(f'{key}_cut') else {}
        if template == '{}' and out[key] != text:
            note('answers', 'given a space in front')
    if not sides:
        note('prompts', 'without an answer')
    for text in (prompt, *texts):
        text.encode()                           # as in string_of
        if re.search(r'\s{100000}', text):
            raise Odd('100,000 characters of white space in a row, which crash the tokenizer')
    if any(re.match(r"\s*\[\s*\{\s*['\"](role|from|content|value|text|type)['\"]\s*:", text)
           for text in (asked, *texts)):
        raise ValueError('a list written as a string: json.loads it first')
    if asked and texts and all(text.strip().startswith(asked) for text in texts):
        raise Odd('answers that begin with their prompt: cut it off them')
    if 'chosen' in out and out['chosen'].split() == out['rejected'].split():
        raise Odd('equal answers, or equal but for white space')
    return out


def choose_template(flag, rows, saved):
    """Returns the template: the flag's, the run's, or the one that these rows seem to have."""
    if flag:
        return clean_template(flag, '--template')
    if saved and saved['stage'] != 'base':
        return saved['template']
    literal = [row['prompt'].rstrip(' ') for row in rows if isinstance(row['prompt'], str)]
    for template in KNOWN:
        end = template.split('{}')[1]
        right = sum(prompt.endswith((end, end.replace('\n', '\\n'))) for prompt in literal)
        if 0 < right < len(literal):
            raise UserError(f'{right} of {len(literal)} literal prompts end in {end!r}, the others '
                            f'do not: say --template={template!r}, or {{}} to leave them as they '
                            'are')
        if right:
            return template
    return CHAT if len(literal) < len(rows) or not rows else '{}'


def question_of(prompt, template):
    """Returns a prompt's first question, without its template and the system's turn before it."""
    start, end = (re.escape(part) for part in template.strip('\n').split('{}'))
    asked = f'(.*?)(?:{end}|$)' if end else '(.*)'
    found = re.search(rf'(?s)(?:^|\n){start}{asked}', prompt)
    return (found[1] if found else prompt).strip()


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
