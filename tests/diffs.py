"""
Do the diffs of studies/methods/ still do what they say? The suite asks the quick questions only.

    python tests/diffs.py               # all five, a minute
    python tests/diffs.py rloo kto      # two of them
    python tests/diffs.py --slips       # six planted slips per diff, all noticed: two minutes

Each diff is applied to a copy of the project, and tried there on the letters task of conftest.py,
from a policy and a reward model that know it (an untrained policy never ends: all scores are equal,
all advantages 0, and a test would pass on nothing):

    doctests      the equations of its functions, with numbers by hand
    by hand       the gradient's norm in step 2, by a loop over responses without padding or batch
    groups        every group of responses is of one prompt
    resumed       killed after step 5 and resumed = never stopped, bit for bit (I22)
    micro         micro-batches change rounding alone (I12)
    tools         evaluate, sample and export read the run
    learns        what the header's "check:" line says, on held-out rows (I23)

It exits with status 1 if something fails. It does not repeat the measured results.
"""
import argparse, contextlib, copy, doctest, importlib, io, json, os, re, statistics, subprocess
import sys, tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / 'tests')]
METHODS = TOP / 'studies/methods'
NAMES = sorted(path.stem for path in METHODS.glob('*.diff'))
CHECKS = 'doctests', 'by hand', 'groups', 'resumed', 'micro', 'learns', 'tools'

# What somebody might write instead: diff -> (as it is, the slip)
SLIPS = {
    'grpo': [
        ('(centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()', 'centred.flatten()'),
        ('log_ratio = ref_logprobs - logprobs', 'log_ratio = logprobs - ref_logprobs'),
        ('for i in indices for _ in range(cfg.n)', 'for _ in range(cfg.n) for i in indices'),
        ('group_advantages(capped, cfg.n)', 'group_advantages(scores, cfg.n)'),
        ('.sum(2) / mask.sum(1) ', '.sum(2) / mask.sum() * len(mask) '),
        ("policy_loss(logprobs, part['logprobs']", 'policy_loss(logprobs, logprobs.detach()')],
    'rloo': [
        ('(groups.sum(1, keepdim=True) - groups) / (n - 1)', 'groups.mean(1, keepdim=True)'),
        ('run.steps([1] * len(train), cfg.rollout_size // cfg.n)',
         'run.steps([1] * len(train), cfg.rollout_size)'),
        ('for i in indices for _ in range(cfg.n)', 'for _ in range(cfg.n) for i in indices'),
        ('kl_rewards(cap_unfinished(scores, ended, cfg.no_eos_score), ', 'kl_rewards(scores, '),
        ('[micro] * logprobs.sum(1)', '[micro] * logprobs.sum(1) / mask.sum(1)'),
        (').sum() / len(indices)', ').sum() / len(micro)')],
    'kto': [
        ('.mean().clamp(min=0)', '.mean()'),
        ('sign * beta * (h - z)', 'beta * (sign * h - z)'),
        ('cfg.rejected_weight * kto_loss', 'cfg.chosen_weight * kto_loss'),
        ('[others[i] for i in indices], micro_batch_size, device,\n'
         '                                     autocast), ref_others[:, indices])',
         '[train[i] for i in indices], micro_batch_size, device,\n'
         '                                     autocast), ref_train[:, indices])'),
        ('rejected, *ref_train[:, micro], z)',
         'rejected, *ref_train[:, micro], kl_estimate(all_logprobs(model, [\n'
         '                others[j] for j in micro], 5, device, autocast), ref_others[:, micro]))'),
        ('(losses.sum() / len(indices))', '(losses.sum() / len(micro))')],
    'online_dpo': [
        ('descending=True', 'descending=False'),
        ('for i in indices for _ in range(2)', 'for _ in range(2) for i in indices'),
        ('ranked(capped, responses)', 'ranked(scores, responses)'),
        ("grid['ref_logprobs'].sum(1)", "grid['logprobs'].sum(1)"),
        ('(losses * differ[micro])', 'losses'),
        ("grid['mask'][rows], cfg.temperature)", "grid['mask'][rows])")],
    'lora': [
        ("= self.linear.weight + 2 * self.b", "= self.linear.weight + self.b"),
        ('for part in (block.attn, block.mlp):', 'for part in (block.attn,):'),
        ('torch.nn.Parameter(weight.new_zeros(', 'torch.nn.Parameter(weight.new_ones('),
        ('    model.requires_grad_(False)\n', ''),
        ("        adapter.copy_(saved['adapters'][name])", '        pass'),
        ("load_model(GPT, init, 'policy', device), cfg.lora_rank)",
         "load_model(GPT, saved or init, 'policy', device), cfg.lora_rank)")]}


# ----------------------------------------------------------------------------- by hand

def logprobs(model, prompt, response, temperature):
    """Returns a response's logprobs, a list of numbers (), from one row without padding."""
    import torch
    ids = prompt + response
    logits = model.logits(model(torch.tensor([ids])))[0] / temperature          # (T, V)
    return [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(len(prompt), len(ids))]


def grpo_loss(new, old, ref, scores, cfg):
    """Returns GRPO's loss, (), from lists of logprobs per response: now, sampled, and ref's."""
    loss = 0
    for i, score in enumerate(scores):
        group = scores[i - i % cfg.n:][:cfg.n]
        advantage = (score - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        for p, o, r in zip(new[i], old[i], ref[i]):
            ratio = (p - o).exp()
            best = 1 + cfg.clip_eps if advantage > 0 else 1 - cfg.clip_eps      # no gain beyond it
            gain = advantage * ratio if (best - ratio) * advantage > 0 else advantage * best
            loss += (-gain + cfg.beta * ((r - p).exp() - 1 - (r - p))) / len(new[i]) / len(scores)
    return loss


def rloo_loss(new, old, ref, scores, cfg):
    """Returns RLOO's loss, (); see grpo_loss."""
    rewards = [score - cfg.beta * (sum(p) - sum(r)).item() for score, p, r in zip(scores, new, ref)]
    loss = 0
    for i, reward in enumerate(rewards):
        first = i - i % cfg.n
        others = [rewards[j] for j in range(first, first + cfg.n) if j != i]
        loss += -(reward - statistics.mean(others)) * sum(new[i]) / len(rewards)
    return loss


def online_dpo_loss(new, old, ref, scores, cfg):
    """Returns DPO's loss, (), on pairs of neighbours; see grpo_loss."""
    loss = 0
    for i in range(0, len(scores), 2):
        best, worst = (i, i + 1) if scores[i] > scores[i + 1] else (i + 1, i)
        h = [sum(new[j]) - sum(ref[j]) for j in (best, worst)]
        if scores[i] != scores[i + 1]:
            loss += -(cfg.beta * (h[0] - h[1])).sigmoid().log() / (len(scores) / 2)
    return loss


def dpo_loss(policy, ref, pairs, train, cfg):
    """Returns DPO's loss, (), of one pair after another."""
    loss = 0
    for prompt, chosen, rejected in pairs:
        h = [sum(logprobs(policy, prompt, y, 1)) - sum(logprobs(ref, prompt, y, 1)).detach()
             for y in (chosen, rejected)]
        loss += -(cfg.beta * (h[0] - h[1])).sigmoid().log() / len(pairs)
    return loss


def kto_loss(policy, ref, pairs, train, cfg):
    """Returns KTO's loss, (), of one response after another; z from pairs half a file away."""
    def h(prompt, y):
        return sum(logprobs(policy, prompt, y, 1)) - sum(logprobs(ref, prompt, y, 1)).detach()
    away = [train[(train.index(pair) + len(train) // 2) % len(train)] for pair in pairs]
    z = statistics.mean(h(pair[0], y).item() for pair, other in zip(pairs, away) for y in other[1:])
    assert z > 0.05, f'z is {z}: with 0 nothing would be seen of it'
    return sum(cfg.chosen_weight * (1 - (cfg.beta * (h(prompt, chosen) - z)).sigmoid())
               + cfg.rejected_weight * (1 - (cfg.beta * (z - h(prompt, rejected))).sigmoid())
               for prompt, chosen, rejected in pairs) / len(pairs)


LOSSES = {'grpo': grpo_loss, 'rloo': rloo_loss, 'online_dpo': online_dpo_loss, 'kto': kto_loss,
          'lora': dpo_loss}


def norm_of(loss, policy, trained):
    """
    Returns the norm of a loss's gradient. Of trained, a model with adapters of rank 8, the policy
    is the merged form: with M = W + 2 B A and G the gradient of M, B's is 2 G A^T and A's 2 B^T G.
    """
    loss.backward()
    if trained is None:
        return sum((p.grad ** 2).sum() for p in policy.parameters()).sqrt().item()
    grads, adapters = dict(policy.named_parameters()), dict(trained.named_parameters())
    ranks = [len(adapter) for name, adapter in adapters.items() if name.endswith('.a')]
    assert ranks == [8] * 4 * policy.config.n_layer, ranks
    total = 0
    for name in adapters:
        if name.endswith('.a'):
            a, b = adapters[name], adapters[name[:-1] + 'b']
            g = grads[name[:-1] + 'weight'].grad
            total += ((2 * g @ a.T) ** 2).sum() + ((2 * b.T @ g) ** 2).sum()
    return total.sqrt().item()


# ----------------------------------------------------------------------------- inside a copy

class Trial:
    """A diff in its copy, in a process of its own; each check returns what is wrong, or ''."""

    def __init__(self, name, script, flags, metric, bound, runs):
        """runs is a folder with data, odd, sft and rm; the rest is of the header's check line."""
        self.name, self.flags, self.metric, self.bound = name, flags, metric, bound
        self.module, self.runs = importlib.import_module(script), Path(runs)
        assert Path(self.module.__file__).resolve().parent == Path.cwd().resolve()
        self.ppo, self.samples = script == 'train_ppo', hasattr(self.module, 'rollout')
        # Five new tokens: some responses end, others are cut
        self.common = dict(
            data=self.runs / 'data', init=self.runs / 'sft', reward=self.runs / 'rm', device='cpu',
            warmup=2, max_new_tokens=5, rollout_size=24, batch_size=8 if self.ppo else 24,
            eval_every=2, steps=6, lr=3e-3) | flags

    def config(self, **changes):
        """Returns the script's Config with these changes; names that it lacks are left out."""
        from prefgpt import parse_config
        Config = self.module.Config
        return parse_config(Config, [f'--{key}={value}' for key, value in {
            **self.common, **changes}.items() if hasattr(Config, key)])

    def run(self, out, **changes):
        """Trains into a folder; returns the last evaluation's numbers."""
        return self.module.main(self.config(**changes, out=self.runs / self.name / out))

    def log(self, out):
        """Returns the rows of a run's log."""
        from conftest import log_rows
        return log_rows(self.runs / self.name / out)

    def doctests(self):
        failed, tried = doctest.testmod(self.module)
        return f'{failed} of {tried} fail' if failed or not tried else ''

    def recorded(self, out, changes, *names):
        """Trains; returns the calls of these functions: {name: [(arguments then, result)]}."""
        from conftest import record

        def snapshot(argument):
            return copy.deepcopy(argument) if hasattr(argument, 'parameters') else argument
        with pytest.MonkeyPatch.context() as patch:
            calls = {name: record(patch, self.module, name, snapshot) for name in names}
            self.run(out, **changes)
        return calls

    def by_hand(self):
        # Two passes over a rollout batch: in the second one ratios are not 1. A batch_size that no
        # rollout batch fills, pairs that tie at no_eos_score, odd pairs, with a z above 0
        own = dict(batch_size=32 if self.ppo else 24, micro_batch_size=7, ppo_epochs=2, steps=2,
                   ref_ema=0.3, temperature=0.7, beta=0.5, no_eos_score=-20, chosen_weight=1.5,
                   rejected_weight=0.5, lr=1e-2 if self.ppo or self.name == 'kto' else 5e-3,
                   max_new_tokens=5 if self.ppo else 4)
        if not self.samples:
            own['data'] = self.runs / 'odd'
        calls = self.recorded('hand', own, 'optimizer_step', 'load_examples',
                              'rollout' if self.samples else 'pair_logprobs')
        (_, policy, *_), norm = calls['optimizer_step'][-1]
        policy.zero_grad()
        plain = self.start()                        # LoRA's, merged
        plain.load_state_dict(policy.state_dict())
        loss = (self.rollout_loss if self.samples else self.pairs_loss)(plain, calls,
                                                                        self.config(**own))
        ours = norm_of(loss, plain, policy if self.name == 'lora' else None)
        return '' if abs(ours - norm) < 2e-5 * ours else f'norm {norm:.6f}, by hand {ours:.6f}'

    def start(self):
        """Returns the policy that the runs start from."""
        from prefgpt import GPT, load_checkpoint, load_model
        return load_model(GPT, load_checkpoint(self.runs / 'sft', ['sft']), 'policy', 'cpu')

    def rollout_loss(self, policy, calls, cfg):
        """Returns the loss by hand in the last optimizer step of step 2, on its rollout batch."""
        (sampler, ref, *_), (grid, scores, ended, _) = calls['rollout'][1]
        start = self.start().wte.weight
        assert (ref.wte.weight - start.lerp(sampler.wte.weight, 0.3 * self.ppo)).abs().max() < 1e-6
        assert 0 < ended.sum() < len(ended), 'some responses must end, and some not'
        rows = [(x[:int(mask.int().argmax()) + 1].tolist(), y[mask].tolist())
                for x, y, mask in zip(grid['x'], grid['y'], grid['mask'])]
        new, old, of_ref = ([logprobs(model, *row, cfg.temperature) for row in rows]
                            for model in (policy, sampler, ref))
        old, of_ref = ([[p.detach() for p in row] for row in lists] for lists in (old, of_ref))
        scores = [min(score, -20.0) if response[-1] != 256 else score
                  for score, (_, response) in zip(scores.tolist(), rows)]
        return LOSSES[self.name](new, old, of_ref, scores, cfg)

    def pairs_loss(self, policy, calls, cfg):
        """Returns the loss by hand in step 2, on the pairs of its micro-batches."""
        train = calls['load_examples'][0][1][0]
        trained = [pairs for (_, pairs, _), result in calls['pair_logprobs']
                   if result.requires_grad]
        pairs = [pair for micro in trained[len(trained) // 2:] for pair in micro]
        return LOSSES[self.name](policy, self.start(), pairs, train, cfg)

    def groups(self):
        if not self.samples:
            return ''
        calls = self.recorded('groups', {'steps': 1}, 'rollout')
        prompts, n = calls['rollout'][0][0][3], int(self.flags.get('n', 2))
        rows = [prompts[i:i + n] for i in range(0, len(prompts), n)]
        if len(prompts) != (24 if self.ppo else 48):
            return f'{len(prompts)} responses'
        one = all(len(set(map(tuple, group))) == 1 for group in rows) and rows[0] != rows[1]
        return '' if one else 'a group has several prompts'

    def resumed(self):
        import torch
        from conftest import kill_after, same
        self.run('whole')
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_after(patch, 5)                    # past the checkpoint of step 4
            self.run('parts')
        self.run('parts', resume=True)
        whole, parts = ({**torch.load(self.runs / self.name / out / 'ckpt.pt', weights_only=True),
                         'config': 0} for out in ('whole', 'parts'))
        equal = same(whole, parts) and self.log('whole') == self.log('parts')
        return '' if equal else 'not as if never stopped'

    def micro(self):
        own = dict(steps=3, eval_every=3)
        self.run('one', **own)
        self.run('micro', **own, micro_batch_size=5)
        for a, b in zip(self.log('one'), self.log('micro')):
            for key in a.keys() - {'samples', 'accuracy', 'eval_accuracy'}:     # margins of 0
                if abs(a[key] - b[key]) > 1e-3 * (abs(a[key]) + 0.1):
                    return f"step {a['step']}: {key} {b[key]:.5f}, not {a[key]:.5f}"
        return ''

    def learns(self):
        got = self.run('learn', **{'steps': 40, 'rollout_size': 36, 'eval_every': 40, **self.flags,
                                   'batch_size': 12 if self.ppo else 32,
                                   'max_new_tokens': 8})[self.metric]
        return '' if got > self.bound else f'{self.metric} {got:.3f}, not > {self.bound}'

    def tools(self):
        run = f'{self.runs}/{self.name}/learn'
        for words in (f'evaluate {self.runs}/sft {run}', f'sample {run} --prompt=say_a:',
                      f'hf export {run} --out={run}/hf'):
            done = subprocess.run([sys.executable, '-m', *f'tools.{words}'.split()], text=True,
                                  capture_output=True)
            if done.returncode:
                return f'{words.split()[0]}: {done.stderr[-200:]}'
        return ''

    def first_failure(self, checks):
        """Makes the checks; returns the first one that fails, with what is wrong, or ''."""
        for each in checks:
            if wrong := getattr(self, each.replace(' ', '_'))():
                return f'{each}: {wrong}'
        return ''


# ----------------------------------------------------------------------------- outside

def header(name):
    """Returns a diff's header: the lines before the first file."""
    return (METHODS / f'{name}.diff').read_text().partition('diff --git')[0]


def check_line(name):
    """Returns script, flags, metric and bound of a header's "check: SCRIPT FLAG=VALUE; M > B"."""
    script, flags, metric, bound = re.search(
        r'^check: (\w+)((?: \w+=\S+)*); (\w+) > (\S+)$', header(name), re.MULTILINE).groups()
    return script, dict(flag.split('=') for flag in flags.split()), metric, float(bound)


def prepare(runs):
    """Writes the letters task, and the SFT and reward model that the checks start from."""
    from conftest import train_tiny_rm, train_tiny_sft, write_toy_data
    data = write_toy_data(runs / 'data')
    odd = write_toy_data(runs / 'odd')              # every prompt has the responses to the next one
    rows = [json.loads(line) for line in (odd / 'train.pairs.jsonl').open()]
    (odd / 'train.pairs.jsonl').write_text(''.join(
        json.dumps(row | {'prompt': rows[i - 4]['prompt']}) + '\n' for i, row in enumerate(rows)))
    train_tiny_rm(data, train_tiny_sft(data, runs / 'sft'), runs / 'rm')


def check(name, folder, runs, slip=None, checks=CHECKS):
    """Tries a diff, or one with a slip, in a copy of its own; returns what is wrong, or ''."""
    from studies.methods.table import patched_copy
    script, flags, metric, bound = check_line(name)
    own = Path(tempfile.mkdtemp(dir=folder))
    place = patched_copy(name, own / 'copy')
    if slip:
        text = (place / f'{script}.py').read_text()
        assert text.count(slip[0]) == 1, f'{name}: {slip[0]!r} is there {text.count(slip[0])} times'
        (place / f'{script}.py').write_text(text.replace(*slip))
    for part in ('data', 'odd', 'sft', 'rm'):
        (own / part).symlink_to(runs / part)
    code = ('import contextlib, io, json, sys, diffs\nsys.path.insert(0, ".")     # the copy\n'
            'with contextlib.redirect_stdout(io.StringIO()):\n'
            f'    trial = diffs.Trial({name!r}, {script!r}, {flags!r}, {metric!r}, {bound!r}, '
            f'{str(own)!r})\n    wrong = trial.first_failure({checks!r})\nprint(json.dumps(wrong))')
    done = subprocess.run([sys.executable, '-c', code], cwd=place, text=True, capture_output=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1',
                                            'PYTHONPATH': str(TOP / 'tests')})
    if done.returncode:
        return 'does not run: ' + (done.stderr.strip() or '?').splitlines()[-1][:200]
    return json.loads(done.stdout.splitlines()[-1])


def main(names, slips):
    """Checks these diffs; prints a line each, or a line per slip; returns how many fail."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, 'runs')
        with contextlib.redirect_stdout(io.StringIO()):
            runs.mkdir()
            prepare(runs)
        for name in names or NAMES:
            if not slips:
                wrong = check(name, Path(folder), runs)
                failed += bool(wrong)
                print(f'{name:<12} {wrong or "ok"}', flush=True)
            for old, new in SLIPS[name] if slips else ():
                wrong = check(name, Path(folder), runs, (old, new), CHECKS[:-1])
                failed += not wrong
                print(f'{name:<12} {new.strip()[:50]:<50} {wrong[:90] or "NOT NOTICED"}',
                      flush=True)
    return failed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=' '.join(NAMES))
    parser.add_argument('--slips', action='store_true', help='plant slips; each must be noticed')
    arguments = parser.parse_args()
    sys.exit(main(arguments.names, arguments.slips) > 0)
