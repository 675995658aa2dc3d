"""
Defines how the studies' pictures look, and saves them. Only functions that draw need matplotlib.
"""
import importlib.util, os

from studies.table import committed

# Okabe and Ito's colours, which the colour-blind can tell apart; their yellow is lost on white
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
GREY = '#606060'
POINTS = dict(marker='o', markersize=4, capsize=2)      # of errorbar: means and their spreads
BARS = dict(error_kw=dict(lw=1, ecolor=GREY))           # of bar and barh


def new_figure(width, height, dpi=150):
    """Returns an empty matplotlib Figure, in inches."""
    from matplotlib.figure import Figure        # not pyplot: no global state, no display
    return Figure(figsize=(width, height), dpi=dpi, layout='constrained')


def frame(ax, title, unit='', below=''):
    """Draws a panel's title, under it what the y axis shows, and below what the x axis shows."""
    ax.set_title(title, loc='left', fontsize=11, pad=19 if unit else 6)
    ax.annotate(unit, (0, 1), (0, 5), xycoords='axes fraction', textcoords='offset points',
                fontsize=9, color=GREY)
    if below:
        ax.set_xlabel(below, fontsize=9, color=GREY)
    ax.tick_params(labelsize=9, color=GREY, labelcolor=GREY)
    ax.spines[['top', 'right']].set_visible(False)
    ax.spines[['bottom', 'left']].set_color(GREY)


def names(ax, styles=(), **where):
    """Draws the legend; styles are lines that stand for a style: (name, dict of line style)."""
    from matplotlib.lines import Line2D
    handles = ax.get_legend_handles_labels()[0]
    handles += [Line2D([], [], label=name, **{'color': GREY, **style}) for name, style in styles]
    ax.legend(handles=handles, frameon=False, fontsize=8.5, **where)


def save_picture(figure, path):
    """Writes a figure to the file path, PNG or SVG by its name, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    figure.savefig(temporary, format=path.suffix[1:])
    os.replace(temporary, path)
    print(f'wrote {path}')


def show_picture(cfg, path, draw):
    """Saves draw(), a Figure, beside the table, if the study has added to it; not with --quick."""
    show_pictures(cfg, path, {'': draw})


def show_pictures(cfg, path, draws):
    """Does the same for several Figures, {what their names add to the table's: function}."""
    if cfg.quick:
        return
    if not path.exists():
        print(f'all of it is in {committed(path)}; --results draws its picture anew')
        return
    for name, draw in draws.items():
        picture = path.with_name(f'{path.stem}{name}.png')
        if importlib.util.find_spec('matplotlib') is None:
            print(f'{picture} is drawn with matplotlib, which is not installed')
        else:
            save_picture(draw(), picture)
