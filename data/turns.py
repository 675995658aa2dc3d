"""
Turns a chat, or a question, into a canonical row by a template, and finds the question in it again
for the split. A row's prompt is the literal text that a model sees.
"""
import hashlib, re
from collections import Counter

from prefgpt import UserError

CHAT = 'user: {}\nbot:'
HH_TEMPLATE = '\n\nHuman: {}\n\nAssistant:'
KNOWN = (HH_TEMPLATE, '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n', CHAT)
ROLES = {'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'system': 'system', 'developer': 'system'}
ENDS = ('<|endoftext|>', '</s>', '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>',
        '<|end|>', '<end_of_turn>', '<|eos|>', '<eos>', '[EOS]', '<|eot|>', '<|return|>',
        '<|END_OF_TURN_TOKEN|>', '<|end_of_turn|>', '<｜end▁of▁sentence｜>')
# What other templates put before an answer
OTHER = re.compile(r'((?im:^[#* ]*(assistant|bot|response|answer|model))\s*:|'
                   r'\b(ASSISTANT|BOT|RESPONSE|ANSWER|MODEL)\s*:|\[/INST\]|<\|\w+\|>|'
                   r'<(\|im_start\||start_of_turn)>(assistant|model))\s*$')
# What an answer holds that is a chat of several turns
SEVERAL = ('\n\nHuman:', '\n\nAssistant:', '### Human:', '### Assistant:', '[/INST]',
           '<|im_start|>', '<|start_header_id|>', '<start_of_turn>', '<|user|>', '<|assistant|>',
           ' ASSISTANT: ')
# A chat written as a string: its first turn names a known role, or a part of type text
LISTED = re.compile(r'''(?s)\s*\[\s*\{[^{}]*?["'](role|from|type)["']\s*:\s*'''
                    r'''["'](user|human|assistant|gpt|system|developer|text)["']''')
# Keys that change what a row means, and that no training script reads
FOREIGN = ('messages', 'conversations', 'response', 'rejected_response', 'label', 'kto_tag',
           'is_safe', 'weight', 'system', 'history', 'tools', 'tool_calls', 'images')
SIDES = ('completion', 'chosen', 'rejected')


class Odd(ValueError):
    """Drops a row that says nothing, as real data has some: empty, equal, without preference."""


class Unknown(ValueError):
    """Refuses a row whose keys are no known shape; convert may have a command that helps."""


def unique_keys(pairs):
    """Raises ValueError on a repeated key: json keeps its last value (an object_pairs_hook)."""
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key {max(keys, key=keys.count)!r} appears twice')
    return dict(pairs)


def check_text(text):
    """Returns a text; raises ValueError if UTF-8 or the tokenizer cannot take it."""
    text.encode()                               # a lone surrogate fails here, at a known line
    if len(text) >= 100_000 and re.search(r'(?<!\s)\s{100000}', text):
        raise Odd('100,000 characters of white space in a row, which crash the tokenizer')
    return text


def string_of(row, key):
    """Returns row[key]; raises ValueError if it is missing, or no string that can be encoded."""
    if not isinstance(row.get(key), str):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, not a string' if key in row else
                         f'missing {key!r} (keys: {", ".join(row)})')
    return check_text(row[key])


def read_turns(row, key):
    """Returns a list of turns, {role, content} or ShareGPT's {from, value}, as (role, text)."""
    if not isinstance(row[key], list) or not all(isinstance(turn, dict) for turn in row[key]):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, not a list of turns {{role, '
                         'content}' + ', nor text' * (key != 'messages'))
    turns = []
    for turn in row[key]:
        turn = {name: value for name, value in turn.items() if value is not None}
        role, text = turn.get('role', turn.get('from')), turn.get('content', turn.get('value'))
        if not isinstance(role, str) or role not in ROLES or turn.get('tool_calls'):
            raise ValueError(f'{key!r} has a turn of {role!r} or a tool call; only user, assistant '
                             'and system are read: leave such rows out')
        if isinstance(text, list):                          # parts: {"type": "text", "text": ...}
            text = ''.join(part['text'] for part in text)
        if not isinstance(text, str):
            raise ValueError(f"{key!r} has a turn whose 'content' is {type(text).__name__}")
        turns.append((ROLES[role], text))
    marks = [row[key][-1].get(name) for name in ('weight', 'train', 'training')] if turns else []
    if 0 in marks and turns[-1][0] == 'assistant':          # a null says nothing, False equals 0
        raise Odd('the last turn is marked as one that is not to be learned')
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
    roles = roles[1:] if roles[:1] == ['system'] else roles
    if roles + ['assistant'] != ['user', 'assistant'] * (len(roles) // 2 + 1):
        raise Odd('turns that are not (system), user, assistant, ..., user, assistant')
    if not all(text.strip() for _, text in turns):
        raise Odd('an empty turn')


def render(turns, template):
    """
    Returns turns that end with the user's as one prompt. Each begins on a new line, which the
    template brings or `end` adds.
    """
    end = '' if template.startswith('\n') else '\n'
    form = {'user': template, 'assistant': '{}' + end, 'system': '{}' + end}
    # Earlier answers begin with a space just as the last one will
    return ''.join(form[role].replace('{}', spaced(text, template) if role == 'assistant' else text)
                   for role, text in turns)


def spaced(text, before=''):
    """Returns an answer with a space in front, unless white space begins it or ends `before`."""
    return text if text[:1].isspace() or before[-1:].isspace() else ' ' + text


def clean_template(text, where):
    """Returns a template, `\\n` as a line break; raises UserError if it cannot work."""
    text = text.replace('\r\n', '\n').replace('\r', '\n').replace('\\n', '\n')
    if text.count('{}') != 1 or text.endswith((' ', '\t')):
        raise UserError(f'{where}: {text!r} must hold {{}} once, the place of the question, and '
                        'not end in a space: each answer brings its own')
    return text


def without_end(text, note):
    """Returns an answer without another tool's EOS in words: ours is an id, which follows."""
    ends = [mark for mark in ENDS if mark != '</s>' or '<s>' not in text]   # <s>...</s> is HTML
    while mark := next((mark for mark in ends if text.rstrip().endswith(mark)), ''):
        note('text', f'that ended in {mark}, which was cut off')
        text = text.rstrip().removesuffix(mark)
    return text


def check_marks(texts, template):
    """Raises Odd if a text holds the template's own marks: it would read as another turn."""
    start, end = template.split('{}')
    for mark in ('\n' + start.lstrip('\n'), end):      # "user: " is a mark where a line begins
        if mark.strip() and any(mark in '\n' + text for text in texts):
            raise Odd(f"text with the template's own mark {mark!r}")


def find_question(prompt, template):
    """Returns the first question of a prompt, or None if the prompt is not in the template."""
    start, end = template.split('{}')
    if not prompt.endswith(end):
        return None
    start, end = re.escape(start.lstrip()), re.escape(end)
    # The question ends at the first end; later turns may follow
    asked = f'(.*?){end}(?:.*{end})?' if end else '(.*)'
    # A system's turn may be before it: on a line of its own, or, as in Vicuna's, on the same
    found = re.fullmatch(rf'(?s)(?:|.*?\n|.*?\s){start}{asked}', prompt)
    return found[1].strip() if found else None


def put_into(prompt, template, note):
    """Returns a literal prompt in the template, as it is if it is in it already."""
    start, end = template.split('{}')
    if '\n' in end and prompt.endswith(end.replace('\n', '\\n')):
        raise ValueError("line breaks spelled '\\n': the text was escaped twice")
    if re.search(r'\S $', prompt) and prompt.endswith(end + ' '):  # an indentation stays whole
        note('prompt', 'whose last space now begins the answer')
        prompt = prompt[:-1]
    question = find_question(prompt, template)
    if template != '{}' and not (prompt.strip() if question is None else question):
        raise Odd('an empty prompt')
    if question is not None:
        if start.strip() and prompt.startswith(start.lstrip()) and not prompt.startswith(start):
            note('prompt', 'given the white space that the template begins with')
            prompt = start[:-len(start.lstrip())] + prompt
        return prompt
    begins = start.strip() and prompt.lstrip().startswith(start.strip())
    ends = end.strip() and prompt.rstrip().endswith(end.rstrip())
    if begins or ends or OTHER.search(prompt):
        raise ValueError(f'a literal prompt in half of the template {template!r}, or in another '
                         'one: see --template')
    check_marks([prompt], template)
    note('literal prompt', 'put into the template, as questions and turns are')
    return template.replace('{}', prompt)


def refuse_other_forms(asked, answers):
    """Raises ValueError or Odd if a question or an answer holds what is not its text alone."""
    if any(LISTED.match(text) for text in (asked, *answers)):
        raise ValueError('a list written as a string: json.loads it first')
    # A short greeting may well begin its answer
    if len(asked) > 15 and answers and all(text.strip().startswith(asked) for text in answers):
        raise Odd('answers that begin with their prompt: cut it off them')
    if any(mark in '\n\n' + text.lstrip() for mark in SEVERAL for text in answers):
        raise Odd('an answer with the marks of a chat')


def fit(row, template, note):
    """Returns a row in canonical form; raises Odd or ValueError. note counts what it changed."""
    sides = [key for key in SIDES if key in row]
    answers = [without_end(string_of(row, key), note) for key in sides]
    check_marks(answers, template)
    if isinstance(row['prompt'], list):
        turns = [(role, check_text(without_end(text, note))) for role, text in row['prompt']]
        check_turns(turns)
        if template.endswith('{}') and len(turns) > 1:
            raise ValueError("turns need a template: --template='user: {}\\nbot:'")
        check_marks([text for _, text in turns], template)
        prompt, asked = render(turns, template), turns[-1][1].strip()
    else:
        prompt = put_into(string_of(row, 'prompt'), template, note)
        asked = question_of(prompt, template)
    refuse_other_forms(asked, answers)
    out = {'prompt': prompt}
    for key, text in zip(sides, answers):
        if not text.strip():
            raise Odd(f'an empty {key} text')
        out[key] = spaced(text, prompt)
        out |= {f'{key}_cut': True} if row.get(f'{key}_cut') else {}
        if template == '{}' and out[key] != text:
            note('answer', 'given a space in front')
    if not sides:
        note('prompt', 'without an answer')
    if 'chosen' in out:
        if out['chosen'].split() == out['rejected'].split():
            raise Odd('equal answers, or equal but for white space')
        edges = {out[key].replace(out[key].strip(), 'x', 1) for key in sides}
        if len(edges) > 1:                      # other white space around the two answers
            note('pair', 'whose white space at the ends tells the sides apart')
    return out


def choose_template(flag, rows, saved):
    """Returns the template: the flag's, the run's, or the one that these rows seem to have."""
    template = clean_template(flag, '--template') if flag else ''
    if saved and saved['stage'] != 'base':
        if template not in ('', saved['template']):
            raise UserError(f"--template={template!r}: the run's is {saved['template']!r}")
        return saved['template']
    literal = [row['prompt'].rstrip(' ').replace('\\n', '\n') for row in rows
               if isinstance(row['prompt'], str)]
    for known in KNOWN if not template else ():
        right = sum(find_question(prompt, known) is not None for prompt in literal)
        if 0 < right < len(literal):            # one odd row must not decide for the others
            raise UserError(f'{right} of {len(literal)} literal prompts are in the template '
                            f'{known!r}, the others are not: say --template={known!r}, or {{}} to '
                            'leave them as they are')
        if right:
            return known
    return template or (CHAT if len(literal) < len(rows) or not rows else '{}')


def question_of(prompt, template):
    """Returns a prompt's first question, the same in any wrapping; or all of it, if not in one."""
    question = find_question(prompt, template)
    return prompt.strip() if question is None else question


def split_rows(rows, template, share=0.1):
    """
    Returns (train, val). A question is held out, with all its rows, if its hash is below a share of
    all hashes: so it is on the same side in every call. But at least one question is held out, and
    none that a quarter of the rows ask, or training would have next to nothing.
    """
    texts = [' '.join(question_of(row['prompt'], template).split()) for row in rows]
    asked = Counter(texts)
    if len(asked) < 2:
        raise UserError('only one prompt, so none can be held out: bring rows with others')
    place = {text: int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in asked}
    few = max(len(rows) / 4, min(asked.values()))
    order = sorted((text for text in asked if asked[text] <= few),
                   key=lambda text: (place[text], text))
    count = sum(place[text] < share for text in order)
    held_out = set(order[:max(1, min(count, len(asked) - 1))])
    sides = [], []
    for row, text in zip(rows, texts):
        sides[text in held_out].append(row)
    return sides
