"""Draw how DWA connects 4 blocks, and two sparse variants: python -m lab.picture

Writes lab/dwa.svg. In the large drawing, column j carries X_j, row i adds up Y_i, and the dot
where they cross is alpha[i, j].
"""

import re
from pathlib import Path

L = 4
LEFT, TOP, WIDTH, HEIGHT = 60, 66, 110, 80  # column 0, row 0, and the steps to the next ones
BLOCK = 46  # side of a block
SHOWN = 3  # the row that is explained
ALPHA = "&#945;"

STYLE = """
.card { fill: #fff; stroke: #d1d9e0 }
.band { fill: #ddf4ff }
.block { fill: #f6f8fa; stroke: #1f2328; stroke-width: 1.5 }
.plain { fill: none; stroke: #1f2328; stroke-width: 2 }
.added { fill: none; stroke: #8c959f; stroke-width: 1.25 }
.added.shown { stroke: #0969da; stroke-width: 2 }
.head { fill: #1f2328 }
.head.added { fill: #8c959f; stroke: none }
.head.added.shown { fill: #0969da }
.one { fill: #1f2328; stroke: #1f2328; stroke-width: 1.5 }
.zero { fill: #fff; stroke: #59636e; stroke-width: 1.5 }
.one.shown { fill: #0969da; stroke: #0969da; stroke-width: 2 }
.zero.shown { stroke: #0969da; stroke-width: 2 }
.unread { fill: #c8d1da }
text { fill: #1f2328; font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.note { fill: #59636e }
.code { font: 600 14px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace }
.math { font: italic 18px "STIX Two Text", "Times New Roman", Times, serif }
.small { font-size: 13px }
.sum { font-size: 15px }
text.shown { fill: #0550ae }
.center { text-anchor: middle }
"""


def text(x, y, words, style=""):
    """Return a text, in which _{...} is a subscript."""
    below = r'<tspan dy=".28em" font-size="72%">\1</tspan><tspan dy="-.2em">\2</tspan>'
    words = re.sub(r"_{(.*?)}(.?)", below, words)
    return f'<text x="{x}" y="{y}" class="{style}">{words}</text>'


def line(style, *points):
    return f'<path class="{style}" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def head(style, x, y, turn=0):
    """Return the head of an arrow that points right, or down if turn is 90, and ends at x, y."""
    place = f"translate({x} {y}) rotate({turn})"
    return f'<path class="head {style}" transform="{place}" d="M0 0 l-9 -4.5 v9 z"/>'


def dot(style, x, y, radius):
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="{radius}"/>'


def box(style, x, y, width, height, radius):
    return (
        f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"/>'
    )


def network():
    """Yield the parts of the large drawing."""
    X = [LEFT + WIDTH * j for j in range(L + 1)]
    Y = [TOP + HEIGHT * i for i in range(L + 1)]
    yield box("band", 18, Y[SHOWN] - 32, X[SHOWN] + 74, 58, 8)

    # the sums
    for j in range(L):
        yield line("added", (X[j], Y[j]), (X[j], Y[L]))
    for i in range(1, L + 1):
        shown = " shown" if i == SHOWN else ""
        yield line("added" + shown, (X[0], Y[i]), (X[i], Y[i]))
        for j in range(i):
            yield head("added" + shown, X[j] + WIDTH / 2 + 4, Y[i])
            yield head("added", X[j], Y[i] - HEIGHT / 2 + 4, 90)

    # the plain Transformer
    for i in range(L + 1):
        block = X[i] + 40
        path = [(X[i], Y[i - 1])] if i else []
        yield line("plain", *path, (X[i], Y[i]), (block - 5, Y[i]))
        yield head("", block, Y[i])
        if i:
            yield text(X[i] + 11, Y[i] - 9, f"Y_{{{i}}}", "math" + " shown" * (i == SHOWN))
        if i < L:
            yield line("plain", (block + BLOCK, Y[i]), (X[i + 1] + 1, Y[i]))
            yield box("block", block, Y[i] - BLOCK / 2, BLOCK, BLOCK, 6)
            yield text(block + BLOCK / 2, Y[i] + 5, f"B_{{{i + 1}}}", "math center")
            yield text(X[i + 1] - 8, Y[i] - 12, f"X_{{{i + 1}}}", "math")
    yield text(X[0] - 38, Y[0] - 12, "X_{0} = Y_{0}", "math")
    yield text(X[0] - 38, Y[0] - 34, "token embedding", "note")
    yield text(X[1] + 12, Y[0] + 5, "output of block 1", "note")
    yield text(X[L] + 45, Y[L] + 5, "norm, head", "note")

    # alpha
    for i in range(1, L + 1):
        for j in range(i + 1):
            shown = " shown" if i == SHOWN else ""
            yield dot(("one" if i == j else "zero") + shown, X[j], Y[i], 6)
            if shown:
                yield text(X[j] - 37, Y[i] - 10, f"{ALPHA}_{{{i},{j}}}", "math shown")

    x, y = 341, 38
    for symbol, meaning in (
        ("X_{i}", "output of block i; X_{0} is the embedding"),
        ("Y_{i}", "weighted sum that block i + 1 reads"),
        (f"{ALPHA}_{{i,j}}", "learned weight of X_{j} in Y_{i}"),
    ):
        yield text(x, y, symbol, "math") + text(x + 38, y, meaning, "note")
        y += 24
    total = " + ".join(f"{ALPHA}_{{{SHOWN},{j}}} X_{{{j}}}" for j in range(SHOWN + 1))
    yield text(x, y + 14, f"Y_{{{SHOWN}}} = {total}", "math sum shown")
    y += 44
    yield line("plain", (x, y - 5), (x + 22, y - 5))
    yield text(x + 30, y, "plain Transformer", "note")
    yield line("added", (x + 168, y - 5), (x + 190, y - 5))
    yield text(x + 198, y, "added by DWA", "note")
    yield dot("one", x + 11, y + 19, 6) + text(x + 30, y + 24, f"{ALPHA}, initially 1", "note")
    yield dot("zero", x + 179, y + 19, 6) + text(x + 198, y + 24, f"{ALPHA}, initially 0", "note")


def grid(left, top, k, p, words):
    """Yield the parts of a small drawing: the X_j that each Y_i of the variant kxp reads."""
    step = 17
    yield text(left - 30, top - 21, f"{k}x{p}", "code") + text(left + 4, top - 21, words, "note")
    yield box("band", left - 34, top + (SHOWN - 0.5) * step, 32 + (L + 1) * step, step, 4)
    for j in range(L + 1):
        yield text(left + step * j, top + 4, f"X_{{{j}}}", "math small center")
    for i in range(1, L + 1):
        style = "math small" + " shown" * (i == SHOWN)
        yield text(left - 29, top + step * i + 4, f"Y_{{{i}}}", style)
        for j in range(i + 1):
            reads = i % p == 0 and (i - j) % k == 0
            x, y = left + step * j, top + step * i
            yield dot("one", x, y, 4) if reads else dot("unread", x, y, 1.5)


def main():
    parts = [
        f"<style>{STYLE}</style>",
        box("card", 0.5, 0.5, 859, 429, 10),
        *network(),
        line("card", (660, 30), (660, 400)),
        *grid(724, 66, 1, 1, "every X"),
        *grid(724, 197, 2, 1, "every second X"),
        *grid(724, 328, 1, 2, "every second Y"),
    ]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 430">\n{}\n</svg>\n'
    path = Path(__file__).with_name("dwa.svg")
    path.write_text(svg.format("\n".join(parts)), encoding="utf-8")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
