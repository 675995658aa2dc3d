"""
Draws the toy data set: demonstrations, noisy preference pairs, prompts, and their tokenizer.

    python -m data.toy.prepare --seed=0 --out=data/toy

Demonstrations come from a crowd of uneven quality: many name the popular wrong tool, pad, insult,
or help with harm, so whoever copies them well is not yet a good assistant. Preferences follow the
judge's points (reward.py) with noise, as a person's would. A fifth of the keys (verb x noun,
template x topic, bad verb x target) is held out. The seed changes every draw except this split and
the validation prompts. No file says what the judge thinks of a row.
"""
import math, random
from dataclasses import dataclass
from pathlib import Path

from data.bpe import write_tokenizer
from data.rows import shuffle, write_all, write_text
from data.toy.language import (ALTERNATIVE_FORM, BAD_STEPS, BAD_TOOLS, FACTS, MEANINGS, PHRASES,
                               POPULAR_ERRORS, REQUESTS, STEPS, TEMPLATE, TOOL_FORMS, TOOLS,
                               TARGETS, TWO_STEP_FORMS)
from data.toy.reward import points, score
from prefgpt import run_cli

VOCAB_SIZE = 768  # 256 bytes, merges, and EOS as the last id
TRAIN_ROWS = {'sft': 5000, 'pairs': 16000, 'prompts': 8000}
VAL_ROWS = {'sft': 400, 'pairs': 800}
VAL_PROMPTS = {'how': 200, 'fact': 80, 'red': 120}  # distinct ones
KINDS = {'how': 0.5, 'fact': 0.2, 'red': 0.3}       # share of each kind in everything drawn
HELD_OUT = 0.2                                      # share of each kind's keys

# How the pairs differ. An edit changes one thing in a response and no other word: without such
# pairs a reward model learns what looks good, and not what answers the prompt. junk: words of the
# copy are damaged. needless: the copy refuses a benign prompt. off-topic: it answers another one.
# If no pair showed that these are bad, PPO would find that they please the reward model.
PAIRS = {'edit': 0.50, 'junk': 0.12, 'needless': 0.10, 'off-topic': 0.08, 'independent': 0.20}
EDITS = {  # tools are the hardest to learn, so they get half of the edits of how-prompts
    'how': {'tool': 0.50, 'steps': 0.20, 'complete': 0.10,
            'filler': 0.07, 'insult': 0.06, 'danger': 0.07},
    'fact': {'fact': 0.60, 'complete': 0.20, 'filler': 0.10, 'insult': 0.10},
    'red': {'comply': 0.35, 'alternative': 0.25, 'reason': 0.15,
            'insult': 0.10, 'danger': 0.08, 'filler': 0.07},
}
CORRUPTED = 0.15   # share of the responses of independent pairs whose words are then damaged
SAFE_SLOPE = 2.5   # where costs differ, the safer is preferred: sigmoid(slope * difference)
HELP_SLOPE = 1.5   # elsewhere the more helpful, likewise


@dataclass
class Config:
    seed: int = 0           # changes every draw except the held-out split and validation prompts
    out: str = 'data/toy'   # folder to write into


# A response is a dict place -> sentence without its full stop
PLACES = ['insult', 'opener', 'refusal', 'reason', 'tool', 'facts', 'filler', 'steps', 'danger',
          'alternative', 'aside', 'closer']  # an aside is a second filler


def render(response):
    """Returns the text that follows the prompt: " use mild soap. good luck." """
    return ''.join(f' {response[place]}.' for place in PLACES if place in response)


def draw_response(rng, request, refuse=None):
    """Draws one person's response; refuse forces or forbids a refusal."""
    quality = rng.random()
    if refuse is None:
        refuse = rng.random() < (0.2 if request.kind == 'red' else 0.04)
    if refuse:
        response = draw_refusal(rng, request, quality)
    elif request.kind == 'fact':
        response = {'facts': draw_facts(rng, request, quality)}
    else:
        response = draw_tool_and_steps(rng, request, quality)
    if not refuse and rng.random() < 0.35:
        response['opener'] = rng.choice(PHRASES['opener'])
    if rng.random() < 0.3:
        response['closer'] = rng.choice(PHRASES['closer'])
    for place in ['filler', 'aside']:
        if rng.random() < 0.4 * (1.1 - quality):
            response[place] = rng.choice(PHRASES['filler'])
    if rng.random() < 0.16 * (1.4 - quality):
        response['insult'] = rng.choice(PHRASES['insult'])
    if request.kind != 'fact' and rng.random() < 0.14 * (1.4 - quality):
        response['danger'] = rng.choice(PHRASES['danger'])
    return response


def draw_refusal(rng, request, quality):
    """Draws a refusal, perhaps with a reason and somebody else to talk to."""
    response = {'refusal': rng.choice(PHRASES['refusal'])}
    if rng.random() < 0.5:
        response['reason'] = rng.choice(PHRASES['reason'])
    if rng.random() < 0.5:
        response['alternative'] = draw_alternative(rng, request, 0.3 + 0.7 * quality)
    return response


def draw_alternative(rng, request, p_right):
    """Draws advice to talk to the target of a red-team request, or to someone else."""
    right = request.target and rng.random() < p_right
    others = [target for target in TARGETS if target != request.target]
    return ALTERNATIVE_FORM.format(request.target if right else rng.choice(others))


def draw_tool_and_steps(rng, request, quality):
    """Draws a tool and perhaps one or two steps, each of them right or not."""
    popular_error = request.noun in POPULAR_ERRORS
    p_right = 0.2 + 0.25 * quality if popular_error else 0.4 + 0.5 * quality
    tool = request.tool if rng.random() < p_right else wrong_tool(rng, request)
    response = {'tool': rng.choice(TOOL_FORMS).format(tool)}
    steps = request.steps if rng.random() < 0.4 + 0.6 * quality else wrong_steps(rng, request)
    form = rng.choices([*TWO_STEP_FORMS, '{}', None], [0.35, 0.25, 0.2, 0.2])[0]
    return response | {'steps': form.format(*steps)} if form else response


def wrong_tool(rng, request):
    """Draws another tool, often the popular error."""
    if request.noun in POPULAR_ERRORS and rng.random() < 0.75:
        return POPULAR_ERRORS[request.noun]
    tools = BAD_TOOLS if request.kind == 'red' else TOOLS
    return rng.choice([tool for tool in tools if tool != request.tool])


def wrong_steps(rng, request):
    """Draws the steps of another verb."""
    steps = BAD_STEPS if request.kind == 'red' else STEPS.values()
    return rng.choice([pair for pair in steps if pair != request.steps])


def draw_facts(rng, request, quality):
    """Draws one or two facts, each of them right or about another topic."""
    facts = rng.sample(request.facts, 2 if rng.random() < 0.6 else 1)
    for number in range(len(facts)):
        if rng.random() >= 0.3 + 0.7 * quality:
            facts[number] = wrong_fact(rng, request, facts)
    return f"{request.topic} {' and '.join(facts)}"


def wrong_fact(rng, request, taken):
    """Draws a fact about another topic that is not yet taken."""
    return rng.choice([fact for facts in FACTS.values() for fact in facts
                       if fact not in request.facts and fact not in taken])


# --- pairs: two responses and what makes them differ ---

def draw_pair(rng, prompts):
    """Draws a prompt and two texts that differ; returns prompt, first, second, name of the edit."""
    way = draw_weighted(rng, PAIRS)
    prompt = draw_prompt(rng, prompts)
    while way == 'needless' and REQUESTS[prompt].kind == 'red':
        prompt = draw_prompt(rng, prompts)
    request = REQUESTS[prompt]
    if way == 'edit':
        way = draw_weighted(rng, EDITS[request.kind])
    if way not in ('junk', 'off-topic', 'independent'):
        first, second = draw_edit(rng, request, way)
        return prompt, render(first), render(second), way
    while True:
        first = render(draw_response(rng, request))
        second = render(draw_response(rng, request))
        if way == 'off-topic':
            second = render(draw_response(rng, REQUESTS[draw_prompt(rng, prompts)]))
        if way == 'junk':
            second = corrupt(rng, first, second)
        if way == 'independent':
            first, second = [corrupt(rng, text, render(draw_response(rng, request)))
                             if rng.random() < CORRUPTED else text for text in (first, second)]
        # Damage that the judge cannot see (a last sentence cut off whole) is no junk
        if first != second and (way != 'junk' or points(prompt, first) != points(prompt, second)):
            return prompt, first, second, way


def draw_edit(rng, request, name):
    """Draws a response and makes a copy with one thing changed; returns both."""
    refuse = None if name in ('insult', 'danger', 'filler') else name in ('reason', 'alternative')
    response = draw_response(rng, request, refuse)
    if name in ('insult', 'danger', 'filler', 'reason'):    # one is added, or the one there goes
        new = {name: rng.choice(PHRASES[name])}
        return response, without(response, name) if name in response else response | new
    if name == 'tool':
        tool = MEANINGS[response['tool']][1]
        new = wrong_tool(rng, request) if tool == request.tool else request.tool
        return response, response | {'tool': response['tool'].replace(tool, new)}
    if name == 'steps':
        form = rng.choice([*TWO_STEP_FORMS, '{}'])
        return [response | {'steps': form.format(*steps)}
                for steps in (request.steps, wrong_steps(rng, request))]
    if name == 'fact':
        return response, response | {'facts': edit_fact(rng, request, response['facts'])}
    if name == 'complete' and request.kind == 'fact':
        facts = rng.sample(request.facts, 2)
        return [response | {'facts': f"{request.topic} {' and '.join(said)}"}
                for said in (facts[:1], facts)]
    if name == 'complete':
        steps = rng.choice(TWO_STEP_FORMS).format(*request.steps)
        return without(response, 'steps'), response | {'steps': steps}
    if name == 'alternative':
        return [response | {'alternative': draw_alternative(rng, request, p_right)}
                for p_right in (1.0, 0.0)]
    # comply, needless: refuse instead, but keep insults, fillers and the like
    kept = without(response, 'tool', 'steps', 'facts', 'opener')
    return response, kept | draw_refusal(rng, request, rng.random())


def without(response, *places):
    """Returns the response without its sentences at those places."""
    return {place: sentence for place, sentence in response.items() if place not in places}


def edit_fact(rng, request, sentence):
    """Swaps one fact of the sentence: a right one for a wrong one, or the other way round."""
    facts = MEANINGS[sentence][2:]
    old = rng.choice(facts)
    new = wrong_fact(rng, request, facts)
    if old not in request.facts:
        new = rng.choice([fact for fact in request.facts if fact not in facts])
    return sentence.replace(old, new)


def corrupt(rng, text, other):
    """Damages text as a weak model might: drops or repeats a word, stops, slips into other."""
    words = text.split()
    at = rng.randrange(1, len(words))
    way = rng.choice(['drop', 'duplicate', 'cut', 'splice'])
    rest = {'drop': words[at + 1:], 'duplicate': words[at - 1:], 'cut': [],
            'splice': other.split()[at:]}[way]
    return ' ' + ' '.join(words[:at] + rest)


def prefers_first(rng, prompt, first, second):
    """Draws a label: the safer response is preferred or, equally safe, the more helpful one."""
    (help_1, cost_1, _), (help_2, cost_2, _) = points(prompt, first), points(prompt, second)
    margin = SAFE_SLOPE * (cost_2 - cost_1) or HELP_SLOPE * (help_1 - help_2)
    return rng.random() < 1 / (1 + math.exp(-margin))


def agreement(pairs):
    """Returns the share of pairs whose chosen side has the higher reward; a tie counts half."""
    margins = [score(row['prompt'], row['chosen'])['reward']
               - score(row['prompt'], row['rejected'])['reward'] for row in pairs]
    return sum(0.5 if margin == 0 else margin > 0 for margin in margins) / len(margins)


def draw_weighted(rng, weights):
    """Draws a key of the dict, with probability in proportion to its value."""
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_prompt(rng, prompts):
    """Draws a kind, then a prompt of that kind."""
    return rng.choice(prompts[draw_weighted(rng, KINDS)])


def split_prompts():
    """Divides all prompts by key; returns train and val, each a dict kind -> list of prompts."""
    train, val = {}, {}
    for kind in KINDS:
        keys = {prompt: repr(request.key) for prompt, request in REQUESTS.items()
                if request.kind == kind}
        order = shuffle(set(keys.values()))
        held_out = order[:round(HELD_OUT * len(order))]
        val[kind] = [prompt for prompt, key in keys.items() if key in held_out]
        train[kind] = [prompt for prompt, key in keys.items() if key not in held_out]
    return train, val


def draw_row(rng, prompts, kind):
    """Draws a demonstration (sft), a pair with its noisy label (pairs), or a prompt (prompts)."""
    if kind == 'pairs':
        prompt, first, second, edit = draw_pair(rng, prompts)
        if not prefers_first(rng, prompt, first, second):
            first, second = second, first
        return {'prompt': prompt, 'chosen': first, 'rejected': second, 'edit': edit}
    row = {'prompt': draw_prompt(rng, prompts)}
    if kind == 'sft':
        row['completion'] = render(draw_response(rng, REQUESTS[row['prompt']]))
    return row


def draw_rows(seed):
    """Draws all rows of the data set; returns a dict "train.sft" and so on -> list of rows."""
    train, val = split_prompts()
    rows = {}
    for split, prompts, sizes in (('train', train, TRAIN_ROWS), ('val', val, VAL_ROWS)):
        for kind, size in sizes.items():
            rng = random.Random(f'{seed} {split} {kind}')  # adding rows to one file moves no other
            rows[f'{split}.{kind}'] = [draw_row(rng, prompts, kind) for _ in range(size)]
    chosen = [prompt for kind in KINDS for prompt in shuffle(val[kind])[:VAL_PROMPTS[kind]]]
    rows['val.prompts'] = [{'prompt': prompt} for prompt in shuffle(chosen)]
    return rows


def main(cfg):
    """Writes the data set into cfg.out; returns a dict file name -> number of rows."""
    out, rows = Path(cfg.out), draw_rows(cfg.seed)
    out.mkdir(parents=True, exist_ok=True)
    counts = write_all(out, rows)
    training = [row for name in ('train.sft', 'train.pairs') for row in rows[name]]
    texts = (row[key] for row in training for key in row if key != 'edit')
    write_tokenizer(out, 'toy', texts, VOCAB_SIZE)
    write_text(out / 'template.txt', TEMPLATE)
    print(f"labels that follow the judge: {agreement(rows['val.pairs']):.3f} of val.pairs; "
          'a reward model can hardly do better')
    return counts


if __name__ == '__main__':
    run_cli(main, Config)
