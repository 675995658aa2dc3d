"""
Reads the shapes of rows that people bring, one small function per shape.

Each function takes a row without its nulls and returns {prompt} and {completion} or {chosen,
rejected}. A prompt is literal text, or turns (role, text), which prepare.py puts into the template.
A row that contradicts its keys raises ValueError, which stops the gate; one that teaches nothing
raises Odd, and is dropped and counted.
"""
import math, re

from data.turns import FOREIGN, ROLES, Odd, Unknown, from_transcripts, read_turns, string_of


def read_prompt(row):
    """Returns a row's prompt: its text, or its turns, which `messages` may hold as well."""
    key = 'prompt' if 'prompt' in row else 'messages'
    return row[key] if isinstance(row[key], str) else read_turns(row, key)


def prompts(row):
    """
    Reads TRL's prompt-only rows (huggingface.co/docs/trl/dataset_formats).
    {"prompt": "The sky is"}
    {"prompt": [{"role": "user", "content": "Why is the sky blue?"}]}
    """
    return {'prompt': read_prompt(row)}


def demonstrations(row):
    """
    Reads TRL's prompt-completion rows.
    {"prompt": "The sky is", "completion": " blue."}
    {"prompt": [{"role": "user", "content": "Why?"}],
     "completion": [{"role": "assistant", "content": "Light scatters."}]}
    """
    prompt, answer = read_prompt(row), row['completion']
    if isinstance(answer, str):
        return {'prompt': prompt, 'completion': answer}
    prompt = [('user', prompt)] if isinstance(prompt, str) else prompt
    return split_turns(prompt + read_turns(row, 'completion'))


def messages(row):
    """
    Reads a chat, as UltraChat 200k and ShareGPT (`conversations`) spell it; the last turn answers.
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Light."}]}
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Light."}]}
    """
    turns = read_turns(row, 'messages')
    if 'prompt' in row and ('user', row['prompt']) not in turns[:2]:    # UltraChat's repeats it
        raise ValueError("'prompt' is not the first question of 'messages'")
    return split_turns(turns)


def split_turns(turns):
    """Returns turns as a row: an assistant's last one is the completion."""
    if turns and turns[-1][0] == 'assistant':
        return {'prompt': turns[:-1], 'completion': turns[-1][1]}
    return {'prompt': turns}


def preferences(row):
    """
    Reads TRL's preferences, text or turns, with a prompt or without (UltraFeedback-binarized).
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    {"chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Light."}],
     "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]}
    """
    for high, low in (('score_chosen', 'score_rejected'), ('chosen_score', 'rejected_score')):
        if (high in row) != (low in row):
            raise ValueError(f'{high!r} or {low!r} alone: bring both or none')
        if high in row and not (above := float(row[high]) - float(row[low])) > 0:
            error = Odd if above == 0 else ValueError
            raise error(f'{high!r} is not above {low!r}')
    if isinstance(row['chosen'], str) and isinstance(row['rejected'], str):
        if 'prompt' not in row and 'messages' not in row:
            return transcripts(row)
        if 'prompt' in row and 'messages' in row:
            raise ValueError("both 'prompt' and 'messages': delete one of them")
        return {'prompt': read_prompt(row), 'chosen': row['chosen'], 'rejected': row['rejected']}
    chosen, rejected = (read_turns(row, key) for key in ('chosen', 'rejected'))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1                             # the last turn is an answer, even in equal chats
    if [role for role, _ in chosen[shared:] + rejected[shared:]] != ['assistant', 'assistant']:
        raise Odd("'chosen' and 'rejected' differ in more than one last answer")
    prompt = chosen[:shared]
    if 'prompt' in row:
        given = read_prompt(row)
        given = [*prompt[:-1], ('user', given)] if isinstance(given, str) else given
        if prompt and prompt != given:
            raise ValueError("'prompt' and 'chosen' do not hold the same turns")
        prompt = given
    if 'messages' in row and read_turns(row, 'messages') not in (chosen, prompt):
        raise ValueError("'messages' and 'chosen' do not hold the same turns")
    return {'prompt': prompt, 'chosen': chosen[-1][1], 'rejected': rejected[-1][1]}


def transcripts(row):
    r"""
    Reads HH-RLHF (github.com/anthropics/hh-rlhf).
    {"chosen": "\n\nHuman: Why?\n\nAssistant: Light.",
     "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    """
    if '\n\nAssistant:' not in row['chosen'] + row['rejected']:
        raise ValueError("without a 'prompt', where the answers begin is a guess: add one")
    prompt, chosen, rejected = from_transcripts(row['chosen'], row['rejected'])
    before, *parts = re.split(r'(?:^|\n\n)(Human|Assistant): ?', prompt)
    # parts: name, text, name, text, ..., and 'Assistant', whose text is to come
    turns = [(ROLES[name.lower()], text) for name, text in zip(parts[:-2:2], parts[1:-2:2])]
    return {'prompt': [('system', before)] * bool(before) + turns, 'chosen': chosen,
            'rejected': rejected}


def question(row):
    """Returns an instruction and its input, if any, as the turns of a prompt."""
    extra = string_of(row, 'input') if row.get('input', '') != '' else ''
    return [('user', string_of(row, 'instruction') + (f'\n{extra}' if extra else ''))]


def alpaca(row):
    """
    Reads Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), and pairs as LLaMA-Factory has.
    {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    {"instruction": "Name a colour.", "input": "", "chosen": "Blue.", "rejected": "Dog."}
    """
    sides = {key: row[key] for key in ('chosen', 'rejected') if key in row}
    return {'prompt': question(row)} | (sides or {'completion': row['output']})


def alpaca_farm(row):
    """
    Reads AlpacaFarm's preferences (huggingface.co/datasets/tatsu-lab/alpaca_farm).
    {"instruction": "Name a colour.", "output_1": "Blue.", "output_2": "Dog.", "preference": 1}
    """
    if isinstance(row['preference'], bool) or row['preference'] not in (1, 2):
        raise ValueError("'preference' is neither 1 nor 2, the better output's number")
    better = int(row['preference'])
    return {'prompt': question(row), 'chosen': row[f'output_{better}'],
            'rejected': row[f'output_{3 - better}']}


def ultrafeedback(row):
    """
    Reads the original UltraFeedback (github.com/OpenBMB/UltraFeedback): best rated against worst.
    {"instruction": "Name a colour.", "completions": [
     {"response": "Blue.", "annotations": {"helpfulness": {"Rating": "5"}}},
     {"response": "Dog.", "annotations": {"helpfulness": {"Rating": "1"}}}]}
    The mean is over the aspects for which all answers have a rating. Where there is no such aspect,
    overall_score decides; it has errors.
    """
    def number(value):                          # a rating may be "4.5", or "N/A"
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return math.nan
    answers = row['completions']
    rated = [answer.get('annotations') or {} for answer in answers]
    table = [[number((each.get(aspect) or {}).get('Rating')) for each in rated]
             for aspect in (rated[0] if rated else ())]
    lines = [line for line in table if all(map(math.isfinite, line))] or [
        [number(answer.get('overall_score')) for answer in answers]]
    scores = [sum(column) for column in zip(*lines)]        # all are of as many lines
    if not max(scores, default=0) > min(scores, default=0):
        raise Odd('answers without ratings that can be compared, or with equal ones')
    best, worst = (answers[scores.index(pick(scores))]['response'] for pick in (max, min))
    return {'prompt': question(row), 'chosen': best, 'rejected': worst}


def safe_rlhf(row, by='rule', drop=''):
    """
    Reads PKU-SafeRLHF. by='rule' (Dai et al. 2023): the better if both are safe, else the safer.
    {"prompt": "Why?", "response_0": "Light.", "response_1": "You fool.", "better_response_id": 0,
     "safer_response_id": 0, "is_response_0_safe": true, "is_response_1_safe": false}
    """
    safe = [row.get(f'is_response_{i}_safe') for i in (0, 1)]
    if (by == 'rule' or drop) and not all(flag in (True, False) for flag in safe):
        raise ValueError('is_response_0_safe, _1_safe: not true or false; see --safe_rlhf=better')
    kind = {(1, 1): 'dual-safe', (0, 0): 'dual-unsafe'}.get(tuple(safe), '')    # True equals 1
    if kind and kind in drop.split(','):
        raise Odd(f'{kind}, as --drop says')
    if {*safe} == {True, False} and row.get('safer_response_id') == safe.index(False):
        raise Odd("'safer_response_id' names the answer that is not safe")
    key = 'better' if by == 'better' or by == 'rule' and kind == 'dual-safe' else 'safer'
    if row.get(f'{key}_response_id') not in (0, 1):
        raise ValueError(f'{key}_response_id must be 0 or 1')
    better = int(row[f'{key}_response_id'])
    return {'prompt': [('user', string_of(row, 'prompt'))], 'chosen': row[f'response_{better}'],
            'rejected': row[f'response_{1 - better}']}


SHAPES = (  # who reads it, the keys it must have, others that are read; the first that fits
    (safe_rlhf, 'prompt response_0 response_1', 'better_response_id safer_response_id '
                'is_response_0_safe is_response_1_safe'),
    (ultrafeedback, 'instruction completions', ''),
    (alpaca_farm, 'instruction output_1 output_2 preference', 'input'),
    (alpaca, 'instruction output', 'input'), (alpaca, 'instruction chosen rejected', 'input'),
    (preferences, 'chosen rejected', 'prompt messages chosen_cut rejected_cut score_chosen '
                  'score_rejected chosen_score rejected_score'),
    (demonstrations, 'prompt completion', 'completion_cut'),
    (messages, 'messages', 'prompt'),
    (prompts, 'prompt', ''))
ALIASES = {'response': 'completion', 'response_cut': 'completion_cut', 'conversations': 'messages'}
IN_TURNS = 'role content from value weight response annotations overall_score'.split()
# Keys with text or labels: beside a shape that does not read them, they may change its meaning
CONTENT = {*FOREIGN, *' '.join(f'{needs} {more}' for _, needs, more in SHAPES).split(), *(
    'question answer query context system_prompt response_1 response_2 function_call functions '
    'helpfulness correctness is_correct reward score rating chosen_rating rejected_rating margin '
    'chosen_avg_rating rejected_avg_rating preferred rejected_messages chat_history image video '
    'videos audio audios truncated finish_reason').split()}


def rename(row):
    """Returns a row with its aliases replaced, unless it has both keys, and new key -> old key."""
    names = {}
    for key in row:
        new = ALIASES.get(key, key)
        names[key if new in row else new] = key
    return {key: row[name] for key, name in names.items()}, names


def read_shape(row, kind='', by='rule', drop=''):
    """Returns a row as its shape's function reads it, and the names of the keys it does not."""
    row, names = rename(row)
    shape, needs, more = next((each for each in SHAPES if row.keys() >= {*each[1].split()}),
                              (prompts, '', ''))
    unread = [key for key in row if key not in f'{needs} {more}'.split()]
    if not needs or shape is prompts and unread and kind != 'prompts':
        raise Unknown(f'{", ".join(names.values())}: no known shape; wanted: prompt, completion; '
                      'or prompt, chosen, rejected; or messages; or instruction, output')
    for key in unread:
        if key.replace('-', '_') in CONTENT or key.endswith('_cut'):
            raise Unknown(f'{names[key]!r} beside {needs.replace(" ", ", ")} is not read, and may '
                          'change what a row means; leave it out if it does not')
    unread += sorted({f'{key}[].{name}' for key in row if isinstance(row[key], list)
                      for turn in row[key] if isinstance(turn, dict)
                      for name in turn if name not in IN_TURNS})
    try:
        out = shape(row, by, drop) if shape is safe_rlhf else shape(row)
    except (TypeError, AttributeError, LookupError, OverflowError) as error:   # 7 for a list, ...
        raise ValueError(f'values of other types than in {shape.__name__} ({error})') from None
    cuts = {key: row[key] for key in row if key.endswith('_cut')}
    if not all(isinstance(cut, bool) for cut in cuts.values()):
        raise ValueError(f'{", ".join(cuts)}: must be true or false')
    return out | cuts, unread
