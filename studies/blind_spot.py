"""
DPO's blind spot: what no pair covers, on three responses and on a map of 8 prompts x 8 responses.

Xu et al. 2024, theorem 4.1, table 1 and figure 1: DPO can end with probability on responses that
the pairs never show, where PPO cannot, because PPO's KL is taken over all responses:

    L_DPO = -log sigmoid(beta [log pi(y1)/ref(y1) - log pi(y2)/ref(y2)])    says nothing of pi(y3)
    J_PPO = E_{y ~ pi}[score(y) - beta log pi(y)/ref(y)]                    says something of each y

The losses are train_dpo's and train_rm's. PPO is its objective's exact expectation over the few
responses, by gradient ascent: no sampling, no clipping, no value model.

    python -m studies.blind_spot
    off-policy, DPO at loss 0.6 raises 4 of 5 uncovered cells: holds in 20 of 20 seeds
"""
import copy
from dataclasses import dataclass

import torch
from torch import nn

from prefgpt import run_cli
from studies.style import COLORS, POINTS, frame, names, new_figure, show_picture
from studies.table import (above, by_seed, complete, select, show_claims, show_means, spreads_by,
                           table_and_seeds)
from train_dpo import dpo_loss
from train_rm import reward_loss


@dataclass
class Config:
    seeds: str = ' '.join(map(str, range(5, 25)))   # the seeds to run, or to complete
    csv: str = 'out/studies/blind_spot.csv'     # for seeds that studies/results/ lacks
    results: bool = False           # add them to studies/results/blind_spot.csv, and draw
    quick: bool = False             # a smoke test: the first seed, few steps, a table of its own


BETA = 0.1                          # of DPO and of PPO alike, on the map
LOSSES = (0.6, 0.4, 0.2, 0.05)      # DPO is looked at where its training loss first falls to these
SETTINGS = {                        # is the winner rare under the reference?, spread of the weights
    'off-policy': (True, 0.5), 'balanced': (False, 0.5), 'small weights': (True, 0.15)}


def numbers(*values):
    """Returns a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def pair_loss(logits, ref_logits, beta):
    """Returns L_DPO of the one pair y1 > y2, for tables of three logits (..., 3)."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return dpo_loss(logprobs[..., 0], logprobs[..., 1], ref_logprobs[..., 0],
                    ref_logprobs[..., 1], beta)


def along(start, shift):
    """Returns where descent leads from start (3,) as y1's logit rises by shift and y2's falls."""
    shift = torch.as_tensor(shift, dtype=torch.float64)[..., None]
    return (start.log() + shift * numbers(1, -1, 0)).softmax(-1)                    # (..., 3)


def peak(start):
    """Returns the highest pi(y3) on the way if y1 is rarer than y2: p3 / (2 sqrt(p1 p2) + p3)."""
    return start[2] / (2 * (start[0] * start[1]).sqrt() + start[2])


def descend(logits, loss_of, target, lr):
    """Descends loss_of(logits) until it is at most target; returns the logits."""
    logits = logits.clone().requires_grad_()
    while (loss := loss_of(logits)) > target:
        gradient, = torch.autograd.grad(loss, logits)
        logits = (logits - lr * gradient).detach().requires_grad_()
    return logits


def optimum(scores, ref_logprobs, beta):
    """Returns what maximizes J_PPO: pi = ref exp(score / beta) / Z, equation 5 of the paper."""
    return (ref_logprobs + scores / beta).softmax(-1)


def ascend(parameters, logits_of, scores, ref_logprobs, beta, steps, lr):
    """Climbs J_PPO, taken exactly over all responses, with Adam; returns the probabilities."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        logprobs = logits_of().log_softmax(-1)
        J = (logprobs.exp() * (scores - beta * (logprobs - ref_logprobs))).sum(-1)
        optimizer.zero_grad()
        (-J.mean()).backward()
        optimizer.step()
    return logits_of().softmax(-1).detach()


def three_responses():
    """Prints the counterexample, (a) to (e)."""
    def show(probs):
        return '(' + ', '.join(f'{p:.4f}' for p in probs.tolist()) + ')'
    tiny = 1e-300       # as good as the paper's 0, and its logarithm is finite
    ref, far = numbers(0.5, 0.5, tiny), numbers(0.5, 0.5, 1e-8)
    print('\n(a) the loss of one pair, y1 > y2, beta 0.1, depends on pi(y2) / pi(y1) alone')
    for probs in (numbers(.5, .5, 0), numbers(.1, .1, .8), numbers(.5, .05, .45),
                  numbers(.1, .01, .89), numbers(1, tiny, tiny), numbers(.1, tiny, .9)):
        print(f'    {show(probs)}: {pair_loss(probs.log(), ref.log(), 0.1):.6f}')
    logits = numbers(0.3, -0.2, 1.0).requires_grad_()
    pair_loss(logits, far.log(), 1.0).backward()
    print(f'(b) its gradient to the three logits: {logits.grad.tolist()}')
    start = numbers(.05, .05, .9)
    loss_at_5 = nn.functional.softplus(numbers(-5.0)).item()        # a margin of 5: 0.0067
    dpo = descend(start.log(), lambda z: pair_loss(z, far.log(), 1.0), loss_at_5, lr=0.1)
    scores = descend(numbers(0, 0, 0), lambda r: reward_loss(r[0], r[1]), loss_at_5, lr=0.1)
    weak = descend(start.log(), lambda z: pair_loss(z, far.log(), 0.1), loss_at_5, lr=10.0)
    table = start.log().requires_grad_()
    ppo = ascend([table], lambda: table, scores, far.log(), 1.0, steps=1000, lr=0.05)
    print(f'(c) started at {show(start)}, reference {show(far)}, beta 1:\n'
          f'    DPO to loss {loss_at_5:.4f}: {show(dpo.softmax(-1))}, in closed form '
          f'{show(along(start, 2.5))}\n    PPO on scores {show(scores)}: {show(ppo)}\n'
          f'    DPO to the same loss at beta 0.1, ten times as far: {show(weak.softmax(-1))}')
    print('(d) the reference is where DPO starts; y3 at first, at its most, at margin 10 / beta 1')
    for start in (numbers(.45, .45, .1), numbers(.01, .98, .01)):
        path = along(start, torch.linspace(0, 5, 5001))[:, 2]
        print(f'    {show(start)}: {path[0]:.4f}, {path.max():.4f}, {path[-1]:.4f}'
              f' (the formula of the peak: {peak(start):.4f})')
    bound = 0.1 * (far[0] / far[2]).log().item()
    below, above = (optimum(numbers(0, -5, gap), far.log(), 0.1)[2].item()
                    for gap in (bound - 0.5, bound + 0.5))
    print(f'(e) a reward model wrong about y3 by a gap: held to 0 below {bound:.2f} (beta 0.1, '
          f'ref(y3) 1e-8): pi(y3) is {below:.4f} at 0.5 less, {above:.4f} at 0.5 more')


def mlp(init_std):
    """Makes a net from a one-hot prompt (8) to 8 logits or scores; small weights blur prompts."""
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)).double()
    for layer, std in ((net[0], init_std), (net[2], init_std / 8)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return net


def fit(net, loss_of, targets, lr=3e-3, most_steps=20_000):
    """Descends loss_of(net's table); yields (step, table) where it reaches each target."""
    optimizer, targets = torch.optim.Adam(net.parameters(), lr=lr), list(targets)
    for step in range(most_steps):
        table = net(torch.eye(8, dtype=torch.float64))      # (8, 8): prompts x responses
        loss = loss_of(table)
        while targets and loss.item() <= targets[0]:
            targets.pop(0)
            yield step, table.detach()
        if not targets:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f'the loss is {loss.item():.4f} after {most_steps} steps, not {targets[0]}')


def draw_map(seed, off_policy):
    """Returns each prompt's losers (8, 2), whose winner is on the diagonal, and the reference."""
    generator = torch.Generator().manual_seed(seed)
    losers = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(8)])
    losers = (losers + torch.arange(1, 9)[:, None]) % 8         # never the diagonal
    weights = (0.5 * torch.randn(8, 8, generator=generator, dtype=torch.float64)).exp()
    if off_policy:              # the losers ten times as likely, and the winner a tenth
        weights = weights.scatter(1, losers, 10 * weights.gather(1, losers))
        weights -= 0.9 * weights.diag().diag()
    return losers, weights / weights.sum(1, keepdim=True)


def run_map(seed, off_policy, init_std, steps=1500):
    """Returns losers, and by name the tables of the reference, DPO on its way, scores and PPO."""
    losers, target = draw_map(seed, off_policy)
    torch.manual_seed(seed)
    ref_net, reward_net = mlp(init_std), mlp(init_std)
    nn.init.zeros_(reward_net[2].weight)        # all scores start at 0, as DPO's log-ratios do

    def sides(table):
        return table.diag()[:, None], table.gather(1, losers)       # (8, 1), (8, 2)
    (_, ref_logits), = fit(ref_net, lambda logits: (
        target * (target.log() - logits.log_softmax(1))).sum(1).mean(), [1e-4])
    ref_logprobs = ref_logits.log_softmax(1)
    tables = {'ref': ref_logprobs.exp()}
    for loss, (_, logits) in zip(LOSSES, fit(copy.deepcopy(ref_net), lambda logits: dpo_loss(
            *sides(logits.log_softmax(1)), *sides(ref_logprobs), BETA).mean(), LOSSES)):
        tables[f'dpo {loss}'] = logits.softmax(1)
    # The same losses to stop at: the margins of the pairs are alike, and beta is the same
    for loss, (_, scores) in zip(LOSSES[2:], fit(
            reward_net, lambda table: reward_loss(*sides(table)).mean(), LOSSES[2:])):
        policy = copy.deepcopy(ref_net)
        tables[f'scores {loss}'] = scores
        tables[f'ppo {loss}'] = ascend(
            policy.parameters(), lambda: policy(torch.eye(8, dtype=torch.float64)), scores,
            ref_logprobs, BETA, steps, lr=3e-3)
        tables[f'ppo optimum {loss}'] = optimum(scores, ref_logprobs, BETA)
    return losers, tables


def measure(probs, ref, losers):
    """Returns what a policy (8, 8) does with winners and with the cells that no pair covers."""
    uncovered = torch.ones(8, 8, dtype=torch.bool).scatter(1, losers, False).fill_diagonal_(False)
    ratio = (probs / ref)[uncovered]
    return {'p_best': probs.diag().mean().item(),
            'uncovered': (probs * uncovered).sum(1).mean().item(),
            'up': (ratio > 1 + 1e-9).double().mean().item(),
            'ratio_95': ratio.quantile(0.95).item(), 'ratio_max': ratio.max().item()}


def run_seed(seed, quick):
    """Returns a seed's rows: every policy in every setting."""
    rows = []
    for setting, given in SETTINGS.items():
        losers, tables = run_map(seed, *given, steps=50 if quick else 1500)
        rows += [{'seed': seed, 'setting': setting, 'policy': name,
                  **measure(table, tables['ref'], losers),
                  'command': f'python -m studies.blind_spot --seeds={seed}'}
                 for name, table in tables.items() if 'scores' not in name]
    return rows


# What the map shows, of the rows m[setting, policy] of one seed: claim -> whether it holds
OFF, FLAT, SMALL = SETTINGS
CHECKS = {
    'off-policy, DPO at loss 0.6 raises 4 of 5 uncovered cells':
        lambda m: m[OFF, 'dpo 0.6']['up'] >= 0.8,
    "off-policy, DPO at loss 0.6 raises the uncovered mass by half of the reference's":
        lambda m: m[OFF, 'dpo 0.6']['uncovered'] >= 1.5 * m[OFF, 'ref']['uncovered'],
    'balanced, DPO at loss 0.6 does not raise it':
        lambda m: m[FLAT, 'dpo 0.6']['uncovered'] <= m[FLAT, 'ref']['uncovered'],
    'off-policy, DPO at loss 0.05 holds less than 1 % there':
        lambda m: m[OFF, 'dpo 0.05']['uncovered'] < 0.01,
    'off-policy, PPO at reward loss 0.2 holds less there than DPO at 0.2':
        above('uncovered', (OFF, 'dpo 0.2'), (OFF, 'ppo 0.2')),
    'small weights, PPO at reward loss 0.2 holds less there than the reference':
        above('uncovered', (SMALL, 'ref'), (SMALL, 'ppo 0.2'))}


SETTING_COLORS = dict(zip(SETTINGS, (COLORS[0], COLORS[2], COLORS[1])))
POLICIES = ('ref', *(f'dpo {loss}' for loss in LOSSES), 'ppo 0.2', 'ppo optimum 0.2')
MAPS = ('pairs', *POLICIES[:5], 'scores 0.2', 'ppo 0.2')


def label(name):
    """Turns 'dpo 0.6' into 'DPO 0.6', and 'ppo optimum 0.2' into 'PPO* 0.2'."""
    return name.replace('ppo optimum', 'PPO*').replace('ppo', 'PPO').replace('dpo', 'DPO')


def draw_maps(figure, grid, row, seed, setting):
    """Draws one seed's heat-maps in a setting; a ring: an uncovered cell above the reference."""
    from matplotlib.colors import PowerNorm
    losers, tables = run_map(seed, *SETTINGS[setting])
    tables['pairs'] = covered = torch.zeros(8, 8).scatter(1, losers, 0.5).fill_diagonal_(1)
    for column, name in enumerate(MAPS):
        ax = figure.add_subplot(grid[row, column])
        # The root of a probability, so that .11 and .23 can be told apart; scores as they are
        norm = None if name.startswith('scores') else PowerNorm(0.5, 0, 1)
        ax.imshow(tables[name], cmap='Blues', norm=norm)
        if name.startswith(('dpo', 'ppo')):
            up = (tables[name] > tables['ref']) & (covered == 0)
            ax.scatter(*up.nonzero().T.flip(0), s=28, facecolor='none', edgecolor=COLORS[1])
        frame(ax, label(name) if row == 0 else '')
        ax.set(xticks=[], yticks=[], xlabel='responses',
               ylabel='' if column else f'{setting}: prompts')


def draw_means(ax, rows, column, title, unit):
    """Draws mean and standard deviation over seeds, setting by setting, along the policies."""
    for shift, (setting, color) in zip((-0.15, 0, 0.15), SETTING_COLORS.items()):
        some = [row for policy in POLICIES for row in select(rows, setting=setting, policy=policy)]
        _, means, spreads = spreads_by(some, 'policy', column)
        ax.errorbar([x + shift for x in range(len(means))], means, spreads, color=color,
                    linestyle='none', label=setting, **POINTS)
    ax.set_xticks(range(len(POLICIES)), map(label, POLICIES), rotation=30)
    ax.set_ylim(-0.02, 1.02)
    frame(ax, title, unit, 'policy, and the loss it is trained to')


def draw(rows):
    """Draws the picture, a matplotlib Figure: maps of the first seed, means over all seeds."""
    figure = new_figure(12, 7.4)
    maps, means = figure.add_gridspec(2, 1, height_ratios=(3.1, 3))
    grid = maps.subgridspec(2, len(MAPS))
    for row, setting in enumerate((OFF, FLAT)):
        draw_maps(figure, grid, row, rows[0]['seed'], setting)
    axes = figure.add_subfigure(means).subplots(1, 3)
    draw_means(axes[0], rows, 'up', 'uncovered cells above ref', 'share of uncovered cells')
    draw_means(axes[1], rows, 'uncovered', 'uncovered cells', 'their probability, mean of prompts')
    margin = torch.linspace(0, 10, 401, dtype=torch.float64)       # of log-ratios: twice the shift
    for start, setting in (((.45, .45, .1), FLAT), ((.01, .98, .01), OFF)):
        axes[2].plot(margin, along(numbers(*start), margin / 2)[:, 2],
                     color=SETTING_COLORS[setting], label='from ' + str(start).strip('()'))
    frame(axes[2], 'three responses: DPO', 'probability of y3, which no pair shows',
          'log-ratio of y1 minus log-ratio of y2, nats')
    for ax in axes:
        names(ax)
    return figure


def main(cfg):
    """Prints the counterexample, runs what the table lacks, prints, draws; returns what failed."""
    three_responses()
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    show_means(rows, ('setting', 'policy'), ('p_best', 'uncovered', 'up', 'ratio_95', 'ratio_max'))
    failed = show_claims(CHECKS, by_seed(rows, 'setting', 'policy'), cfg.quick)
    show_picture(cfg, path, lambda: draw(rows))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
