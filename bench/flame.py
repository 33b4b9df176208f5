"""Draws where a program's time goes: a flame graph as SVG, of what `perf script` prints.

    perf record --call-graph dwarf --pid PID --output perf.data sleep 5
    perf script --input perf.data --no-inline | python3 bench/flame.py "title" > flame.svg

Each box is a function, as wide as its share of the samples, above those that called it (Gregg 2016, "The Flame Graph").
"""

import html
import re
import sys
from collections import defaultdict

WIDTH, ROW, FONT = 1400, 17, 11
# Narrower boxes cannot be seen.
LEAST_SHARE = 0.002
# Rust's paths are long, and their ends say more than their beginnings.
NOISE = re.compile(r"::\{\{closure\}\}|<impl .*?>::|::\{impl#\d+\}")


def stacks(lines):
    """Samples as lists of functions, the outermost first."""
    thread, frames = None, []
    for line in lines:
        if not line.strip():
            if thread:
                yield [thread, *reversed(frames)]
            thread, frames = None, []
        elif not line[0].isspace():
            thread = line.split()[0]
        else:
            name = line.split(None, 1)[1].rsplit(" (", 1)[0].rsplit("+0x", 1)[0]
            frames.append(NOISE.sub("", name))
    if thread:
        yield [thread, *reversed(frames)]


class Box:
    def __init__(self):
        self.count = 0
        self.inner = defaultdict(Box)


def colour(name):
    hue = 10 + sum(map(ord, name)) % 45
    return f"hsl({hue}, 80%, {62 + sum(map(ord, name[-4:])) % 18}%)"


def draw(name, box, x, depth, total, out):
    width = WIDTH * box.count / total
    if box.count < LEAST_SHARE * total:
        return depth
    deepest = depth
    if name is not None:
        share = f"{html.escape(name)}: {100 * box.count / total:.1f} %"
        fits = int((width - 4) / (FONT * 0.6))
        label = html.escape(name if len(name) <= fits else name[: max(fits - 1, 0)] + "…") if fits > 3 else ""
        out.append(
            f'<g transform="translate({x:.1f},{{{depth}}})"><title>{share}</title>'
            f'<rect width="{max(width - 0.5, 0.5):.1f}" height="{ROW - 1}" fill="{colour(name)}"/>'
            f'<text x="3" y="{ROW - 5}">{label}</text></g>'
        )
    for inner_name, inner in sorted(box.inner.items()):
        deepest = max(deepest, draw(inner_name, inner, x, depth + 1, total, out))
        x += WIDTH * inner.count / total
    return deepest


def main():
    root = Box()
    for stack in stacks(sys.stdin):
        box = root
        box.count += 1
        for name in stack:
            box = box.inner[name]
            box.count += 1
    if root.count == 0:
        sys.exit("there are no samples: is this what `perf script` printed?")
    boxes = []
    deepest = draw(None, root, 0, -1, root.count, boxes)
    height = (deepest + 2) * ROW + 30
    # The outermost is at the bottom.
    place = {depth: f"{height - (depth + 1) * ROW - 5}" for depth in range(deepest + 1)}
    boxes = [re.sub(r"\{(\d+)\}", lambda found: place[int(found[1])], box, count=1) for box in boxes]
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="monospace" font-size="{FONT}">')
    print(f'<rect width="100%" height="100%" fill="white"/><text x="4" y="18" font-size="14">{html.escape(sys.argv[1])}, {root.count} samples</text>')
    print("\n".join(boxes))
    print("</svg>")


if __name__ == "__main__":
    main()
