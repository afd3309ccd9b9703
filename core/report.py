"""report.py: what the tables, figures and films of all sections share. No number is typed here.

    text = table(["layer", "score"], [[1, "4.05"], ...])       # Markdown
    with figure(path, columns=3) as axes: axes[0, 0].plot(...)     # a PNG, written whole or not at all
"""
import contextlib
import re

from core.run import atomic
from core.stats import paired, verdict

BLUE, RED, YELLOW, GREEN, GREY, BLACK = "#30638e", "#d1495b", "#edae49", "#5f9e6e", "#999999", "#222222"


def table(columns, rows):
    """Markdown table of rows (lists of cells, turned to text; None is "-")."""
    lines = [columns, ["---"] * len(columns), *([("-" if c is None else str(c)) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@contextlib.contextmanager
def figure(path, rows=1, columns=1, width=3.7, height=3.1, **how):
    """Yields the axes (rows, columns) of a figure that is written to `path` at the end; sizes are those of a panel."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(rows, columns, squeeze=False, constrained_layout=True,
                             figsize=(width * columns, height * rows), **how)
    yield axes
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
    with atomic(path) as temporary:
        fig.savefig(temporary, dpi=130, format="png")
    plt.close(fig)


def film(path, frames, width=86):
    """A GIF, whatever its name, of a text in the making, the last frame held. Each of `frames` is a list of (word,
    hidden): hidden ones are grey, and red is what is no longer hidden, or another word, since the frame before."""
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont
    font, pages = ImageFont.truetype(findfont("monospace"), 13), []
    for before, now in zip([frames[0], *frames], [*frames, frames[-1]]):
        column, row, page = 0, 0, []
        for old, (word, hidden) in zip(before, now, strict=True):
            for i, part in enumerate(word.split("\n")):
                if i or column + len(part) > width:
                    column, row = 0, row + 1
                page.append((column, row, part, GREY if hidden else BLACK if old == (word, hidden) else RED))
                column += len(part)
        pages.append(page)
    w, rows = font.getlength(" "), 1 + max(row for page in pages for _, row, *_ in page)
    images = [Image.new("RGB", (int(w * width) + 10, 16 * rows + 10), "white") for _ in pages]
    for image, page in zip(images, pages, strict=True):
        for column, row, part, color in page:
            ImageDraw.Draw(image).text((5 + w * column, 5 + 16 * row), part, color, font)
    with atomic(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=[*[200] * len(frames), 2000])


def compare_arms(control, arm, what):
    """What an arm of CONVERT bought, from its result and that of the unaligned bidirectional one: by the bound on a
    text's likelihood, the only number that all arms share."""
    gap = paired(arm["bound"][:1], control["bound"][:1])
    cost = arm["seconds"] / arm["steps"] / (control["seconds"] / control["steps"])
    return (f"Bound on -log p, converted {what}, against all at once without alignment: "
            f"{verdict(gap, unit='nats a token')}. A step costs {cost:.2f}x.")


def fill_markers(text, blocks):
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> replaced by blocks[NAME]."""
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + block + "\n" + end + rest.partition(end)[2]
    return text


def answer(findings, sources):
    """The first of `findings` that one of the `sources` names, its verdict in bold; the interval only where that is
    not known."""
    line = next((line.split("**: ", 1)[1] for run, words in sources for line in findings
                 if line.startswith(f"**{run}**: ") and words in line), "not run")
    line, counts = line if "not known (" in line else re.sub(r"95% \[[^]]*\][^,)]*, ", "", line), " layers (" in line
    return re.sub(r"\b(ahead|behind|ties|not known)\b|(?<=^Layer )\d+", r"**\g<0>**", line, count=0 if counts else 1)
