"""
Shows tools.look's tables in a terminal, and writes them as one page that needs nothing else.

A table is a dict: title, notes, numbers (the names of its columns of numbers) and parts: {name:
rows}, each row a token's dict. Two parts are shown side by side, without x and mask. Blue is above
0, orange below; in the terminal one column colours the tokens, on the page every column its own.
"""
import html, os, sys
from pathlib import Path

from prefgpt import UserError, last_column, printable

BLUES, ORANGES = (195, 153, 111, 75), (230, 223, 216, 208)      # a terminal's, from pale to strong
HEAD = '''<!doctype html><html lang="en"><meta charset="utf-8"><title>{0}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em; max-width: 80em; color: #222 }}
h2 {{ font-size: 1.1em; margin: 2.5em 0 .3em; white-space: pre-wrap }} p {{ margin: 0 }}
th, td {{ text-align: left; vertical-align: top; padding: .15em 1.5em .15em 0 }}
td {{ white-space: pre-wrap }} td:first-child {{ color: #555; white-space: nowrap }}
pre {{ font: 13px/1.4 ui-monospace, monospace }} td span:last-child {{ margin-left: .3em }}
</style><h1>{0}</h1><p>Blue is above 0, orange below, each column on a scale of its own.</p>'''


def make_table(prompt, notes, names, grid, tokenizer):
    """Returns a table of a grid's rows, by their names: the prompt's last token, the response."""
    def word(token):
        text = tokenizer.decode([token]) if token != tokenizer.eot_token else 'EOS'
        return repr(printable(text))[1:-1]
    parts, ends = {}, (last_column(grid['mask']) + 1).tolist()
    for b, name in enumerate(names):
        x, y, mask, *numbers = (column[b].tolist() for column in grid.values())
        parts[name] = [{'x': word(x[t]), 'y': word(y[t]), 'mask': int(mask[t]),
                        **{key: number[t] if mask[t] else 0.0
                           for key, number in zip(list(grid)[3:], numbers)}}
                       for t in range(max(0, mask.index(True) - 1), ends[b])]
    return {'title': prompt, 'notes': notes, 'numbers': list(grid)[3:], 'parts': parts}


def share(table, row, name):
    """Returns a number as a share of its column's largest, -1 to 1: how strong its colour is."""
    highest = max(abs(row[name]) for rows in table['parts'].values() for row in rows)
    return row[name] / (highest or 1.0)


def layout(table, colors, paint):
    """Returns a table as lines; paint(text, share) colours the cells of colors: {key: column}."""
    blocks = []
    for name, rows in table['parts'].items():
        keys = [key for key in rows[0] if len(table['parts']) == 1 or key not in ('x', 'mask')]
        cells = [[name if key == 'y' else key for key in keys]]
        cells += [[f'{row[key]:.3f}' if key in table['numbers'] else str(row[key]) for key in keys]
                  for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [[text.rjust(width) for text, width in zip(line, widths)] for line in cells]
        block = ['  '.join(lines[0])]
        block += ['  '.join(paint(text, share(table, row, colors[key]) if key in colors else 0)
                            for text, key in zip(line, keys)) for line, row in zip(lines[1:], rows)]
        blocks.append((block, ' ' * len(block[0])))     # blanks go below it, beside a longer one
    length = max(len(block) for block, _ in blocks)
    return ['   |   '.join(texts) for texts in zip(*(block + [blank] * (length - len(block))
                                                     for block, blank in blocks))]


def show(tables, color):
    """Prints the tables; color names the column that colours the tokens, '': the last one."""
    def paint(text, share):
        level = round(4 * share) if sys.stdout.isatty() and 'NO_COLOR' not in os.environ else 0
        shade = (BLUES if level > 0 else ORANGES)[abs(level) - 1]
        return f'\033[30;48;5;{shade}m{text}\033[0m' if level else text
    for table in tables:
        column = color or table['numbers'][-1]
        if column not in table['numbers']:
            raise UserError(f'--color={color}: one of {", ".join(table["numbers"])}')
        print('\n' + printable(table['title']), *table['notes'],
              *layout(table, {'y': column, column: column}, paint), sep='\n')


def write_page(path, head, tables):
    """Writes the tables as HTML: the text in the colours of every column, and the numbers."""
    def paint(text, share):
        rgb, text = '0,114,178' if share > 0 else '230,120,0', html.escape(text)
        return f'<span style="background:rgba({rgb},{0.7 * abs(share):.2f})">{text}</span>'
    out = [HEAD.format(html.escape(head))]
    for table in tables:
        parts, names = table['parts'], table['numbers']
        out += [f'<h2>{html.escape(printable(table["title"]))}</h2>',
                *(f'<p>{html.escape(note)}</p>' for note in table['notes']),
                '<table><tr><th>' + ''.join(f'<th>{name}' for name in parts) * (len(parts) > 1)]
        for name in names:
            texts = [''.join(paint(row['y'], share(table, row, name)) for row in rows)
                     for rows in parts.values()]
            out.append(f'<tr><td>{name}' + ''.join(f'<td>{text}' for text in texts))
        out += ['</table><pre>', *layout(table, dict(zip(names, names)), paint), '</pre>']
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text('\n'.join(out) + '\n', encoding='utf-8')
    print(f'wrote {path}')
